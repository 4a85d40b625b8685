//! What is not the mesh's business stays as it was.

use std::time::Duration;

use anyhow::{Result, ensure};
use testbed::{Process, Protocol};

use crate::world::{MARKER, Stage, World, app, assert_plaintext_seen, at, counter, serve};

#[test]
fn udp_and_loopback_are_untouched() -> Result<()> {
    let world = World::new("udp")?;
    let udp: Process = world.server.app(&["udp-serve", "[::]:5353"])?;
    udp.wait_json("listening", Duration::from_secs(10))?;
    for ip in [world.server.ipv4().to_string(), format!("[{}]", world.server.ipv6())] {
        app(&world.client, &["udp", &format!("{ip}:5353")])?;
    }
    let _own = serve(&world.client, 8080, &[])?;
    for to in ["127.0.0.1:8080", "127.9.9.9:8080", "[::1]:8080"] {
        let report = app(&world.client, &["request", to])?;
        ensure!(report["peer"] == to, "{report}");
    }
    ensure!(counter(&world.a, "bpf.captured")? == 0, "something was captured");
    Ok(())
}

#[test]
fn excluded_ports_and_networks_and_foreign_addresses_are_not_captured() -> Result<()> {
    let mut stage = Stage::new("exclude")?;
    let outsider = stage.bed.node("b").pod("outsider")?;
    let spared = stage.bed.node("b").pod("spared")?;
    stage.mesh.enroll(&spared);
    stage.mesh.exclude.outbound_ports = vec![9000];
    let cidr = format!("{}/32", spared.ipv4());
    let enroll = stage.mesh.workload("client").enroll.as_mut().expect("enrolled");
    enroll.exclude =
        Some(testbed::Exclude { outbound_ports: vec![9001], outbound_cidrs: vec![cidr], inbound_ports: vec![] });
    let world = stage.start()?;
    let mut servers = Vec::new();
    for port in [8080, 9000, 9001] {
        servers.push(serve(&world.server, port, &[])?);
    }
    servers.push(serve(&outsider, 8080, &[])?);
    servers.push(serve(&spared, 8080, &[])?);
    let sniffer = world.sniff()?;
    for to in [
        at(world.server.ipv4(), 9000),
        at(world.server.ipv6(), 9001),
        at(outsider.ipv4(), 8080),
        at(spared.ipv4(), 8080),
    ] {
        app(&world.client, &["request", &to, "--line", MARKER])?;
    }
    assert_plaintext_seen(&sniffer.stop()?)?;
    ensure!(counter(&world.a, "bpf.captured")? == 0, "an excluded connection was captured");
    app(&world.client, &["request", &at(world.server.ipv4(), 8080), "--line", MARKER])?;
    ensure!(counter(&world.a, "bpf.captured")? == 1, "the other port was not captured");
    Ok(())
}

#[test]
fn plain_workloads_and_captured_networks_pass_through_the_agent() -> Result<()> {
    let mut stage = Stage::new("plain")?;
    let legacy = stage.bed.node("b").pod("legacy")?;
    let unknown = stage.bed.node("b").pod("unknown")?;
    stage.mesh.plain(&legacy).protocol = Protocol::Plain;
    stage.mesh.cidrs = vec![format!("{}/32", unknown.ipv4())];
    let world = stage.start()?;
    let legacy_server = serve(&legacy, 8080, &["--print"])?;
    let _unknown_server = serve(&unknown, 8080, &[])?;
    for to in [at(legacy.ipv4(), 8080), at(legacy.ipv6(), 8080), at(unknown.ipv4(), 8080)] {
        let report = app(&world.client, &["request", &to, "--line", MARKER, "--count", "3"])?;
        ensure!(report["peer"] == to.as_str(), "{report}");
    }
    let seen = legacy_server.wait_json("peer", Duration::from_secs(10))?;
    ensure!(seen["peer"].as_str().is_some_and(|p| p.contains(&world.client.ipv4().to_string())), "{seen}");
    ensure!(counter(&world.a, "passthrough")? == 3, "{}", world.a.counters()?);
    Ok(())
}
