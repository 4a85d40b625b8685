//! The `underpass` binary as operators and scripts meet it.

use std::process::{Command, Output};

fn underpass(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_underpass"))
        .args(args)
        .env_remove("RUST_LOG")
        .env_remove("UNDERPASS_CGROUP")
        .env_remove("UNDERPASS_RUN_DIR")
        .output()
        .expect("the binary runs")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

/// Every row there is; scripts rely on the names.
const CHECKS: [&str; 30] = [
    "kernel",
    "cgroup",
    "attach-point",
    "btf",
    "bpffs",
    "kept-pods",
    "connect-hooks",
    "name-hooks",
    "sockops",
    "socket-storage",
    "ring-buffer",
    "lpm-trie",
    "netns-cookie",
    "sk-assign",
    "tcx",
    "clsact",
    "node-guard",
    "ktls",
    "ktls-ciphers",
    "ktls-rekey",
    "ktls-sockmap",
    "cve-2026-23240",
    "cve-2026-23414",
    "cve-2026-46102",
    "bpf-lsm",
    "ipv6",
    "fwmark-accept",
    "memlock",
    "capabilities",
    "open-files",
];

#[test]
fn check_as_json_has_every_row_and_agrees_with_its_exit_code() {
    let out = underpass(&["check", "-o", "json"]);
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON and nothing else");
    let rows = report["checks"].as_array().expect("a list");
    let names: Vec<_> = rows.iter().map(|r| r["name"].as_str().expect("a name")).collect();
    assert_eq!(names, CHECKS);
    for row in rows {
        assert!(!row["detail"].as_str().expect("a detail").is_empty(), "{row}");
        match row["state"].as_str().expect("a state") {
            "ok" => assert!(row["instead"].is_null() && row["remedy"].is_null(), "{row}"),
            "degraded" => assert!(row["instead"].is_string() && row["remedy"].is_null(), "{row}"),
            "missing" => assert!(row["instead"].is_null() && row["remedy"].is_string(), "{row}"),
            other => panic!("state {other}"),
        }
    }
    let missing = rows.iter().any(|r| r["required"] == true && r["state"] == "missing");
    assert_eq!(report["can_run"], !missing);
    assert_eq!(out.status.code(), Some(i32::from(missing)));

    // These tests run as root on a kernel that the agent supports: the probes must say so.
    for name in [
        "connect-hooks",
        "name-hooks",
        "sockops",
        "socket-storage",
        "ring-buffer",
        "lpm-trie",
        "netns-cookie",
        "sk-assign",
    ] {
        let row = rows.iter().find(|r| r["name"] == name).expect("checked above");
        assert_eq!(row["state"], "ok", "{row}");
    }
    let tc: Vec<_> = rows.iter().filter(|r| r["name"] == "tcx" || r["name"] == "clsact").collect();
    assert!(tc.iter().any(|r| r["state"] == "ok"), "{tc:?}");
}

#[test]
fn check_without_rights_says_what_is_missing() {
    use std::os::unix::process::CommandExt as _;
    // The binary may be where nobody else can read it, so it is started from an open descriptor.
    let binary = std::fs::File::open(env!("CARGO_BIN_EXE_underpass")).expect("the binary");
    let copy = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .tempdir_in("/tmp")
        .expect("a directory");
    let path = copy.path().join("underpass");
    {
        let mut to = std::fs::File::create(&path).expect("a copy");
        std::io::copy(&mut &binary, &mut to).expect("copied");
    }
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("executable");
    let out = Command::new(&path).args(["check", "-o", "json"]).uid(65534).gid(65534).output().expect("runs");
    assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
    let row = |name: &str| report["checks"].as_array().unwrap().iter().find(|r| r["name"] == name).unwrap().clone();
    assert_eq!(row("capabilities")["state"], "missing");
    assert!(row("capabilities")["detail"].as_str().unwrap().contains("CAP_BPF"), "{}", row("capabilities"));
    assert_eq!(row("connect-hooks")["state"], "missing");
    assert!(row("connect-hooks")["remedy"].as_str().unwrap().contains("run as root"));
}

#[test]
fn check_tables_end_with_the_verdict() {
    let out = underpass(&["check"]);
    let last = text(&out.stdout).lines().last().expect("output");
    assert!(last.starts_with("The agent can"), "{last}");
    let out = underpass(&["check", "--cgroup", "/proc"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stdout).contains("The agent cannot run on this host: attach-point"), "{}", text(&out.stdout));
}

#[test]
fn help_of_every_command() {
    for command in [
        &[][..],
        &["run"],
        &["check"],
        &["status"],
        &["workloads"],
        &["services"],
        &["policies"],
        &["certificates"],
        &["connections"],
        &["top"],
        &["policy"],
        &["policy", "explain"],
        &["bpf"],
        &["bpf", "programs"],
        &["bpf", "maps"],
        &["bpf", "dump"],
        &["debug"],
        &["debug", "bundle"],
        &["cleanup"],
        &["completions"],
        &["man"],
    ] {
        let out = underpass(&[command, &["--help"]].concat());
        assert_eq!(out.status.code(), Some(0));
        assert!(out.stderr.is_empty());
        let help = text(&out.stdout);
        assert!(
            help.contains("Usage: underpass") && help.contains("Exit codes:") && help.contains("Examples:"),
            "{help}"
        );
    }
    assert_eq!(underpass(&["--version"]).stdout, format!("underpass {}\n", env!("CARGO_PKG_VERSION")).as_bytes());
}

#[test]
fn wrong_usage_is_2() {
    for args in [&[][..], &["fly"], &["run"], &["connections", "--limit", "0"], &["--log", "=,", "status"]] {
        assert_eq!(underpass(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn without_an_agent_the_remedy_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let run_dir = dir.path().to_str().expect("UTF-8");
    for command in ["status", "workloads", "services", "policies", "certificates", "connections"] {
        let out = underpass(&[command, "--run-dir", run_dir]);
        assert_eq!(out.status.code(), Some(3));
        assert!(out.stdout.is_empty());
        let error = text(&out.stderr);
        assert_eq!(
            error,
            format!(
                "error: no agent is running: nobody listens on {run_dir}/admin.sock; start it with `underpass run`, or name its directory with --run-dir\n  caused by: No such file or directory (os error 2)\n  next: `underpass bpf programs` shows what holds the pods without an agent, `underpass check` whether one can run here\n"
            )
        );
    }
}

#[test]
fn nothing_pinned_is_no_failure_unless_asked() {
    // On no bpffs at all, which is what a machine without an agent may look like.
    let dir = tempfile::tempdir().expect("a directory");
    let pins = dir.path().to_str().expect("UTF-8");
    for verb in ["programs", "maps"] {
        let out = underpass(&["bpf", verb, "--pin-root", pins]);
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        assert!(text(&out.stdout).starts_with("nothing is pinned under "), "{}", text(&out.stdout));
        let out = underpass(&["bpf", verb, "--pin-root", pins, "--check"]);
        assert_eq!(out.status.code(), Some(4));
        assert!(text(&out.stderr).starts_with("problem: nothing is pinned under "), "{}", text(&out.stderr));
    }
    assert_eq!(underpass(&["bpf", "dump", "PODS", "--pin-root", pins]).status.code(), Some(1));
}

#[test]
fn top_without_a_terminal_names_what_works() {
    let out = underpass(&["top"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("`underpass connections --watch`"), "{}", text(&out.stderr));
}

/// The shell's own parser decides whether it is a script.
#[test]
fn completions_are_scripts_with_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let out = underpass(&["completions", shell]);
        assert_eq!(out.status.code(), Some(0));
        for command in ["certificates", "bundle", "programs"] {
            assert!(text(&out.stdout).contains(command), "{shell}: {command}");
        }
    }
    let dir = tempfile::tempdir().expect("a directory");
    let script = dir.path().join("underpass.bash");
    std::fs::write(&script, underpass(&["completions", "bash"]).stdout).expect("written");
    let asked = "source \"$1\"; COMP_WORDS=(underpass certif); COMP_CWORD=1; _underpass underpass certif underpass; echo \"${COMPREPLY[@]}\"";
    let out = Command::new("bash").args(["-c", asked, "bash"]).arg(&script).output().expect("bash");
    assert_eq!(text(&out.stdout).trim(), "certificates", "{}", text(&out.stderr));
}

#[test]
fn watching_ends_when_nobody_reads() {
    let dir = tempfile::tempdir().expect("a directory");
    let script =
        "\"$1\" bpf maps --pin-root \"$2\" --watch=100ms | { read -r first; echo \"$first\"; }; exit ${PIPESTATUS[0]}";
    let out = Command::new("timeout")
        .args(["60", "bash", "-c", script, "bash", env!("CARGO_BIN_EXE_underpass")])
        .arg(dir.path())
        .output()
        .expect("bash");
    assert_eq!(out.status.code(), Some(0), "{}{}", text(&out.stdout), text(&out.stderr));
    assert_eq!(text(&out.stdout).lines().count(), 1);
}

const POLICIES: &str = r"
apiVersion: underpass.io/v1alpha1
kind: NodeConfig
node: node-a
trustDomain: cluster.local
issuer: { local: { caDir: /ca } }
workloads:
  - { name: web, namespace: shop, addresses: [10.77.0.2] }
  - { name: client, namespace: shop, serviceAccount: client, addresses: [10.77.0.3] }
policies:
  - { name: clients, namespace: shop, rules: [{ from: [{ source: { serviceAccounts: [client] } }] }] }
  - { name: custom, namespace: other, action: CUSTOM }
";

#[test]
fn policies_from_a_file_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("node.yaml");
    std::fs::write(&file, POLICIES).expect("written");
    let file = file.to_str().expect("UTF-8");
    let json = |args: &[&str]| -> serde_json::Value {
        let out = underpass(&[args, &["--config", file, "-o", "json"]].concat());
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        serde_json::from_slice(&out.stdout).expect("JSON and nothing else")
    };
    let list = json(&["policies"]);
    let states: Vec<_> = list["policies"].as_array().expect("a list").iter().map(|p| &p["status"]["state"]).collect();
    assert_eq!(states, ["invalid", "active"]);
    let explain = |who: [&str; 2], to: &str| {
        let answer = json(&["policy", "explain", who[0], who[1], "--to", to]);
        answer["explanations"][0]["allowed"].as_bool().expect("a verdict")
    };
    assert!(explain(["--from", "spiffe://cluster.local/ns/shop/sa/client"], "10.77.0.2:80"));
    assert!(!explain(["--from", "spiffe://cluster.local/ns/shop/sa/other"], "10.77.0.2:80"));
    assert!(!explain(["--plaintext-from", "10.77.0.3"], "10.77.0.2:80"));

    let out =
        underpass(&["policy", "explain", "--config", file, "--plaintext-from", "10.9.9.9", "--to", "10.77.0.2:80"]);
    assert!(text(&out.stdout).starts_with("DENIED: plaintext -> shop/web (10.77.0.2:80)\n"), "{}", text(&out.stdout));

    let failing = |args: &[&str]| {
        let out = underpass(&[&["policy", "explain", "--config", file, "--plaintext-from", "10.9.9.9"], args].concat());
        assert_eq!(out.status.code(), Some(1));
        text(&out.stderr).to_owned()
    };
    assert!(failing(&["--to", "10.9.9.8:80"]).contains("10.9.9.8 is the address of no workload"));
    assert!(failing(&["--to", "10.77.0.2:15008"]).contains("is no application's"));
    std::fs::write(file, POLICIES.replace("CUSTOM", "custom")).expect("written");
    assert!(failing(&["--to", "10.77.0.2:80"]).contains("policies[1].action: \"custom\" is not accepted"));
}
