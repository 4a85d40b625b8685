//! Enrolling, un-enrolling, restarts, and what is left behind.

use std::time::Duration;

use anyhow::{Result, ensure};
use testbed::{Agent, AgentOptions, Testbed, underpass_path};

use crate::world::{
    MARKER, Stage, World, app, app_error, assert_encrypted, assert_plaintext_seen, at, serve, sniff, start_agent,
};

#[test]
fn open_connections_survive_enrolment_and_un_enrolment() -> Result<()> {
    let stage = Stage::new("open")?;
    let _echo = serve(&stage.server, 8080, &[])?;
    let to = at(stage.server.ipv4(), 8080);
    let plain = stage.client.app(&["hold", &to, "--count", "3", "--exchange"])?;
    ensure!(plain.wait_json("held", Duration::from_secs(20))?["held"] == 3);
    let mut world = stage.start()?;
    let tunnelled = world.client.app(&["hold", &to, "--count", "3", "--exchange"])?;
    ensure!(tunnelled.wait_json("held", Duration::from_secs(20))?["held"] == 3);
    ensure!(plain.output(Duration::from_secs(20))?.last_json()?["alive"] == 3, "plain connections died at enrolment");
    // Both pods leave the mesh; what is open goes on, what is new is plain.
    for name in ["client", "server"] {
        world.mesh.workload(name).enroll = None;
        world.mesh.workload(name).protocol = testbed::Protocol::Plain;
    }
    world.reload()?;
    for agent in [&world.a, &world.b] {
        agent.wait_status(Duration::from_secs(10), |s| Ok(s["pods"].as_array().is_some_and(Vec::is_empty)))?;
    }
    let sniffer = world.sniff()?;
    app(&world.client, &["request", &to, "--line", MARKER])?;
    assert_plaintext_seen(&sniffer.stop()?)?;
    ensure!(
        tunnelled.output(Duration::from_secs(20))?.last_json()?["alive"] == 3,
        "tunnelled connections died at un-enrolment"
    );
    Ok(())
}

#[test]
fn invalid_configuration_keeps_the_old_one_and_a_restart_uses_the_last_good() -> Result<()> {
    let mut stage = Stage::new("lastgood")?;
    let _echo = serve(&stage.server, 8080, &[])?;
    let to = at(stage.server.ipv4(), 8080);
    let b = start_agent(&stage.mesh, stage.bed.node("b"), &[])?;
    let options = AgentOptions { cleanup_on_exit: false, ..AgentOptions::default() };
    let node = stage.bed.node("a").clone();
    let mut a = Agent::start(&node, &underpass_path()?, &stage.mesh.document(&node), options)?;
    a.write_config("workloads: [{ nmae: x }]")?;
    a.wait_status(Duration::from_secs(10), |s| Ok(s["reload"]["rejected"].as_u64() >= Some(1)))?;
    app(&stage.client, &["request", &to])?;
    a.stop()?;
    // Stopped without --cleanup-on-exit: fail closed.
    let error = app_error(&stage.client, &["request", &to, "--timeout", "5"])?;
    ensure!(error == "ECONNREFUSED", "{error}");
    a.restart()?;
    ensure!(a.log().contains("last good"), "the log does not say that an old configuration is used:\n{}", a.log());
    app(&stage.client, &["request", &to])?;
    stage.mesh.workloads.clear();
    drop((a, b));
    Ok(())
}

#[test]
fn a_restarted_agent_takes_over_without_a_moment_of_plaintext() -> Result<()> {
    let stage = Stage::new("restart")?;
    let _echo = serve(&stage.server, 8080, &[])?;
    let to = at(stage.server.ipv4(), 8080);
    let node = stage.bed.node("a").clone();
    let _b = start_agent(&stage.mesh, stage.bed.node("b"), &[])?;
    let options = AgentOptions { cleanup_on_exit: false, ..AgentOptions::default() };
    let mut a = Agent::start(&node, &underpass_path()?, &stage.mesh.document(&node), options)?;
    let sniffer = sniff(&stage.bed)?;
    for round in 0..3 {
        app(&stage.client, &["request", &to, "--line", MARKER])?;
        let live = stage.client.app(&["expect-reset", &to])?;
        live.wait_json("established", Duration::from_secs(10))?;
        if round % 2 == 0 {
            a.kill()?;
        } else {
            a.stop()?;
        }
        let output = live.output(Duration::from_secs(10))?;
        ensure!(output.status.success(), "a live connection did not see a reset: {}", output.stdout);
        // No agent: new connections are refused, also while programs keep trying.
        for _ in 0..20 {
            let error = app_error(&stage.client, &["request", &to, "--line", MARKER, "--timeout", "5"])?;
            ensure!(error == "ECONNREFUSED", "{error}");
        }
        a.restart()?;
    }
    app(&stage.client, &["request", &to, "--line", MARKER])?;
    assert_encrypted(&sniffer.stop()?)
}

#[test]
fn nothing_is_left_behind_also_by_a_killed_agent() -> Result<()> {
    let mut world = World::new("left")?;
    let echo = serve(&world.server, 8080, &[])?;
    app(&world.client, &["request", &at(world.server.ipv4(), 8080)])?;
    let rules = |world: &World| world.server.check(&["ip", "rule"]);
    ensure!(rules(&world)?.contains("0x539"), "no reply rule while enrolled?");
    // A stop with --cleanup-on-exit (the default here) gives everything back by itself.
    world.b.stop()?;
    ensure!(!rules(&world)?.contains("0x539"), "{}", rules(&world)?);
    ensure!(!world.b.pin_root().exists(), "pins are left in {}", world.b.pin_root().display());
    world.a.kill()?;
    ensure!(world.a.pin_root().exists(), "a killed agent's pins must stay");
    let cleaned = world.a.cleanup()?;
    ensure!(cleaned.status.success(), "{}{}", cleaned.stdout, cleaned.stderr);
    ensure!(!world.a.pin_root().exists(), "pins are left in {}", world.a.pin_root().display());
    app(&world.client, &["request", &at(world.server.ipv4(), 8080)])?;
    let id = world.bed.id().to_owned();
    drop(echo);
    drop(world);
    let left = Testbed::leftovers(&id)?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

#[test]
fn clsact_filters_do_what_tcx_links_do() -> Result<()> {
    let mut stage = Stage::new("clsact")?;
    let outsider = stage.bed.node("a").pod("outsider")?;
    stage.mesh.workload("server").mode = Some(testbed::Mode::Strict);
    let _echo = serve(&stage.server, 8080, &[])?;
    let to = at(stage.server.ipv4(), 8080);
    let mut world = stage.start_with(&["--tc", "clsact"])?;
    let filters = |world: &World| world.server.check(&["tc", "filter", "show", "dev", "eth0", "ingress"]);
    ensure!(filters(&world)?.contains("up_inbound"), "{}", filters(&world)?);
    app(&world.client, &["request", &to])?;
    ensure!(app_error(&outsider, &["request", &to, "--timeout", "3"])? == "ECONNREFUSED");
    // A killed agent's filters stay, a new agent replaces them in place, and a clean end removes them.
    world.b.kill()?;
    ensure!(
        app_error(&outsider, &["request", &to, "--timeout", "3"])? == "ECONNREFUSED",
        "STRICT ended with the agent"
    );
    world.b.restart()?;
    ensure!(filters(&world)?.matches("name up_inbound").count() == 1, "{}", filters(&world)?);
    app(&world.client, &["request", &to])?;
    world.b.stop()?;
    ensure!(!filters(&world)?.contains("up_inbound"), "{}", filters(&world)?);
    app(&outsider, &["request", &to])?;
    Ok(())
}
