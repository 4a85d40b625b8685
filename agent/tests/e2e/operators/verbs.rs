//! What verbs print of a live agent, and that of a dead one they say what to do.

use std::{
    collections::BTreeSet, fs, os::unix::fs::PermissionsExt as _, os::unix::process::CommandExt as _, process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use expect_test::expect;
use serde_json::Value;
use testbed::{Process, underpass_path};

use super::{SOON, command, json, printed, redacted, run};
use crate::world::{Stage, World, at, eventually, serve};

/// Those that ask an agent.
const VERBS: [&str; 6] = ["status", "workloads", "services", "policies", "certificates", "connections"];

/// A connection that stays, from the client to the service; the number of it at the client's agent.
fn hold(world: &World) -> Result<(Process, Process)> {
    let echo = serve(&world.server, 8080, &[])?;
    let [vip, _] = testbed::addresses::vips(1);
    let live = world.client.app(&["expect-reset", &at(vip, 80)])?;
    live.wait_json("established", Duration::from_secs(10))?;
    Ok((echo, live))
}

#[test]
fn tables_of_a_live_agent() -> Result<()> {
    let mut stage = Stage::new("verbs")?;
    let legacy = stage.bed.node("b").pod("legacy")?;
    stage.mesh.plain(&legacy);
    stage.mesh.workload("client").mode = Some(testbed::Mode::Strict);
    stage.mesh.policies.push(serde_json::from_value(serde_json::json!({
        "name": "clients", "namespace": "default",
        "rules": [{ "from": [{ "source": { "principals": ["cluster.local/ns/default/sa/client"] } }] }]
    }))?);
    let world = stage.start()?;
    let _held = hold(&world)?;
    let table = |arguments: &[&str]| Ok::<_, anyhow::Error>(redacted(&printed(&world.a, arguments)?));

    expect![[r"
        WORKLOAD  STATE  NODE  ADDRESSES  PROTOCOL  MODE  IDENTITY
        default/client  enrolled  a  10.77.1.10, fd77:1::a  underpass  strict  spiffe://cluster.local/ns/default/sa/client
        default/legacy  -  b  10.77.2.11, fd77:2::b  plain  permissive  spiffe://cluster.local/ns/default/sa/legacy
        default/server  -  b  10.77.2.10, fd77:2::a  underpass  permissive  spiffe://cluster.local/ns/default/sa/server
    "]].assert_eq(&table(&["workloads"])?);
    expect![[r"
        WORKLOAD  STATE  NODE  ADDRESSES  PROTOCOL  MODE  IDENTITY  POD  MODE SET BY  PORT MODES  REASON
        default/client  enrolled  a  10.77.1.10, fd77:1::a  underpass  strict  spiffe://cluster.local/ns/default/sa/client  1  workload  -  -
        default/legacy  -  b  10.77.2.11, fd77:2::b  plain  permissive  spiffe://cluster.local/ns/default/sa/legacy  -  workload  -  -
        default/server  -  b  10.77.2.10, fd77:2::a  underpass  permissive  spiffe://cluster.local/ns/default/sa/server  -  mesh  -  -
    "]].assert_eq(&table(&["workloads", "-o", "wide"])?);
    expect![[r"
        SERVICE  HOSTNAME  VIPS  PORTS  ENDPOINTS
        default/web  web.default.svc.cluster.local  10.96.0.1, fd96::1  80:8080  1
    "]]
    .assert_eq(&table(&["services"])?);
    expect![[r"
        SERVICE  HOSTNAME  VIPS  PORTS  ENDPOINTS  WORKLOADS
        default/web  web.default.svc.cluster.local  10.96.0.1, fd96::1  80:8080  1  default/server
    "]]
    .assert_eq(&table(&["services", "-o", "wide"])?);
    expect![[r"
        NAME  SCOPE  ACTION  DRY RUN  RULES  WORKLOADS  STATUS  DETAIL
        default/clients  namespace  ALLOW  -  1  3 (1)  active  -
    "]]
    .assert_eq(&table(&["policies"])?);
    expect![[r"
        trust domain cluster.local, certificates from local

        IDENTITY  STATE  VALID UNTIL  LEFT  ISSUER  SERIAL
        spiffe://cluster.local/ns/default/sa/client  valid  [time]  [age]  O=Underpass local CA, CN=cluster.local [root]  [hex]
    "]].assert_eq(&table(&["certificates"])?);
    expect![[r"
        trust domain cluster.local, certificates from local

        IDENTITY  STATE  VALID UNTIL  LEFT  ISSUER  SERIAL  WORKLOADS  VALID FROM  KEY  CHAIN  ROOTS
        spiffe://cluster.local/ns/default/sa/client  valid  [time]  [age]  O=Underpass local CA, CN=cluster.local [root]  [hex]  default/client  [time]  ECDSA 256  1  O=Underpass local CA, CN=cluster.local [root]
    "]].assert_eq(&table(&["certificates", "-o", "wide"])?);
    expect![[r"
        ID  AGE  WAY  WORKLOAD  CLIENT  DESTINATION  CLIENT IDENTITY  SERVER IDENTITY  PATH  SENT  RECEIVED
        1  [age]  out  default/client  127.0.0.1:[port]  10.96.0.1:80  spiffe://cluster.local/ns/default/sa/client  spiffe://cluster.local/ns/default/sa/server  [path]  17 B  17 B
    "]].assert_eq(&table(&["connections"])?);
    expect![[r"
        ID  AGE  WAY  WORKLOAD  CLIENT  DESTINATION  CLIENT IDENTITY  SERVER IDENTITY  PATH  SENT  RECEIVED  SERVICE  UPSTREAM  CIPHER  RESUMED
        1  [age]  out  default/client  127.0.0.1:[port]  10.96.0.1:80  spiffe://cluster.local/ns/default/sa/client  spiffe://cluster.local/ns/default/sa/server  [path]  17 B  17 B  web.default.svc.cluster.local  10.77.2.10:15008  TLS13_AES_128_GCM_SHA256  -
    "]].assert_eq(&table(&["connections", "-o", "wide"])?);
    // What the kernel can do stands in its first lines, and what was counted in its last ones.
    let status = table(&["status"])?;
    let parts: Vec<_> = status.split("\n\n").collect();
    ensure!(parts.len() == 3 && parts[0].contains("trust domain  cluster.local"), "{status}");
    expect![[r"
        WORKLOAD  STATE  POD  IDENTITY  CERTIFICATE UNTIL  REASON
        default/client  enrolled  1  spiffe://cluster.local/ns/default/sa/client  [time]  -"]]
    .assert_eq(parts[1]);
    ensure!(parts[2].contains("tunnels out  1\n"), "{status}");
    Ok(())
}

#[test]
fn documents_are_the_same_in_json_and_yaml() -> Result<()> {
    let world = World::new("docs")?;
    let _held = hold(&world)?;
    for verb in ["workloads", "services", "policies", "certificates"] {
        let yaml: Value = serde_saphyr::from_str(&printed(&world.a, &[verb, "-o", "yaml"])?)?;
        ensure!(yaml == json(&world.a, &[verb])?, "{verb}: {yaml}");
    }
    // Ages and counters move.
    for (verb, field) in [("status", "pods"), ("connections", "total")] {
        let yaml: Value = serde_saphyr::from_str(&printed(&world.a, &[verb, "-o", "yaml"])?)?;
        ensure!(!yaml[field].is_null() && yaml[field] == json(&world.a, &[verb])?[field], "{verb}: {yaml}");
    }
    let certificates = json(&world.a, &["certificates"])?;
    let details = &certificates["certificates"][0]["certificate"];
    ensure!(details["serial"].as_str().is_some_and(|s| s.len() > 8), "{certificates}");
    ensure!(details["issuer"] == details["roots"][0], "{certificates}");
    Ok(())
}

#[test]
fn connections_are_selected_by_the_agent() -> Result<()> {
    let world = World::new("select")?;
    let _held = hold(&world)?;
    for (filter, expected) in [
        (&["--workload", "default/client"][..], 1),
        (&["--workload", "client", "--direction", "outbound"], 1),
        (&["--workload", "default/", "--identity", "ns/default/sa/server"], 1),
        (&["--identity", "spiffe://cluster.local/ns/default/sa/client", "--sort", "bytes", "--limit", "1"], 1),
        (&["--workload", "default/server"], 0),
        (&["--identity", "lient"], 0),
        (&["--direction", "inbound"], 0),
        (&["--data-path", "plain"], 0),
    ] {
        let all = json(&world.a, &[&["connections"], filter].concat())?;
        ensure!(all["total"] == expected, "{filter:?}: {all}");
        ensure!(all["connections"].as_array().map(Vec::len) == Some(expected), "{filter:?}: {all}");
    }
    let (code, _, stderr) = run(&world.a, &["connections", "--close", "999999"])?;
    ensure!(code == 1 && stderr.contains("next: `underpass connections`"), "{code} {stderr}");
    Ok(())
}

#[test]
fn check_is_for_scripts() -> Result<()> {
    let world = World::new("check")?;
    for verb in VERBS {
        let (code, _, stderr) = run(&world.a, &[verb, "--check"])?;
        ensure!(code == 0 && stderr.is_empty(), "{verb}: {code} {stderr}");
    }
    let (code, _, stderr) = run(&world.a, &["certificates", "--check", "--expires-within", "2h"])?;
    ensure!(code == 4 && stderr.matches("problem: the certificate of").count() == 1, "{code} {stderr}");
    world.a.write_config("workloads: [{ nmae: x }]")?;
    world.a.wait_status(SOON, |s| Ok(s["reload"]["rejected"].as_u64() >= Some(1)))?;
    let (code, stdout, stderr) = run(&world.a, &["status", "--check", "-o", "json"])?;
    ensure!(code == 4 && stderr.starts_with("problem: the configuration was not accepted: "), "{code} {stderr}");
    serde_json::from_str::<Value>(&stdout).context("the document is whole all the same")?;
    Ok(())
}

#[test]
fn watching_goes_on_while_the_agent_restarts() -> Result<()> {
    let mut world = World::new("watch")?;
    let mut watching = command(&world.a, &["connections", "-o", "json", "--watch=200ms"])?;
    let watching = Process::spawn(&mut watching)?;
    let lines = watching.wait_stdout(2, SOON)?;
    for line in &lines {
        ensure!(serde_json::from_str::<Value>(line)?["total"] == 0, "{line}");
    }
    let held = hold(&world)?;
    watching.wait_line("\"workload\":\"default/client\"", SOON)?;
    drop(held);
    world.a.kill()?;
    watching.wait_line("error: no agent is running", SOON)?;
    world.a.restart()?;
    let seen = watching.text(testbed::Stream::Stdout).lines().count();
    watching.wait_stdout(seen + 2, SOON)?;
    ensure!(watching.status().is_none(), "it ended: {}", watching.text(testbed::Stream::Stderr));
    Ok(())
}

#[test]
fn a_dead_agent_is_3_and_what_to_do() -> Result<()> {
    let mut world = World::new("dead")?;
    world.a.kill()?;
    let mut said = BTreeSet::new();
    for verb in VERBS {
        for format in ["table", "wide", "json", "yaml"] {
            let (code, stdout, stderr) = run(&world.a, &[verb, "-o", format])?;
            ensure!(code == 3 && stdout.is_empty(), "{verb}: {code} {stdout}");
            said.insert(stderr.replace(&*world.a.run_dir()?.to_string_lossy(), "[run-dir]"));
        }
    }
    ensure!(said.len() == 1, "{said:?}");
    expect![[r"
        error: no agent is running: nobody listens on [run-dir]/admin.sock; start it with `underpass run`, or name its directory with --run-dir
          caused by: Connection refused (os error 111)
          next: `underpass bpf programs` shows what holds the pods without an agent, `underpass check` whether one can run here
    "]].assert_eq(said.first().context("something")?);
    let (code, _, stderr) =
        run(&world.a, &["policy", "explain", "--plaintext-from", "10.0.0.1", "--to", "10.0.0.2:80"])?;
    ensure!(code == 3 && stderr.contains("next: "), "{code} {stderr}");
    Ok(())
}

/// Neither the socket's mode nor bpffs lets them; they are told so.
#[test]
fn other_users_are_refused() -> Result<()> {
    const NOBODY: u32 = 65534;
    let world = World::new("nobody")?;
    // Where nobody may start it.
    let dir = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir_in("/tmp")?;
    let binary = dir.path().join("underpass");
    fs::copy(underpass_path()?, &binary)?;
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755))?;
    let socket = world.a.run_dir()?.join("admin.sock");
    let (socket, pins) = (socket.to_str().context("UTF-8")?, world.a.pin_root());
    let pins = pins.to_str().context("UTF-8")?;
    for (arguments, expected) in [
        (&["status", "--socket", socket][..], 3),
        (&["connections", "--close", "1", "--socket", socket], 3),
        (&["bpf", "programs", "--pin-root", pins], 1),
        (&["bpf", "dump", "PODS", "--pin-root", pins], 1),
    ] {
        let ask = |uid| Process::spawn(Command::new(&binary).args(arguments).uid(uid).gid(uid))?.output(SOON);
        let refused = ask(NOBODY)?;
        let text = &refused.stderr;
        ensure!(refused.status.code() == Some(expected) && refused.stdout.is_empty(), "{arguments:?}: {refused:?}");
        ensure!(text.contains("Permission denied") && text.contains("next: the same command as root"), "{text}");
        if arguments[0] != "connections" {
            ensure!(ask(0)?.status.success(), "{arguments:?} is what is refused, not nobody");
        }
    }
    eventually(SOON, || {
        ensure!(json(&world.a, &["status"])?["pods"].as_array().map(Vec::len) == Some(1));
        Ok(())
    })
}
