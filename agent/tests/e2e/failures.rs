//! Things that break, and that break closed.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::world::{MARKER, World, app, app_error, at, eventually, live, serve, wait_counter};

#[test]
fn killed_server_agent_is_a_reset_and_never_plaintext() -> Result<()> {
    let mut world = World::new("killed")?;
    let server = serve(&world.server, 8080, &["--print"])?;
    let to = at(world.server.ipv4(), 8080);
    let live = world.client.app(&["expect-reset", &to])?;
    live.wait_json("established", Duration::from_secs(10))?;
    let sniffer = world.sniff()?;
    world.b.kill()?;
    let output = live.output(Duration::from_secs(10))?;
    ensure!(output.status.success(), "the client did not see a reset: {}", output.stdout);
    let seen = server.wait_json("error", Duration::from_secs(10))?;
    ensure!(seen["error"] == "ECONNRESET", "the server's application saw {seen}");
    let error = app_error(&world.client, &["request", &to, "--line", MARKER, "--timeout", "12"])?;
    ensure!(error == "ECONNRESET", "{error}");
    let capture = sniffer.stop()?;
    ensure!(capture.marker_hits == 0 && capture.plaintext_payload == 0, "{capture:?}");
    wait_counter(&world.a, "refused.upstream-unreachable", 1)
}

#[test]
fn a_vanished_peer_node_is_a_reset_within_thirty_seconds() -> Result<()> {
    let world = World::new("vanish")?;
    let _echo = serve(&world.server, 8080, &[])?;
    let to = at(world.server.ipv4(), 8080);
    let idle = world.client.app(&["expect-reset", &to])?;
    idle.wait_json("established", Duration::from_secs(10))?;
    world.bed.node("b").namespace().ip("link set wire down\n")?;
    let start = Instant::now();
    let output = idle.output(Duration::from_secs(40))?;
    ensure!(output.status.success(), "no reset: {}", output.stdout);
    ensure!(start.elapsed() < Duration::from_secs(30), "it took {:?}", start.elapsed());
    // A dial into the void ends within the connect timeout.
    let start = Instant::now();
    let error = app_error(&world.client, &["request", &to, "--timeout", "20"])?;
    ensure!(error == "ECONNRESET" && start.elapsed() < Duration::from_secs(12), "{error} after {:?}", start.elapsed());
    Ok(())
}

#[test]
fn another_endpoint_is_tried_when_one_is_dead() -> Result<()> {
    let mut stage = crate::world::Stage::new("retry")?;
    // Known to the mesh, but nobody is there: the node's bridge answers "no route" or nothing at all.
    let ghost = stage.bed.node("b").pod("ghost")?;
    stage.mesh.enroll(&ghost).enroll = None;
    let server = stage.server.clone();
    stage.mesh.service("both", 2, &[(80, 8080)], &[&server, &ghost]);
    let world = stage.start()?;
    let _echo = serve(&world.server, 8080, &[])?;
    let [vip, _] = testbed::addresses::vips(2);
    for _ in 0..20 {
        app(&world.client, &["request", &at(vip, 80)])?;
    }
    wait_counter(&world.a, "retries", 1)
}

#[test]
fn an_application_that_closed_resets_the_sender() -> Result<()> {
    let world = World::new("gone")?;
    // The server closes at once with data of the client's still coming.
    let _close = serve(&world.server, 8080, &["--mode", "close"])?;
    let to = at(world.server.ipv4(), 8080);
    let error = app_error(&world.client, &["bulk", &to, "--up", "50000000", "--down", "1"])?;
    ensure!(["ECONNRESET", "EPIPE", "other"].contains(&error.as_str()), "{error}");
    eventually(Duration::from_secs(10), || {
        for agent in [&world.a, &world.b] {
            let left = live(agent)?;
            ensure!(left == 0, "{left} connections left");
        }
        Ok(())
    })
}
