//! Many connections, and pods that misbehave beside pods that do not.

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::{
        resource::{Resource, getrlimit},
        signal::{self, Signal},
    },
    unistd::Pid,
};
use testbed::{
    Agent, Pod,
    pace::{patience, scaled},
};

use crate::{
    telemetry::get,
    world::{Stage, World, app, at, counter, eventually, live, serve, wait_counter},
};

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

/// More than a pod may have handshakes at once.
const MANY: &str = "1100";

/// Opens connections that say this much and no more, all at once.
fn hold_silent(pod: &Pod, to: &str, count: &str, hex: &str) -> Result<testbed::Process> {
    let process = pod.app(&["hold", to, "--count", count, "--concurrency", count, "--send-hex", hex])?;
    process.wait_json("held", Duration::from_mins(1))?;
    Ok(process)
}

/// A connection is served at once, several times.
fn ensure_prompt(pod: &Pod, to: &str) -> Result<()> {
    for _ in 0..5 {
        let report = app(pod, &["request", to])?;
        let took = report["first_answer_ms"].as_f64().context("first_answer_ms")?;
        ensure!(took < patience(BOUND).as_secs_f64() * 1e3, "a connection to {to} took {took} ms");
    }
    Ok(())
}

/// Evictions and refusals of a pool, as the metrics have them.
fn evictions(world: &World, node: &str, pool: &str) -> Result<u64> {
    let metrics = get(world.bed.node(node), 15020, "/metrics")?;
    let sample = format!("underpass_pool_evictions_total{{pool=\"{pool}\"}} ");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&sample));
    Ok(line.with_context(|| format!("no {sample} in {metrics}"))?.parse()?)
}

#[test]
fn silent_connections_to_a_pod_do_not_delay_its_peers() -> Result<()> {
    let stage = Stage::new("silent")?;
    let rogue = stage.bed.node("a").pod("rogue")?;
    let world = stage.start()?;
    let _echo = serve(&world.server, 8080, &[])?;
    let (tunnel, to) = (at(world.server.ipv4(), 15008), at(world.server.ipv4(), 8080));
    ensure_prompt(&world.client, &to)?;
    // Nothing at all, and half a ClientHello.
    for hex in ["", "1603010200010001fc0303"] {
        let silent = hold_silent(&rogue, &tunnel, MANY, hex)?;
        ensure_prompt(&world.client, &to)?;
        ensure!(evictions(&world, "b", "tunnel")? > 0, "nobody had to go");
        drop(silent);
    }
    Ok(())
}

#[test]
fn nor_do_silent_connections_from_many_addresses() -> Result<()> {
    let mut stage = Stage::new("silents")?;
    let mut rogues = Vec::new();
    for number in 0..6 {
        rogues.push(stage.bed.node("a").pod(&format!("rogue{number}"))?);
    }
    stage.mesh.enroll(&rogues[0]);
    let world = stage.start()?;
    let _echo = serve(&world.server, 8080, &[])?;
    let (tunnel, to) = (at(world.server.ipv4(), 15008), at(world.server.ipv4(), 8080));
    ensure_prompt(&world.client, &to)?;
    let mut silent = Vec::new();
    // One of them is a neighbour in the mesh that is on good terms with the server.
    ensure_prompt(&rogues[0], &to)?;
    for rogue in &rogues[1..] {
        // None of them has more than its share.
        silent.push(hold_silent(rogue, &tunnel, "250", "1603010200010001fc0303")?);
    }
    ensure_prompt(&world.client, &to)?;
    ensure_prompt(&rogues[0], &to)
}

/// A destination that accepts connections and never says anything takes turns as a dead one does.
#[test]
fn dials_to_a_mute_destination_do_not_delay_others() -> Result<()> {
    let mut stage = Stage::new("mutes")?;
    let mute = stage.bed.node("b").pod("mute")?;
    stage.mesh.plain(&mute).protocol = testbed::Protocol::Underpass;
    let world = stage.start()?;
    let _echo = serve(&world.server, 8080, &[])?;
    let _mute = serve(&mute, 15008, &["--mode", "silent"])?;
    let dials = hold_silent(&world.client, &at(mute.ipv4(), 8080), MANY, "")?;
    ensure_prompt(&world.client, &at(world.server.ipv4(), 8080))?;
    drop(dials);
    Ok(())
}

/// What swallows packets: nothing answers, and nothing says so.
fn swallow(world: &World, pod: &Pod) -> Result<()> {
    world.bed.node("b").namespace().ip(&format!("route add blackhole {}/32\n", pod.ipv4())).map(drop)
}

#[test]
fn dials_to_a_dead_destination_do_not_delay_others() -> Result<()> {
    let mut stage = Stage::new("dead")?;
    let dead = stage.bed.node("b").pod("dead")?;
    stage.mesh.enroll(&dead);
    let world = stage.start_with(&["--connect-timeout", "5s"])?;
    let _echo = serve(&world.server, 8080, &[])?;
    let to = at(world.server.ipv4(), 8080);
    ensure_prompt(&world.client, &to)?;
    swallow(&world, &dead)?;
    let started = Instant::now();
    let dials = hold_silent(&world.client, &at(dead.ipv4(), 8080), MANY, "")?;
    ensure_prompt(&world.client, &to)?;
    // All of them are told after the time of one, also those that waited for a turn.
    let count: u64 = MANY.parse()?;
    wait_counter(&world.a, "refused.upstream-unreachable", count)?;
    ensure!(started.elapsed() < patience(Duration::from_secs(15)), "one after the other: {:?}", started.elapsed());
    drop(dials);
    Ok(())
}

#[test]
fn dials_to_many_dead_destinations_do_not_delay_others() -> Result<()> {
    let mut stage = Stage::new("graves")?;
    let mut dead = Vec::new();
    for number in 0..8 {
        dead.push(stage.bed.node("b").pod(&format!("dead{number}"))?);
        stage.mesh.enroll(&dead[number]);
    }
    let world = stage.start()?;
    let _echo = serve(&world.server, 8080, &[])?;
    let mut dials = Vec::new();
    for pod in &dead {
        swallow(&world, pod)?;
        dials.push(hold_silent(&world.client, &at(pod.ipv4(), 8080), "300", "")?);
    }
    ensure_prompt(&world.client, &at(world.server.ipv4(), 8080))
}

/// What applications do at once is not refused, however few may be under way.
#[test]
fn a_burst_to_one_server_is_served_whole() -> Result<()> {
    let stage = Stage::new("burst")?;
    let world =
        stage.start_with(&["--max-pending-per-pod", "64", "--handshake-timeout", "30s", "--connect-timeout", "30s"])?;
    let _echo = serve(&world.server, 8080, &[])?;
    let count = scaled(1500).to_string();
    let to = at(world.server.ipv4(), 8080);
    let report = app(&world.client, &["parallel", &to, "--count", &count, "--concurrency", &count, "--timeout", "80"])?;
    println!("{report}");
    ensure!(counter(&world.a, "refused.pod-limit")? == 0 && counter(&world.b, "refused.pod-limit")? == 0, "{report}");
    Ok(())
}

#[test]
fn idle_neighbours_do_not_keep_the_kubelet_from_the_probes() -> Result<()> {
    let stage = Stage::new("idlers")?;
    let rogue = stage.bed.node("a").pod("rogue")?;
    // The metrics are the node's own unless somebody asks for more.
    let world = stage.start_with(&["--metrics-addr", "[::]:15020"])?;
    let node = world.bed.node("a");
    eventually(Duration::from_secs(20), || get(node, 15021, "/healthz/ready").map(drop))?;
    let address = testbed::addresses::pod_v4(1, 1);
    for port in [15021, 15020] {
        let _idle = hold_silent(&rogue, &at(address, port), "200", "474554202f")?;
        // As the kubelet on the node, and as somebody else from elsewhere.
        let path = if port == 15021 { "/healthz/live" } else { "/metrics" };
        for (from, to) in [(node, at(std::net::Ipv4Addr::LOCALHOST, port)), (world.bed.node("b"), at(address, port))] {
            let started = Instant::now();
            let (status, _) = crate::telemetry::http(from, "GET", &format!("http://{to}{path}"))?;
            let took = started.elapsed();
            ensure!(status == 200 && took < patience(BOUND), "{to}: {status} after {took:?}");
        }
    }
    ensure!(evictions(&world, "a", "probes")? > 0);
    Ok(())
}

#[test]
fn each_direction_has_connections_of_its_own() -> Result<()> {
    let world = Stage::new("ways")?.start_with(&["--max-connections-per-pod", "50"])?;
    let _servers = [serve(&world.server, 8080, &[])?, serve(&world.client, 8080, &[])?];
    let full = |from: &Pod, to: &Pod, agent: &Agent| -> Result<testbed::Process> {
        let hold = from.app(&["hold", &at(to.ipv4(), 8080), "--count", "60", "--exchange"])?;
        let report = hold.wait_json("held", Duration::from_secs(30))?;
        ensure!(report["held"] == 50 && counter(agent, "refused.pod-limit")? == 10, "{report}");
        Ok(hold)
    };
    // Both of the client's limits are used up only when it has both dialled and been dialled that
    // often.
    let _out = full(&world.client, &world.server, &world.a)?;
    let _in = full(&world.server, &world.client, &world.b)?;
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
    let world: World = stage.start_with(&["--handshake-timeout", "5s"])?;
    let certificate = crate::certificates::Forge::of(&world.bed)?.leaf(&crate::certificates::Leaf::good("rogue"))?;
    let mut peer = crate::certificates::s_client(&rogue, &world.server, &certificate, &["-alpn", "underpass/1"])?;
    peer.write_stdin(b"\r\n\r\n\x00")?; // the first bytes of the PROXY signature, and no more
    wait_counter(&world.b, "refused.deadline", 1)
}

/// A process that hardly gets processor time while this lives, as on a node that has far too much
/// to do.
struct Starved<'a> {
    process: &'a testbed::Process,
    ends: mpsc::Sender<()>,
    thread: Option<thread::JoinHandle<()>>,
}

impl<'a> Starved<'a> {
    fn new(process: &'a testbed::Process) -> Self {
        let (ends, end) = mpsc::channel();
        let pid = Pid::from_raw(process.pid().cast_signed());
        let thread = thread::spawn(move || {
            // It runs for a part of the time only.
            for (signal, part) in [(Signal::SIGSTOP, 99), (Signal::SIGCONT, 1)].into_iter().cycle() {
                let sent = signal::kill(pid, signal);
                if sent.is_err() || end.recv_timeout(Duration::from_millis(part)) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        });
        Self { process, ends, thread: Some(thread) }
    }
}

impl Drop for Starved<'_> {
    fn drop(&mut self) {
        let _ = self.ends.send(());
        let _ = self.thread.take().map(thread::JoinHandle::join);
        let _ = self.process.signal(Signal::SIGCONT);
    }
}

/// Outside of the mesh a connection to a machine that is short of processor time waits, for as long
/// as its application does.
#[test]
fn who_waits_for_a_starved_agent_is_served_in_the_end() -> Result<()> {
    let world = Stage::new("starved")?.start_with(&["--handshake-timeout", "5s"])?;
    let _echo = serve(&world.server, 8080, &[])?;
    let to = at(world.server.ipv4(), 8080);
    app(&world.client, &["request", &to])?;
    for starved in [&world.b, &world.a] {
        let _starved = Starved::new(starved.process()?);
        let (count, limit) = (scaled(1000).to_string(), "120");
        let start = Instant::now();
        let many = world.client.app(&[
            "hold",
            &to,
            "--count",
            &count,
            "--concurrency",
            &count,
            "--exchange",
            "--timeout",
            limit,
        ])?;
        let report = many.wait_json("held", Duration::from_mins(3))?;
        println!("{report} after {:.1} s", start.elapsed().as_secs_f64());
        let refused = |agent: &Agent| Ok::<_, anyhow::Error>(agent.counters()?["agent"]["refused"].clone());
        ensure!(report["failed"] == 0, "{report}, refused: a {}, b {}", refused(&world.a)?, refused(&world.b)?);
    }
    Ok(())
}
