//! Pods that vanish from the configuration without leaving the mesh.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use testbed::{Agent, AgentOptions, Protocol, underpass_path};

use crate::world::{
    MARKER, Stage, World, app, app_error, assert_encrypted, at, counter, eventually, serve, start_agent, wait_counter,
};

const SOON: Duration = Duration::from_secs(20);

/// State and reason of a workload, as `underpass status` has them.
fn state(status: &Value, workload: &str) -> Option<(String, String)> {
    let pod = status["pods"].as_array()?.iter().find(|pod| pod["workload"] == workload)?;
    Some((pod["state"].as_str()?.to_owned(), pod["reason"].as_str().unwrap_or_default().to_owned()))
}

fn wait_state(agent: &Agent, workload: &str, wanted: &str) -> Result<Value> {
    agent.wait_status(SOON, |status| Ok(state(status, workload).is_some_and(|(state, _)| state == wanted)))
}

/// The mesh without the server.
fn forget_server(world: &mut World) -> Result<()> {
    world.mesh.services.clear();
    world.mesh.workloads.retain(|workload| workload.name != "server");
    world.reload()
}

#[test]
fn a_workload_that_vanishes_from_the_file_stays_closed_until_it_is_taken_out() -> Result<()> {
    let mut world = World::new("absent")?;
    let outsider = world.bed.node("a").pod("outsider")?;
    let whole = world.mesh.clone();
    let _echo = serve(&world.server, 8080, &[])?;
    let _own = serve(&world.client, 8080, &[])?;
    let (to, back) = (at(world.server.ipv4(), 8080), at(world.client.ipv4(), 8080));
    app(&outsider, &["request", &to])?;
    app(&world.client, &["request", &to])?;
    let live = world.client.app(&["expect-reset", &to])?;
    live.wait_json("established", SOON)?;

    let sniffer = world.sniff()?;
    forget_server(&mut world)?;
    let status = wait_state(&world.b, "default/server", "kept")?;
    let (_, reason) = state(&status, "default/server").context("the server")?;
    ensure!(reason.contains("no source lists"), "{reason}");
    ensure!(live.output(SOON)?.status.success(), "a live connection goes on");
    // In plaintext and through the tunnel, in and out. The client's node does not know the server
    // any more either.
    for from in [&outsider, &world.client] {
        app_error(from, &["request", &to, "--line", MARKER, "--timeout", "3"])?;
    }
    let before = counter(&world.b, "refused.kept-pod")?;
    app_error(&world.server, &["request", &back, "--line", MARKER, "--timeout", "3"])?;
    wait_counter(&world.b, "refused.kept-pod", before + 1)?;
    let workloads = world.b.ask(&["workloads"])?;
    ensure!(workloads.to_string().contains(r#""state":"kept""#), "{workloads}");

    // It comes back, and is what it was.
    world.mesh = whole;
    world.reload()?;
    wait_state(&world.b, "default/server", "enrolled")?;
    app(&world.client, &["request", &to, "--line", MARKER])?;
    app(&world.server, &["request", &back, "--line", MARKER])?;
    assert_encrypted(&sniffer.stop()?)?;

    // Listed without `enroll` it leaves, also when it is kept.
    let listed = world.mesh.clone();
    forget_server(&mut world)?;
    wait_state(&world.b, "default/server", "kept")?;
    world.mesh = listed;
    let server = world.mesh.workload("server");
    (server.enroll, server.protocol) = (None, Protocol::Plain);
    world.reload()?;
    world.b.wait_status(SOON, |status| Ok(state(status, "default/server").is_none()))?;
    app(&outsider, &["request", &to])?;
    Ok(())
}

#[test]
fn a_kept_pod_is_released_when_its_namespace_is_gone() -> Result<()> {
    let mut world = World::new("absgone")?;
    let doomed = world.bed.node("b").pod("doomed")?;
    world.mesh.enroll(&doomed);
    world.reload()?;
    wait_state(&world.b, "default/doomed", "enrolled")?;
    world.mesh.workloads.retain(|workload| workload.name != "doomed");
    world.reload()?;
    wait_state(&world.b, "default/doomed", "kept")?;
    let netns = |verb: &str| {
        let status = Command::new("ip").args(["netns", verb, doomed.namespace().name()]).status()?;
        ensure!(status.success(), "ip netns {verb}: {status}");
        Ok(())
    };
    netns("del")?;
    let gone = |status: &Value| Ok(state(status, "default/doomed").is_none());
    world.b.wait_status(Duration::from_mins(1), gone)?;
    // The testbed takes away what it made.
    netns("add")
}

#[test]
fn a_restarted_agent_that_does_not_know_a_pod_keeps_it_closed() -> Result<()> {
    let mut stage = Stage::new("absstale")?;
    let outsider = stage.bed.node("a").pod("outsider")?;
    let _echo = serve(&stage.server, 8080, &[])?;
    let to = at(stage.server.ipv4(), 8080);
    let _a = start_agent(&stage.mesh, stage.bed.node("a"), &[])?;
    let node = stage.bed.node("b").clone();
    let options = AgentOptions { cleanup_on_exit: false, ready_within: None, ..AgentOptions::default() };
    let mut b = Agent::start(&node, &underpass_path()?, &stage.mesh.document(&node), options)?;
    wait_state(&b, "default/server", "enrolled")?;
    app(&outsider, &["request", &to])?;
    let whole = stage.mesh.document(&node);
    b.kill()?;
    stage.mesh.services.clear();
    stage.mesh.workloads.retain(|workload| workload.name != "server");
    b.write_config(&stage.mesh.document(&node))?;
    b.restart()?;
    let status = wait_state(&b, "default/server", "kept")?;
    ensure!(state(&status, "default/server").is_some_and(|(_, reason)| reason.contains("earlier agent")), "{status}");
    // It was PERMISSIVE.
    eventually(SOON, || app_error(&outsider, &["request", &to, "--timeout", "2"]).map(drop))?;
    let error = app_error(&stage.server, &["request", &at(stage.client.ipv4(), 9), "--timeout", "3"])?;
    ensure!(error == "ECONNREFUSED", "{error}");
    b.write_config(&whole)?;
    wait_state(&b, "default/server", "enrolled")?;
    app(&stage.client, &["request", &to])?;
    // A clean end gives kept pods back, too.
    stage.mesh.workloads.clear();
    Ok(())
}
