//! Many connections, and pods that misbehave beside pods that do not.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::resource::{Resource, getrlimit};
use testbed::pace::{patience, scaled};

use crate::world::{Stage, World, app, at, counter, live, serve, wait_counter};

/// What another pod's connection may take while one pod is flooded. Idle, it takes some milliseconds.
const BOUND: Duration = Duration::from_secs(1);
/// The handshakes' own limit in that test. What waited behind the flood would wait for as long, so it is three times the bound, on
/// slow processors too.
const HANDSHAKES: Duration = Duration::from_secs(3);

#[test]
fn a_flooded_pod_does_not_delay_another() -> Result<()> {
    let mut stage = Stage::new("flood")?;
    let other = stage.bed.node("b").pod("other")?;
    stage.mesh.enroll(&other);
    let rogue = stage.bed.node("a").pod("rogue")?;
    let handshakes = format!("{}s", patience(HANDSHAKES).as_secs());
    let world = stage.start_with(&["--handshake-timeout", &handshakes])?;
    let _victim = serve(&world.server, 8080, &[])?;
    let _other = serve(&other, 8080, &[])?;
    // Half a ClientHello: a record header that promises 512 bytes, and a few of them. 10,000 times.
    let count = scaled(10_000).to_string();
    let tunnel = at(world.server.ipv4(), 15008);
    let _flood = rogue.app(&[
        "hold",
        &tunnel,
        "--count",
        &count,
        "--concurrency",
        &count,
        "--send-hex",
        "1603010200010001fc0303",
    ])?;
    wait_counter(&world.b, "refused.deadline", 1)?;
    let start = Instant::now();
    let (mut slowest, mut count) = (0.0_f64, 0);
    while start.elapsed() < Duration::from_secs(8) {
        let report = app(&world.client, &["request", &at(other.ipv4(), 8080)])?;
        slowest = slowest.max(report["first_answer_ms"].as_f64().context("first_answer_ms")?);
        count += 1;
    }
    println!(
        "{count} connections to the other pod, slowest {slowest:.1} ms, under {} half-open handshakes refused so far",
        counter(&world.b, "refused.deadline")?
    );
    ensure!(slowest < patience(BOUND).as_secs_f64() * 1e3, "a connection to another pod took {slowest} ms");
    Ok(())
}

#[test]
fn a_pod_at_its_connection_limit_is_refused_and_others_are_not() -> Result<()> {
    let mut stage = Stage::new("cap")?;
    let second = stage.bed.node("a").pod("second")?;
    stage.mesh.enroll(&second);
    let world = stage.start_with(&["--max-connections-per-pod", "50"])?;
    let _echo = serve(&world.server, 8080, &[])?;
    let to = at(world.server.ipv4(), 8080);
    let hold = world.client.app(&["hold", &to, "--count", "80", "--exchange"])?;
    let report = hold.wait_json("held", Duration::from_secs(30))?;
    ensure!(report["held"] == 50 && report["errors"]["ECONNRESET"] == 30, "{report}");
    ensure!(counter(&world.a, "refused.pod-limit")? == 30, "{}", world.a.counters()?);
    drop(hold);
    app(&second, &["request", &to])?;
    Ok(())
}

#[test]
fn thousands_of_concurrent_connections_to_two_destinations() -> Result<()> {
    let mut stage = Stage::new("crowd")?;
    let second = stage.bed.node("b").pod("second")?;
    stage.mesh.enroll(&second);
    let world = stage.start()?;
    // Both destinations' connections meet in each agent, with two descriptors each.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let wanted = scaled(if std::env::var_os("UNDERPASS_FULL").is_some() { 40_000 } else { 6_000 });
    let each = wanted.min((hard.saturating_sub(2_000)) / 2) / 2;
    let mut holders = Vec::new();
    let mut servers = Vec::new();
    for pod in [&world.server, &second] {
        servers.push(serve(pod, 8080, &[])?);
        let (count, concurrency) = (each.to_string(), scaled(200).to_string());
        let to = at(pod.ipv4(), 8080);
        holders.push(world.client.app(&[
            "hold",
            &to,
            "--count",
            &count,
            "--concurrency",
            &concurrency,
            "--exchange",
            "--timeout",
            "200",
        ])?);
    }
    for holder in &holders {
        let report = holder.wait_json("held", Duration::from_secs(220))?;
        ensure!(report["held"] == each, "{report}");
    }
    let live = live(&world.a)?;
    ensure!(live == 2 * each, "the table has {live}");
    println!("{} concurrent connections ran (descriptor limit {hard}, wanted {wanted})", 2 * each);
    for holder in holders {
        let report = holder.output(Duration::from_mins(1))?.last_json()?;
        ensure!(report["alive"] == each, "{report}");
    }
    Ok(())
}

#[test]
fn a_peer_that_says_nothing_after_the_handshake_meets_the_deadline() -> Result<()> {
    let stage = Stage::new("mute")?;
    let rogue = stage.bed.node("a").pod("rogue")?;
    let world: World = stage.start_with(&["--handshake-timeout", "2s"])?;
    let certificate = crate::certificates::Forge::of(&world.bed)?.leaf(&crate::certificates::Leaf::good("rogue"))?;
    let mut peer = crate::certificates::s_client(&rogue, &world.server, &certificate, &["-alpn", "underpass/1"])?;
    peer.write_stdin(b"\r\n\r\n\x00")?; // the first bytes of the PROXY signature, and no more
    wait_counter(&world.b, "refused.deadline", 1)
}
