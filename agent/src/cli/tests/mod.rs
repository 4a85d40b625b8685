//! Arguments, help and tables.

mod samples;
mod tables;
mod views;

use std::{path::Path, time::Duration};

use clap::{CommandFactory as _, Parser as _};

use super::{Cli, Command, cgroup, exit, generate};
use crate::{admin::client::ClientError, capture::TcMode};

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
    let all = [
        "run",
        "ca",
        "check",
        "status",
        "workloads",
        "services",
        "policies",
        "certificates",
        "connections",
        "top",
        "policy",
        "bpf",
        "debug",
        "cleanup",
        "self-test",
        "uninstall",
        "completions",
        "man",
    ];
    assert_eq!(seen, all);
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

fn ca_settings(args: &[&str]) -> Result<crate::ca::Settings, String> {
    let cli = Cli::try_parse_from(["underpass", "ca"].into_iter().chain(args.iter().copied()));
    match cli.map_err(|e| e.to_string())?.command {
        Command::Ca(args) => args.settings("mesh").map_err(|e| format!("{e:#}")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn settings_of_ca() {
    use crate::ca::{RootSource, ServiceAccount};
    let settings = ca_settings(&[]).unwrap();
    let agent = |namespace: &str, name: &str| ServiceAccount { namespace: namespace.into(), name: name.into() };
    assert_eq!(settings.agents, [agent("mesh", "underpass")]);
    assert_eq!(settings.root, RootSource::Managed { secret: "underpass-ca".into() });
    assert_eq!((settings.audience.as_str(), settings.lifetime), ("underpass-ca", Duration::from_hours(24)));
    assert_eq!(settings.dns_names[2], "underpass-ca.mesh.svc");
    assert_eq!(settings.publish_to, ["mesh"]);

    let settings =
        ca_settings(&["--agent", "a", "--agent", "b/c", "--issuer-secret", "s", "--namespace", "n"]).unwrap();
    assert_eq!(settings.agents, [agent("n", "a"), agent("b", "c")]);
    assert_eq!(settings.root, RootSource::Foreign { secret: "s".into() });
    for (args, expected) in [
        (&["--agent", "a/b/c"][..], "--agent \"a/b/c\""),
        (&["--lifetime", "1s"], "2s to 100years"),
        (&["--lifetime", "200days"], "three times --lifetime"),
        (&["--root-lifetime", "300days"], "--root-lifetime"),
        (&["--issuer-secret", "s", "--issuer-dir", "/d"], "cannot be used with"),
        (&["--issuer-secret", "s", "--root-secret", "r"], "cannot be used with"),
        (&["--dns-name", "a_b"], "--dns-name"),
        (&["--audience", ""], "--audience is empty"),
        (&["--trust-domain", "A"], "trust domain"),
        (&["--rate-per-node", "0"], "--rate-per-node"),
    ] {
        let error = ca_settings(args).unwrap_err();
        assert!(error.contains(expected), "{args:?}: {error}");
    }
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
    for wrong in [
        &["connections", "--close", "1", "--limit", "5"][..],
        &["connections", "--close", "1", "--watch"],
        &["connections", "--direction", "up"],
        &["connections", "--data-path", "tls"],
        &["connections", "--sort", "age"],
        &["status", "--watch=10"],
        &["status", "--watch=50ms"],
        &["status", "--watch", "--check"],
        &["certificates", "--expires-within", "1h"],
        &["bpf", "dump"],
        &["bpf", "dump", "PODS", "--limit", "0"],
        &["top", "--interval", "2h"],
        &["man"],
        &["completions", "csh"],
    ] {
        assert!(Cli::try_parse_from(["underpass"].iter().chain(wrong)).is_err(), "{wrong:?}");
    }
    for right in [&["status", "--watch"][..], &["status", "--watch=500ms", "-o", "wide"], &["bpf", "maps", "-w"]] {
        Cli::try_parse_from(["underpass"].iter().chain(right)).unwrap();
    }
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

/// `UNDERPASS_UPDATE_DOCS=1 cargo test the_reference` brings it up to date.
#[test]
fn the_reference_is_current() {
    let reference = generate::reference();
    if std::env::var_os("UNDERPASS_UPDATE_DOCS").is_some() {
        std::fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cli.md"), &reference).unwrap();
        return;
    }
    // Compiled in, because tests also run on machines without the sources.
    let written = include_str!("../../../../docs/cli.md");
    let different = reference.lines().zip(written.lines()).find(|(new, old)| new != old);
    assert!(
        reference == written,
        "docs/cli.md is not what the program says now, first at {different:?}; write it with \
         UNDERPASS_UPDATE_DOCS=1 cargo test -p underpass --lib the_reference"
    );
    for command in ["underpass bpf dump", "underpass debug bundle", "underpass policy explain"] {
        assert!(reference.contains(&format!("# {command}\n")), "{command}");
    }
}

#[test]
fn every_command_has_a_man_page() {
    let dir = tempfile::tempdir().unwrap();
    let cli = Cli::try_parse_from(["underpass", "man", "--dir", dir.path().to_str().unwrap()]).unwrap();
    let Command::Man(args) = cli.command else { panic!("{:?}", cli.command) };
    generate::man(&args).unwrap();
    for name in ["underpass", "underpass-status", "underpass-bpf-dump", "underpass-debug-bundle"] {
        let page = std::fs::read_to_string(dir.path().join(format!("{name}.1"))).unwrap();
        assert!(page.contains(".TH") && page.contains("SYNOPSIS"), "{name}: {page}");
    }
}

#[test]
fn errors_have_a_code_and_a_next_step() {
    let path = || "/run/x/admin.sock".into();
    let io = |kind: std::io::ErrorKind| std::io::Error::from(kind);
    let denied = || std::io::Error::from_raw_os_error(13);
    for (error, code, next) in [
        (
            ClientError::NotRunning { path: path(), source: io(std::io::ErrorKind::NotFound) },
            3,
            "underpass bpf programs",
        ),
        (ClientError::Connect { path: path(), source: denied() }, 3, "as root"),
        (ClientError::Timeout { path: path() }, 3, "underpass debug bundle"),
        (ClientError::Refused { status: 404, error: "no".into() }, 1, "underpass connections"),
        (ClientError::Answer { path: path(), reason: "x".into() }, 1, "underpass --version"),
    ] {
        let error = anyhow::Error::from(error);
        assert_eq!(exit::code(&error), code.into(), "{error}");
        let message = exit::message(&error);
        let last = message.lines().last().unwrap();
        assert!(last.starts_with("  next: ") && last.contains(next), "{message}");
    }
    let denied = anyhow::Error::from(denied()).context("reading map PODS");
    assert!(exit::message(&denied).contains("next: the same command as root"));
    let long = anyhow::anyhow!("a\x1b[2J{}\n{}", "x".repeat(64 * 1024), "line\n".repeat(10_000));
    let message = exit::message(&long);
    assert!(message.len() < 64 * 1024 && !message.contains('\x1b'), "{} bytes", message.len());
}
