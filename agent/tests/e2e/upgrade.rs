//! One agent follows another.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use testbed::{
    Agent, AgentOptions, Process,
    pace::{patience, scaled},
    underpass_path,
};

use crate::world::{MARKER, Stage, World, app, app_error, assert_encrypted, at, serve, sniff, start_agent};

const SOON: Duration = Duration::from_mins(1);

/// A world whose agents keep connections after SIGTERM for some time, and leave their pins.
fn world(label: &str, drain: &str) -> Result<World> {
    let stage = Stage::new(label)?;
    let options = || AgentOptions {
        cleanup_on_exit: false,
        arguments: vec!["--drain-timeout".to_owned(), drain.to_owned()],
        ..AgentOptions::default()
    };
    let start = |name| {
        let node = stage.bed.node(name);
        Agent::start(node, &underpass_path()?, &stage.mesh.document(node), options())
    };
    let (a, b) = (start("a")?, start("b")?);
    Ok(World { a, b, client: stage.client, server: stage.server, mesh: stage.mesh, bed: stage.bed })
}

/// Ends the agent that was followed, and waits for it.
fn end(old: &Process) -> Result<()> {
    old.signal(Signal::SIGTERM)?;
    let status = old.wait(SOON)?;
    ensure!(status.success(), "the old agent ended with {status}");
    Ok(())
}

#[test]
fn no_new_connection_is_lost_and_live_ones_go_on() -> Result<()> {
    let mut world = world("upgrade", "20s")?;
    let _echo = serve(&world.server, 8080, &[])?;
    let _vip = serve(&world.server, 8081, &[])?;
    let to = at(world.server.ipv4(), 8080);
    let sniffer = sniff(&world.bed)?;
    app(&world.client, &["request", &to, "--line", MARKER])?;
    let live = world.client.app(&["hold", &to, "--count", "20", "--exchange"])?;
    ensure!(live.wait_json("held", SOON)?["held"] == 20);
    // An emulated processor does not manage 200 handshakes a second.
    let (rate, limit) = (scaled(200).to_string(), patience(Duration::from_secs(10)).as_secs().to_string());
    let steady = world.client.app(&["steady", &to, "--rate", &rate, "--timeout", &limit])?;
    steady.wait_json("first", SOON)?;

    // Both sides are upgraded under load, several times: one upgrade takes a tenth of a second.
    let mut old = Vec::new();
    for _ in 0..3 {
        old.push(world.a.replace()?);
        old.push(world.b.replace()?);
    }
    let report = steady.output(SOON)?.last_json()?;
    ensure!(report["failed"] == 0 && report["ok"].as_u64() > Some(5), "{report}");
    eprintln!("new connections during six upgrades: {report}");

    // The old ones keep what is theirs, also while they are told to end.
    for old in &old {
        ensure!(old.status().is_none(), "it has ended");
        old.signal(Signal::SIGTERM)?;
    }
    app(&world.client, &["request", &to])?;
    let output = live.output(SOON)?.last_json()?;
    ensure!(output["alive"] == 20, "live connections were cut: {output}");
    for old in old {
        let status = old.wait(SOON)?;
        ensure!(status.success(), "the old agent ended with {status}");
    }
    // Nothing of the new agents' was removed with them.
    app(&world.client, &["request", &to, "--line", MARKER])?;
    assert_encrypted(&sniffer.stop()?)?;
    let rules = world.server.check(&["ip", "rule"])?;
    ensure!(rules.contains("0x539"), "the reply rule went with the old agent: {rules}");
    world.mesh.workload("server").mode = Some(testbed::Mode::Strict);
    world.reload()?;
    app(&world.client, &["request", &to]).map(drop)
}

#[test]
fn a_policy_that_comes_later_also_ends_connections_that_the_old_agent_keeps() -> Result<()> {
    let mut world = world("upolicy", "20s")?;
    let _echo = serve(&world.server, 8080, &[])?;
    let to = at(world.server.ipv4(), 8080);
    let live = world.client.app(&["expect-reset", &to])?;
    live.wait_json("established", SOON)?;
    let old = world.b.replace()?;
    world.mesh.policies.push(serde_json::json!({
        "name": "nobody", "namespace": "default", "action": "DENY", "rules": [{}],
    }));
    world.reload()?;
    let output = live.output(SOON)?;
    ensure!(output.status.success(), "the connection goes on: {}", output.stdout);
    end(&old)
}

#[test]
fn an_agent_that_ends_waits_for_its_connections_no_longer_than_it_was_told() -> Result<()> {
    let mut world = world("drain", "3s")?;
    let _echo = serve(&world.server, 8080, &[])?;
    let to = at(world.server.ipv4(), 8080);
    let short = world.client.app(&["hold", &to, "--count", "1", "--exchange"])?;
    short.wait_json("held", SOON)?;
    world.a.process()?.signal(Signal::SIGTERM)?;
    world.a.wait_log("SIGTERM", SOON)?;
    // Nobody took over: it goes on as before until the last connection has ended.
    app(&world.client, &["request", &to])?;
    ensure!(short.output(SOON)?.last_json()?["alive"] == 1, "the connection was cut at once");
    ensure!(world.a.process()?.wait(SOON)?.success());
    ensure!(app_error(&world.client, &["request", &to, "--timeout", "5"])? == "ECONNREFUSED");

    world.a.restart()?;
    let long = world.client.app(&["expect-reset", &to])?;
    long.wait_json("established", SOON)?;
    world.a.stop()?;
    ensure!(long.output(SOON)?.status.success(), "a connection that lasts longer is reset");
    Ok(())
}

#[test]
fn an_agent_whose_successor_is_gone_ends_so_that_it_is_started_again() -> Result<()> {
    let mut world = world("orphan", "1s")?;
    let _echo = serve(&world.server, 8080, &[])?;
    let to = at(world.server.ipv4(), 8080);
    let old = world.a.replace()?;
    world.a.kill()?;
    let status = old.wait(SOON)?;
    ensure!(!status.success(), "the supervisor has to see a failure");
    ensure!(app_error(&world.client, &["request", &to, "--timeout", "5"])? == "ECONNREFUSED", "fails closed");
    world.a.restart()?;
    app(&world.client, &["request", &to]).map(drop)
}

#[test]
fn without_the_option_a_second_agent_is_refused_and_changes_nothing() -> Result<()> {
    let stage = Stage::new("second")?;
    let _echo = serve(&stage.server, 8080, &[])?;
    let to = at(stage.server.ipv4(), 8080);
    let (a, _b) =
        (start_agent(&stage.mesh, stage.bed.node("a"), &[])?, start_agent(&stage.mesh, stage.bed.node("b"), &[])?);
    let mut command = stage.bed.node("a").command(underpass_path()?);
    command.args(["run", "--admin-addr", "off", "--metrics-addr", "off", "--health-addr", "off", "--cgroup"]);
    command.arg(stage.bed.node("a").pods_cgroup()).arg("--pin-root").arg(a.pin_root());
    command.arg("--config").arg(stage.bed.node("a").dir("agent")?.join("node.yaml"));
    command.arg("--state-dir").arg(a.state_dir()?).arg("--run-dir").arg(a.run_dir()?);
    let output = Process::spawn(&mut command)?.output(SOON)?;
    ensure!(!output.status.success() && output.stderr.contains("owns it; stop that first"), "{}", output.stderr);
    app(&stage.client, &["request", &to]).map(drop).context("the first agent goes on")
}
