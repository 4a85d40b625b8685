//! Who protects the records: the kernel where it can, the agent where it cannot, and never nobody.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use testbed::{Agent, pace};

use crate::world::{
    MARKER, Stage, World, app, app_error, assert_encrypted, at, counter, data_path, eventually, serve, start_agent,
};

/// What the agent says is what the kernel says, on both sides, and nothing of it is readable on the wire.
#[test]
fn the_kernel_says_the_same_as_the_agent() -> Result<()> {
    let world = World::new("ktls")?;
    let _echo = serve(&world.server, 8080, &[])?;
    let to = at(world.server.ipv4(), 8080);
    let sniffer = world.sniff()?;
    let held = world.client.app(&["hold", &to, "--count", "3", "--exchange"])?;
    held.wait_json("held", Duration::from_secs(20))?;
    app(&world.client, &["request", &to, "--line", MARKER])?;
    for (agent, pod) in [(&world.a, &world.client), (&world.b, &world.server)] {
        let path = data_path(agent)?;
        let live = agent.wait_connections(Duration::from_secs(10), |all| all.len() == 3)?;
        for connection in &live {
            ensure!(connection["data_path"] == path.as_str(), "{connection}");
            ensure!(connection["fallback"].is_null() == (path == "ktls"), "{connection}");
        }
        let stat = pod.tls_stat()?;
        if path == "ktls" {
            ensure!(pod.ktls_sockets()? == 3, "ss shows other sockets in {}", pod.name());
            ensure!(stat["TlsCurrTxSw"] == 3 && stat["TlsCurrRxSw"] == 3, "{stat:?}");
            ensure!(stat["TlsTxSw"] == 4 && stat["TlsDecryptError"] == 0, "{stat:?}");
            ensure!(counter(agent, "ktls")? == 4, "{}", agent.counters()?);
        } else {
            ensure!(stat.get("TlsCurrTxSw").is_none_or(|n| *n == 0), "{stat:?}");
            ensure!(counter(agent, "ktls_fallback.unavailable")? == 4, "{}", agent.counters()?);
        }
    }
    ensure!(held.output(Duration::from_secs(20))?.last_json()?["alive"] == 3);
    assert_encrypted(&sniffer.stop()?)
}

/// A side that keeps records in the agent talks to one that leaves them to the kernel, both ways.
#[test]
fn one_side_may_do_without_the_kernel() -> Result<()> {
    for without in ["a", "b"] {
        let stage = Stage::new("mixed")?;
        let arguments = |node: &str| if node == without { &["--ktls", "off"][..] } else { &[] };
        let a = start_agent(&stage.mesh, stage.bed.node("a"), arguments("a"))?;
        let b = start_agent(&stage.mesh, stage.bed.node("b"), arguments("b"))?;
        let Stage { client, server, mesh, bed } = stage;
        let world = World { a, b, client, server, mesh, bed };
        let _bulk = serve(&world.server, 8080, &["--mode", "bulk"])?;
        let to = at(world.server.ipv4(), 8080);
        let bytes = pace::scaled(20_000_000).to_string();
        let sniffer = world.sniff()?;
        app(&world.client, &["bulk", &to, "--up", &bytes, "--down", &bytes])?;
        assert_encrypted(&sniffer.stop()?)?;
        let agent = if without == "a" { &world.a } else { &world.b };
        ensure!(counter(agent, "ktls_fallback.disabled")? == 1, "{}", agent.counters()?);
        ensure!(agent.status()?["data_path"] == "user", "{}", agent.status()?);
    }
    Ok(())
}

/// Keys are replaced every few records. Where the kernel cannot do that, the connection ends with a reset and says why.
#[test]
fn few_records_per_key() -> Result<()> {
    let world = Stage::new("rekey")?.start_with(&["--records-per-key", "64"])?;
    let _bulk = serve(&world.server, 8080, &["--mode", "bulk"])?;
    let _echo = serve(&world.server, 8081, &[])?;
    let to = at(world.server.ipv4(), 8080);
    let bytes = pace::scaled(50_000_000).to_string();
    let transfer = ["bulk", to.as_str(), "--up", &bytes, "--down", &bytes];
    if replaces_keys(&world.a)? {
        app(&world.client, &transfer)?;
    } else {
        let error = app_error(&world.client, &transfer)?;
        ensure!(["ECONNRESET", "EPIPE"].contains(&error.as_str()), "{error}");
        eventually(Duration::from_secs(10), || {
            let limits = counter(&world.a, "refused.key-limit")? + counter(&world.b, "refused.key-limit")?;
            ensure!(limits >= 1, "nobody says why: {}", world.a.counters()?);
            Ok(())
        })?;
    }
    // Short connections need no second key anywhere.
    app(&world.client, &["request", &at(world.server.ipv4(), 8081)])?;
    Ok(())
}

fn replaces_keys(agent: &Agent) -> Result<bool> {
    let status = agent.status()?;
    let rekey = status["ktls"]["rekey"].as_bool().with_context(|| format!("{status}"))?;
    Ok(data_path(agent)? == "user" || rekey)
}

/// A killed agent leaves no connection behind that looks finished.
#[test]
fn a_hundred_connections_of_a_killed_agent_are_resets() -> Result<()> {
    let mut world = World::new("hundred")?;
    let _echo = serve(&world.server, 8080, &[])?;
    let to = at(world.server.ipv4(), 8080);
    for which in ["a", "b"] {
        let held = world.client.app(&["hold", &to, "--count", "100", "--concurrency", "10", "--exchange"])?;
        ensure!(held.wait_json("held", pace::patience(Duration::from_secs(30)))?["held"] == 100);
        let agent = if which == "a" { &mut world.a } else { &mut world.b };
        agent.kill()?;
        agent.restart()?;
        let other = if which == "a" { &world.b } else { &world.a };
        // The other side has met every reset once it has no connection any more.
        other.wait_connections(pace::patience(Duration::from_secs(10)), <[_]>::is_empty)?;
        let report = held.output(pace::patience(Duration::from_secs(30)))?.last_json()?;
        ensure!(report["endings"]["ECONNRESET"] == 100, "agent {which} killed: {report}");
    }
    Ok(())
}
