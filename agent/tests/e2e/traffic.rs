//! Programs of every habit work through the tunnel, and nothing of theirs is on the wire in plaintext.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use testbed::{
    Nginx, Redis, Sniffer, SnifferOptions,
    pace::{patience, scaled},
};

use crate::world::{
    MARKER, Stage, World, app, app_error, assert_encrypted, assert_plaintext_seen, at, eventually, live, serve, sniff,
    wait_counter,
};

#[test]
fn http_with_keep_alive_over_addresses_and_vips_of_both_families() -> Result<()> {
    let stage = Stage::new("http")?;
    let nginx = Nginx::start(&stage.server, 8080, MARKER)?;
    let (v4, v6) = (stage.server.ipv4(), stage.server.ipv6());
    // Positive control: before the agents run, the same request is visible.
    let sniffer = sniff(&stage.bed)?;
    stage.client.check(&["curl", "-sS", &format!("http://{v4}:8080/")])?;
    assert_plaintext_seen(&sniffer.stop()?)?;

    let world = stage.start()?;
    let sniffer = world.sniff()?;
    let [vip4, vip6] = testbed::addresses::vips(1);
    for url in [
        format!("http://{v4}:8080/"),
        format!("http://[{v6}]:8080/"),
        format!("http://{vip4}/"),
        format!("http://[{vip6}]/"),
    ] {
        // Five requests on one connection; %{num_connects} says how many connections each took.
        let mut command = vec!["curl", "-sS", "-w", " %{num_connects} %{remote_ip} %{http_code}\n"];
        command.extend([url.as_str(); 5]);
        let text = world.client.check(&command)?;
        let lines: Vec<_> = text.lines().collect();
        ensure!(lines.len() == 5, "{text}");
        for (i, line) in lines.iter().enumerate() {
            ensure!(line.starts_with(MARKER) && line.ends_with("200"), "{line}");
            ensure!(line.contains(if i == 0 { " 1 " } else { " 0 " }), "keep-alive was not kept: {text}");
            // getpeername answers what was dialled.
            let dialled = url
                .trim_start_matches("http://")
                .trim_end_matches('/')
                .trim_end_matches(":8080")
                .trim_matches(['[', ']']);
            ensure!(
                line.contains(&format!(" {dialled} ")),
                "curl thinks it is connected to something else than {dialled}: {line}"
            );
        }
    }
    assert_encrypted(&sniffer.stop()?)?;
    let log = nginx.access_log(21)?;
    ensure!(log.len() == 21, "{log:?}");
    for line in &log {
        let source = line.split(' ').next().unwrap_or_default().trim_start_matches("::ffff:");
        ensure!(
            source == world.client.ipv4().to_string() || source == world.client.ipv6().to_string(),
            "nginx saw {line}"
        );
    }
    Ok(())
}

#[test]
fn v4_mapped_clients_and_address_answers() -> Result<()> {
    let world = World::new("mapped")?;
    let _echo = serve(&world.server, 8080, &[])?;
    let sniffer = world.sniff()?;
    let (server, client) = (world.server.ipv4(), world.client.ipv4());
    let to = format!("[::ffff:{server}]:8080");
    let answer = app(&world.client, &["request", &to, "--line", MARKER])?;
    ensure!(answer["peer"] == to, "getpeername: {answer}");
    let local = answer["local"].as_str().context("local")?;
    ensure!(local.starts_with(&format!("[::ffff:{client}]:")), "getsockname: {answer}");
    for (to, local) in [(at(server, 8080), at(client, 0)), (at(world.server.ipv6(), 8080), at(world.client.ipv6(), 0))]
    {
        let answer = app(&world.client, &["request", &to, "--line", MARKER])?;
        ensure!(answer["peer"] == to.as_str(), "getpeername: {answer}");
        let got = answer["local"].as_str().context("local")?;
        ensure!(got.starts_with(local.trim_end_matches('0')), "getsockname: {answer}, expected {local}");
    }
    // An application that binds its own address first.
    let bound = app(&world.client, &["request", &at(server, 8080), "--bind", &client.to_string(), "--line", MARKER])?;
    ensure!(bound["peer"] == at(server, 8080).as_str(), "{bound}");
    assert_encrypted(&sniffer.stop()?)
}

#[test]
fn two_hundred_megabytes_both_ways_at_once_with_checksums() -> Result<()> {
    let world = World::new("bulk")?;
    let _bulk = serve(&world.server, 8080, &["--mode", "bulk"])?;
    let sniffer = world.sniff()?;
    let each = scaled(200 << 20);
    let (bytes, timeout) = (each.to_string(), patience(Duration::from_secs(85)).as_secs().to_string());
    let report = app(
        &world.client,
        &["bulk", &at(world.server.ipv4(), 8080), "--up", &bytes, "--down", &bytes, "--timeout", &timeout],
    )?;
    ensure!(report["up"] == each, "{report}");
    let capture = sniffer.stop()?;
    ensure!(capture.tcp_15008_payload > 0 && capture.plaintext_payload == 0 && capture.marker_hits == 0, "{capture:?}");
    ensure!(capture.bytes > 2 * each, "the bulk did not cross the wire: {capture:?}");
    Ok(())
}

#[test]
fn slow_reader_is_backpressure_not_memory() -> Result<()> {
    let world = World::new("slow")?;
    let _bulk = serve(&world.server, 8080, &["--mode", "bulk"])?;
    let before = rss_kib(world.a.process()?.pid())?;
    let arguments = [
        "bulk",
        &at(world.server.ipv4(), 8080),
        "--up",
        "1000",
        "--down",
        "12000000",
        "--chunk",
        "65536",
        "--pause-ms",
        "20",
    ];
    app(&world.client, &arguments)?;
    let after = rss_kib(world.a.process()?.pid())?;
    ensure!(after < before + 8 * 1024, "the agent grew from {before} to {after} KiB for one slow reader");
    Ok(())
}

fn rss_kib(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).context("VmRSS")?;
    Ok(line.split_whitespace().nth(1).context("value")?.parse()?)
}

#[test]
fn redis_pipelines() -> Result<()> {
    let world = World::new("redis")?;
    let _redis = Redis::start(&world.server, 6379)?;
    let sniffer = world.sniff()?;
    let host = world.server.ipv4().to_string();
    let redis = ["redis-cli", "-h", &host];
    let run = |arguments: &[&str]| world.client.check(&[&redis[..], arguments].concat());
    ensure!(run(&["set", "key", MARKER])?.trim() == "OK");
    ensure!(run(&["get", "key"])?.trim() == MARKER);
    let requests = scaled(20_000).to_string();
    let bench = world.client.check(&[
        "redis-benchmark",
        "-h",
        &host,
        "-t",
        "set,get",
        "-n",
        &requests,
        "-P",
        "16",
        "-c",
        "20",
        "--csv",
    ])?;
    ensure!(bench.lines().filter(|l| l.contains("SET") || l.contains("GET")).count() == 2, "{bench}");
    assert_encrypted(&sniffer.stop()?)
}

#[test]
fn server_speaks_first_and_half_close_in_both_orders() -> Result<()> {
    let world = World::new("halves")?;
    let _banner = serve(&world.server, 8081, &["--mode", "banner"])?;
    let _digest = serve(&world.server, 8082, &["--mode", "digest"])?;
    let _close = serve(&world.server, 8083, &["--mode", "close"])?;
    let sniffer = world.sniff()?;
    let ip = world.server.ipv4();
    ensure!(app(&world.client, &["greeting", &at(ip, 8081)])?["greeting"] == "hello");
    // Request, then half-close, then the response: the answer depends on the end of the request.
    for bytes in ["0", "1", "16384", "16385", "3000000"] {
        app(&world.client, &["half-close", &at(ip, 8082), "--bytes", bytes])?;
    }
    // The server ends at once; the client sees a clean end.
    let report = app(&world.client, &["connect", &at(ip, 8083), "--read"])?;
    ensure!(report["received"] == "", "{report}");
    assert_encrypted(&sniffer.stop()?)
}

#[test]
fn resets_pass_through_in_both_directions() -> Result<()> {
    let world = World::new("resets")?;
    let server = serve(&world.server, 8080, &["--print"])?;
    let _reset = serve(&world.server, 8081, &["--mode", "reset", "--after", "5"])?;
    let ip = world.server.ipv4();
    // The client resets; the server must see a reset, not an end.
    app(&world.client, &["reset", &at(ip, 8080)])?;
    let seen = server.wait_json("error", Duration::from_secs(10))?;
    ensure!(seen["error"] == "ECONNRESET", "the server saw {seen}");
    // The server resets; the client must see it.
    let error = app_error(&world.client, &["connect", &at(ip, 8081), "--send", "12345", "--read"])?;
    ensure!(error == "ECONNRESET", "the client saw {error}");
    Ok(())
}

#[test]
fn refused_upstream_is_a_reset_and_counted() -> Result<()> {
    let world = World::new("refused")?;
    let error = app_error(&world.client, &["request", &at(world.server.ipv4(), 9999)])?;
    ensure!(error == "ECONNRESET", "{error}");
    wait_counter(&world.b, "refused.upstream-unreachable", 1)?;
    wait_counter(&world.a, "refused.peer-upstream-unreachable", 1)
}

#[test]
fn five_hundred_parallel_short_connections() -> Result<()> {
    let world = World::new("many")?;
    let _echo = serve(&world.server, 8080, &[])?;
    let sniffer = world.sniff()?;
    let count = scaled(500);
    let (all, at_once, to) = (count.to_string(), scaled(100).to_string(), at(world.server.ipv4(), 8080));
    let report = app(&world.client, &["parallel", &to, "--count", &all, "--concurrency", &at_once])?;
    ensure!(report["ok"] == count, "{report}");
    assert_encrypted(&sniffer.stop()?)?;
    // Nothing stays behind.
    eventually(Duration::from_secs(10), || {
        let left = live(&world.a)?;
        ensure!(left == 0, "{left} connections are still in the table");
        Ok(())
    })
}

#[test]
fn same_node_pods_and_hairpin() -> Result<()> {
    let mut stage = Stage::new("hairpin")?;
    let neighbour = stage.bed.node("a").pod("neighbour")?;
    stage.mesh.enroll(&neighbour);
    let client = stage.client.clone();
    stage.mesh.service("own", 2, &[(80, 8080)], &[&client]);
    let world = stage.start()?;
    let _near = serve(&neighbour, 8080, &["--print"])?;
    let own = serve(&world.client, 8080, &["--print"])?;
    // On the node's bridge, where same-node traffic passes.
    let sniffer = Sniffer::start(world.bed.node("a").namespace(), &SnifferOptions::markers([MARKER]))?;
    app(&world.client, &["request", &at(neighbour.ipv4(), 8080), "--line", MARKER])?;
    assert_encrypted(&sniffer.stop()?)?;
    // A pod that dials a VIP and is chosen itself.
    let [vip, _] = testbed::addresses::vips(2);
    app(&world.client, &["request", &at(vip, 80), "--line", MARKER])?;
    let seen = own.wait_json("peer", Duration::from_secs(10))?;
    let peer = seen["peer"].as_str().context("peer")?;
    ensure!(peer.contains(&world.client.ipv4().to_string()), "the hairpin's source is {peer}");
    Ok(())
}
