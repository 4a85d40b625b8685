//! Arguments, help and tables.

use std::{path::Path, time::Duration};

use clap::{CommandFactory as _, Parser as _};

use super::{
    Cli, Command, cgroup, connections,
    output::{Columns, age, bytes},
    policy, status,
};
use crate::{
    admin::api::{
        AllCounters, Connections, KtlsStatus, PodState, PodStatus, ProbeCgroupState, ProbeCgroupStatus, Status,
    },
    capture::TcMode,
    mesh::{Action, EffectiveMode, InboundMode, ModeSource, PolicyStatus},
    policy::{Considered, Explanation, Explanations, Opinion, PolicyList, PolicySummary},
    relay::{ConnectionId, ConnectionInfo, DataPath, Direction},
    sources::file::ReloadStatus,
};

const HOSTILE: &str = "evil\x1b]0;title\x07\nforged line\u{202e}";

fn run_args(args: &[&str]) -> Result<super::RunArgs, String> {
    let cli = Cli::try_parse_from(["underpass", "run"].into_iter().chain(args.iter().copied()));
    match cli.map_err(|e| e.to_string())?.command {
        Command::Run(args) => Ok(*args),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_definition_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_has_help_with_exit_codes_and_examples() {
    let mut command = Cli::command();
    command.build();
    let mut seen = Vec::new();
    for sub in command.get_subcommands_mut() {
        let help = sub.render_long_help().to_string();
        for part in ["Usage: underpass ", "Exit codes: 0 ", "Examples:\n  underpass ", "--log <FILTER>", "--log-format"]
        {
            assert!(help.contains(part), "{part:?} in:\n{help}");
        }
        for argument in sub.get_arguments().filter(|a| !a.is_hide_set()) {
            assert!(argument.get_help().is_some(), "{} {} has no help", sub.get_name(), argument.get_id());
        }
        seen.push(sub.get_name().to_owned());
    }
    assert_eq!(seen, ["run", "check", "connections", "status", "policies", "policy", "cleanup"]);
}

#[test]
fn defaults_of_run() {
    assert!(run_args(&[]).unwrap_err().contains("--config <FILE>"));
    let args = run_args(&["--config", "n.yaml"]).unwrap();
    assert_eq!(args.config, Path::new("n.yaml"));
    assert_eq!(args.pin_root, Path::new("/sys/fs/bpf/underpass"));
    assert_eq!(args.state_dir, Path::new("/var/lib/underpass"));
    assert_eq!(args.run_dir, Path::new("/run/underpass"));
    assert_eq!((args.tc, args.bpf_log, args.cleanup_on_exit, args.relay_threads), (TcMode::Auto, false, false, None));
    assert_eq!((args.max_connections_per_pod, args.max_pending_per_pod), (65_536, 1024));
    assert_eq!((args.handshake_timeout, args.connect_timeout), (Duration::from_secs(10), Duration::from_secs(10)));
}

#[test]
fn values_out_of_range_are_refused() {
    for (flag, value) in [
        ("--tc", "xdp"),
        ("--relay-threads", "0"),
        ("--max-connections-per-pod", "0"),
        ("--max-pending-per-pod", "1000001"),
        ("--handshake-timeout", "10"),
        ("--handshake-timeout", "0s"),
        ("--connect-timeout", "2h"),
    ] {
        let error = run_args(&["--config", "x", flag, value]).unwrap_err();
        assert!(error.contains(flag) && error.contains(value), "{error}");
    }
    assert_eq!(
        run_args(&["--config", "x", "--connect-timeout", "1500ms"]).unwrap().connect_timeout,
        Duration::from_millis(1500)
    );
    assert!(Cli::try_parse_from(["underpass", "connections", "--limit", "100001"]).is_err());
    assert!(Cli::try_parse_from(["underpass", "connections", "--close", "1", "--limit", "5"]).is_err());
}

#[test]
fn global_options_go_anywhere() {
    let cli = Cli::try_parse_from(["underpass", "status", "--log", "debug", "--log-format", "json"]).unwrap();
    assert_eq!(cli.log, "debug");
    assert!(matches!(cli.command, Command::Status(_)));
}

#[test]
fn the_attach_point_must_be_cgroup_v2() {
    let error = format!("{:#}", cgroup::attach_point(Some(Path::new("/proc"))).unwrap_err());
    assert!(error.contains("--cgroup /proc is no cgroup v2 directory"), "{error}");
    let error = format!("{:#}", cgroup::attach_point(Some(Path::new("/nonexistent"))).unwrap_err());
    assert!(error.contains("--cgroup /nonexistent: ENOENT"), "{error}");
    let mount = cgroup::Hierarchy::find().expect("a cgroup v2 mount").mount;
    assert_eq!(cgroup::attach_point(Some(&mount)).unwrap(), mount);
}

#[test]
fn numbers_are_readable() {
    for (n, expected) in [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (u64::MAX, "16.0 EiB"),
    ] {
        assert_eq!(bytes(n), expected);
    }
    for (seconds, expected) in [(0.4, "0s"), (59.9, "59s"), (3725.0, "1h 2m"), (-1.0, "0s"), (f64::NAN, "0s")] {
        assert_eq!(age(seconds), expected);
    }
}

#[test]
fn columns_line_up_and_nothing_escapes_them() {
    let mut columns = Columns::new(&["A", "B"]);
    columns.row([HOSTILE, "x"]);
    columns.row(["y", ""]);
    let text = columns.text();
    assert_eq!(text.lines().count(), 3, "{text}");
    assert!(!text.chars().any(|c| c != '\n' && (c.is_control() || c == '\u{202e}')), "{text:?}");
    assert!(text.starts_with('A'), "{text:?}");
    assert!(text.lines().all(|l| l == l.trim_end()), "{text:?}");
}

#[test]
fn a_connection_table() {
    let connection = ConnectionInfo {
        id: ConnectionId(7),
        age_s: 61.0,
        direction: Direction::Inbound,
        workload: HOSTILE.into(),
        source_identity: None,
        destination_identity: Some("spiffe://cluster.local/ns/default/sa/web".into()),
        source: "10.0.0.1:40000".parse().unwrap(),
        original_destination: "10.96.0.1:80".parse().unwrap(),
        upstream: "10.0.0.2:15008".parse().unwrap(),
        service: Some(HOSTILE.into()),
        data_path: DataPath::Ktls,
        fallback: None,
        cipher: None,
        resumed: false,
        sent: 2048,
        received: 0,
    };
    let text = connections::table(&Connections { total: 5, connections: vec![connection] });
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    for part in [
        "7",
        "1m 1s",
        "in",
        "10.0.0.1:40000",
        "10.96.0.1:80",
        "spiffe://cluster.local/ns/default/sa/web",
        "ktls",
        "2.0 KiB",
        "0 B",
    ] {
        assert!(lines[1].contains(part), "{part} in {}", lines[1]);
    }
    assert_eq!(lines[2], "1 of 5 connections; use --limit for more");
    assert_eq!(connections::table(&Connections { total: 0, connections: vec![] }), "no connections");
}

#[test]
fn a_status_report() {
    let pod = PodStatus {
        workload: HOSTILE.into(),
        identity: "spiffe://cluster.local/ns/default/sa/web".into(),
        netns: "/run/netns/web".into(),
        pod_id: None,
        state: PodState::Refused,
        reason: Some("port 15008 in the pod is already in use by nginx (17)".into()),
        certificate: None,
    };
    let reload =
        ReloadStatus { accepted: 1, rejected: 2, from_last_good: true, error: Some("n.yaml:1:1: x\ny".into()) };
    let mut counters = AllCounters::default();
    counters.agent.refused.insert("not-tls".into(), 3);
    counters.bpf.extend([("captured".to_owned(), 9), ("guard_dropped".to_owned(), 0)]);
    let probe_cgroups = vec![ProbeCgroupStatus {
        path: "/system.slice/kubelet.service".into(),
        state: ProbeCgroupState::Missing,
        reason: None,
    }];
    let status = Status { probe_cgroups, ..Status::new(KtlsStatus::default(), vec![pod], reload) };
    let report = status::Report { status, counters };
    let text = status::table(&report);
    for part in [
        "from last good copy (1 accepted, 2 rejected)",
        "n.yaml:1:1: x\\ny",
        "/system.slice/kubelet.service (missing",
        "refused",
        "nginx (17)",
        "refused: not-tls",
        "bpf: captured",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    assert!(!text.contains("guard_dropped") && !text.contains('\x1b'), "{text}");

    let json = serde_json::to_value(&report).unwrap();
    assert_eq!((&json["data_path"], &json["pods"][0]["state"]), (&"user".into(), &"refused".into()));
    assert_eq!(json["counters"]["agent"]["refused"]["not-tls"], 3);
    let yaml = serde_saphyr::to_string(&report).unwrap();
    let back: serde_json::Value = serde_saphyr::from_str(&yaml).unwrap();
    assert_eq!(back["pods"][0]["workload"], HOSTILE);
}

#[test]
fn who_connects_is_one_of_two() {
    let explain = |args: &[&str]| {
        let all = ["underpass", "policy", "explain", "--to", "10.0.0.1:80"].into_iter().chain(args.iter().copied());
        Cli::try_parse_from(all).map(drop).map_err(|e| e.to_string())
    };
    let id = "spiffe://td/ns/a/sa/b";
    explain(&["--from", id]).unwrap();
    explain(&["--from", id, "--source-ip", "fd00::1", "--config", "n.yaml"]).unwrap();
    explain(&["--plaintext-from", "10.0.0.2"]).unwrap();
    for wrong in [
        &[][..],
        &["--from", id, "--plaintext-from", "10.0.0.2"],
        &["--plaintext-from", "10.0.0.2", "--source-ip", "10.0.0.3"],
        &["--from", "td/ns/a/sa/b"],
        &["--plaintext-from", "10.0.0.2:80"],
    ] {
        assert!(explain(wrong).is_err(), "{wrong:?}");
    }
    let error = explain(&["--from", "web\x1b[2J"]).unwrap_err();
    assert!(error.contains("is not of the form spiffe://") && !error.contains('\x1b'), "{error:?}");
}

#[test]
fn policies_for_people() {
    let summary = |name: &str, status| PolicySummary {
        name: name.into(),
        scope: "namespace".into(),
        action: Action::Deny,
        dry_run: true,
        rules: 2,
        workloads: 7,
        local_workloads: 3,
        status,
    };
    let list = PolicyList {
        policies: vec![
            summary("a/one", PolicyStatus::Active),
            summary("a/two", PolicyStatus::Partial { ignored: vec!["hosts".into(), "paths".into()] }),
            summary("a/three", PolicyStatus::Invalid { reason: HOSTILE.into() }),
        ],
    };
    let text = policy::table(&list);
    assert_eq!(text.lines().count(), 4, "{text}");
    for part in ["a/one", "namespace", "DENY", "yes", "7 (3)", "active", "not evaluated: hosts, paths", "invalid"] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    assert!(!text.chars().any(|c| c != '\n' && (c.is_control() || c == '\u{202e}')), "{text:?}");
    assert!(policy::table(&PolicyList { policies: vec![] }).starts_with("no policies: "));
}

#[test]
fn an_explanation_for_people() {
    let opinion = |allowed, reason: &str| Opinion { allowed, reason: reason.into(), decided_by: None };
    let considered = Considered {
        policy: "shop/clients".into(),
        scope: None,
        action: None,
        dry_run: false,
        matches: false,
        rule: None,
        because: HOSTILE.into(),
    };
    let explanation = Explanation {
        from: None,
        source: "192.0.2.7".parse().unwrap(),
        source_of: None,
        to: "[fd00::2]:8080".parse().unwrap(),
        workload: HOSTILE.into(),
        node: "node-a".into(),
        allowed: false,
        reason: "mode strict (set for the namespace) refuses plaintext".into(),
        decided_by: None,
        mode: EffectiveMode { mode: InboundMode::Strict, set_by: ModeSource::Namespace },
        policy: opinion(true, "nothing denies"),
        dry_run: Some(opinion(false, "DENY policy a/b, rules[0]")),
        considered: vec![considered],
    };
    let answer = Explanations {
        service: Some("web.shop.svc.cluster.local".into()),
        explanations: vec![explanation],
        endpoints_left_out: 3,
    };
    let text = policy::text(&answer);
    for part in [
        "service web.shop.svc.cluster.local: 4 endpoints\n",
        "DENIED: plaintext -> ",
        "([fd00::2]:8080)\n",
        "  because    mode strict (set for the namespace) refuses plaintext\n",
        "  policies   allowed: nothing denies\n",
        "  dry run    with the dry-run policies denied: DENY policy a/b, rules[0]\n",
        "  shop/clients",
        "and 3 more endpoints",
    ] {
        assert!(text.contains(part), "{part:?} in\n{text}");
    }
    assert!(!text.chars().any(|c| c != '\n' && (c.is_control() || c == '\u{202e}')), "{text:?}");
    let json: Explanations = serde_json::from_str(&serde_json::to_string(&answer).unwrap()).unwrap();
    assert_eq!(json, answer);
}
