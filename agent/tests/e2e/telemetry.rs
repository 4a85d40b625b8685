//! What operators and their tools see on the node's ports and on the agent's standard output.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testbed::{Node, Process};

use crate::world::{Stage, World, app, app_error, at, data_path, eventually, serve};

/// What the agent of a node answers, with the status in front.
pub fn http(node: &Node, method: &str, url: &str) -> Result<(u16, String)> {
    let mut curl = node.command("curl");
    curl.args(["-sS", "-X", method, "-w", "\n%{http_code}", url]);
    let output = Process::spawn(&mut curl)?.output(Duration::from_secs(20))?.success()?;
    let (body, status) = output.trim_end().rsplit_once('\n').with_context(|| output.clone())?;
    Ok((status.parse()?, body.to_owned()))
}

pub fn get(node: &Node, port: u16, path: &str) -> Result<String> {
    let (status, body) = http(node, "GET", &format!("http://127.0.0.1:{port}{path}"))?;
    ensure!(status == 200, "{path}: {status} {body}");
    Ok(body)
}

/// The value of the one sample that has all these pieces.
fn sample(metrics: &str, pieces: &[&str]) -> Result<f64> {
    let mut found = metrics.lines().filter(|line| !line.starts_with('#') && pieces.iter().all(|p| line.contains(p)));
    let line = found.next().with_context(|| format!("no sample with {pieces:?} in {metrics}"))?;
    ensure!(found.next().is_none(), "several samples with {pieces:?} in {metrics}");
    Ok(line.rsplit(' ').next().unwrap_or_default().parse()?)
}

/// Waits until a sample has a value: ends of connections are counted a moment after applications see them.
fn wait_sample(node: &Node, pieces: &[&str], value: f64) -> Result<()> {
    eventually(Duration::from_secs(10), || {
        let now = sample(&get(node, 15020, "/metrics")?, pieces)?;
        ensure!((now - value).abs() < 1e-9, "{pieces:?} is {now}, not {value}");
        Ok(())
    })
}

#[test]
fn istios_metrics_and_the_access_log_tell_who_talked_to_whom() -> Result<()> {
    let mut stage = Stage::new("metrics")?;
    let other = stage.bed.node("a").pod("other")?;
    stage.mesh.enroll(&other);
    let client = "cluster.local/ns/default/sa/client";
    let rules = json!([{ "from": [{ "source": { "principals": [client] } }] }]);
    stage
        .mesh
        .policies
        .push(json!({ "name": "only-client", "namespace": "default", "action": "ALLOW", "rules": rules }));
    let world = stage.start()?;
    let _echo = serve(&world.server, 8080, &[])?;
    let [vip, _] = testbed::addresses::vips(1);
    for _ in 0..3 {
        app(&world.client, &["request", &at(vip, 80)])?;
    }
    ensure!(app_error(&other, &["request", &at(world.server.ipv4(), 8080)])? == "ECONNRESET");
    let (a, b) = (world.bed.node("a"), world.bed.node("b"));
    let ends = [
        r#"source_workload="client""#,
        r#"source_principal="spiffe://cluster.local/ns/default/sa/client""#,
        r#"destination_workload="server""#,
        r#"destination_principal="spiffe://cluster.local/ns/default/sa/server""#,
        r#"destination_service="web.default.svc.cluster.local""#,
        r#"connection_security_policy="mutual_tls""#,
        r#"response_flags="-""#,
    ];
    let with = |name| [&[name][..], &ends[..]].concat();
    for (node, reporter) in [(a, r#"reporter="source""#), (b, r#"reporter="destination""#)] {
        wait_sample(node, &[&with("istio_tcp_connections_opened_total")[..], &[reporter]].concat(), 3.0)?;
        wait_sample(node, &[&with("istio_tcp_connections_closed_total")[..], &[reporter]].concat(), 3.0)?;
        wait_sample(node, &[&with("istio_tcp_sockets_open")[..], &[reporter]].concat(), 0.0)?;
    }
    // Both agents count the same bytes the same way round.
    let bytes = |node: &Node, name| sample(&get(node, 15020, "/stats/prometheus")?, &with(name));
    for name in ["istio_tcp_sent_bytes_total", "istio_tcp_received_bytes_total"] {
        let (client, server) = (bytes(a, name)?, bytes(b, name)?);
        ensure!(client > 0.0 && (client - server).abs() < 1e-9, "{name}: {client} and {server}");
    }
    let denied = ["istio_tcp_connections_failed_total", r#"response_flags="DENY""#, r#"sa/other""#];
    wait_sample(b, &denied, 1.0)?;
    wait_sample(b, &["underpass_refusals_total", r#"reason="policy""#], 1.0)?;
    let path = data_path(&world.a)?;
    let metrics = get(a, 15020, "/metrics")?;
    ensure!(sample(&metrics, &["underpass_bytes_total", &format!("data_path=\"{path}\""), "to=\"upstream\""])? > 0.0);
    ensure!(sample(&metrics, &["underpass_handshake_duration_seconds_count", "role=\"client\""])? >= 3.0);
    ensure!(sample(&metrics, &["underpass_bpf_events_total", "event=\"captured\""])? >= 4.0);
    ensure!(sample(&metrics, &["underpass_bpf_map_entries", "map=\"PODS\""])? >= 2.0);

    // Lines come behind the counts: through a queue.
    let line = world.b.wait_log("connection complete", Duration::from_secs(10))?;
    for part in [
        "INFO access: connection complete",
        "src.workload=\"client\" src.namespace=\"default\" src.identity=spiffe://cluster.local/ns/default/sa/client",
        "dst.service=\"web.default.svc.cluster.local\" dst.workload=\"server\"",
        "direction=inbound",
        &format!("data_path={path} cipher=TLS13_"),
        "reason=finished response_flags=-",
    ] {
        ensure!(line.contains(part), "{part:?} is not in {line}");
    }
    let trace =
        line.split(" trace_id=").nth(1).and_then(|rest| rest.split(' ').next()).context("no trace_id")?.to_owned();
    ensure!(world.a.wait_log(&trace, Duration::from_secs(10))?.contains("direction=outbound"));
    let line = world.b.wait_log("connection failed", Duration::from_secs(10))?;
    ensure!(line.contains("sa/other") && line.contains("reason=policy response_flags=DENY"), "{line}");
    Ok(())
}

/// A namespace can be switched off, and switched on again without a restart.
#[test]
fn namespaces_choose_their_lines() -> Result<()> {
    let stage = Stage::new("lines")?;
    let world = stage.start_with(&["--access-log", "off"])?;
    let _echo = serve(&world.server, 8080, &[])?;
    let to = at(world.server.ipv4(), 8080);
    let node = world.bed.node("b");
    let closed = ["underpass_connections_closed_total", "reason=\"finished\""];
    app(&world.client, &["request", &to])?;
    wait_sample(node, &closed, 1.0)?;
    let mut document: Value = serde_json::from_str(&world.mesh.document(node))?;
    document["accessLog"] = json!({ "namespaces": [{ "name": "default", "enabled": true }] });
    let before = crate::world::generation(&world.b.status()?)?;
    world.b.write_config(&document.to_string())?;
    world.b.wait_status(Duration::from_secs(20), |s| Ok(crate::world::generation(s)? > before))?;
    app(&world.client, &["request", &to])?;
    let line = world.b.wait_log("connection complete", Duration::from_secs(10))?;
    ensure!(line.contains(" id=2 "), "the first connection has a line: {line}");
    Ok(())
}

#[test]
fn the_nodes_tools_are_answered() -> Result<()> {
    let mut world = World::new("admin")?;
    let node = world.bed.node("a").clone();
    let mut ready = String::new();
    eventually(Duration::from_secs(20), || {
        ready = get(&node, 15021, "/healthz/ready")?;
        Ok(())
    })?;
    for condition in ["configuration: ok", "certificates: ok: 1 of 1", "bpf: ok", "listeners: ok: 1 of 1"] {
        ensure!(ready.contains(condition), "{ready}");
    }
    ensure!(get(&node, 15021, "/healthz/live")?.trim() == "ok");

    let dump: Value = serde_json::from_str(&get(&node, 15000, "/config_dump")?)?;
    let names: Vec<_> = dump["workloads"].as_array().context("workloads")?.iter().map(|w| &w["name"]).collect();
    ensure!(names == ["client", "server"], "{names:?}");
    ensure!(dump["certificates"][0]["state"] == "Available", "{}", dump["certificates"]);
    ensure!(!dump.to_string().contains("PRIVATE"));

    let admin = "http://127.0.0.1:15000";
    ensure!(get(&node, 15000, "/logging")?.contains("info"));
    let (status, answer) = http(&node, "POST", &format!("{admin}/logging?level=underpass::relay:debug,info"))?;
    ensure!(status == 200 && answer.contains("underpass::relay=debug"), "{status} {answer}");
    let (status, answer) = http(&node, "POST", &format!("{admin}/logging?level=x=loud"))?;
    ensure!(status == 400 && answer.contains("write a level"), "{status} {answer}");
    let (status, answer) = http(&node, "POST", &format!("{admin}/logging?reset"))?;
    ensure!(status == 200 && !answer.contains("debug"), "{status} {answer}");

    // Not from the pods, and not from other nodes.
    let (node_b, to) = (world.bed.node("b"), testbed::addresses::pod_v4(0, 1));
    let mut curl = node_b.command("curl");
    curl.args(["-sS", "--max-time", "5", &format!("http://{to}:15000/config_dump")]);
    ensure!(!Process::spawn(&mut curl)?.output(Duration::from_secs(20))?.status.success());
    let (status, _) = http(node_b, "GET", &format!("http://{to}:15021/healthz/ready"))?;
    ensure!(status == 200, "probes and metrics are for the outside: {status}");

    let (status, answer) = http(&node, "POST", &format!("{admin}/quitquitquit"))?;
    ensure!(status == 200, "{status} {answer}");
    let process = world.a.process()?;
    ensure!(process.wait(Duration::from_secs(30))?.success(), "{}", world.a.log());
    // The ports are free again.
    world.a.restart()?;
    eventually(Duration::from_secs(20), || get(&node, 15021, "/healthz/ready").map(drop))
}

#[test]
fn a_port_in_use_is_told_before_anything_changes() -> Result<()> {
    let stage = Stage::new("ports")?;
    let node = stage.bed.node("a");
    let _a = crate::world::start_agent(&stage.mesh, node, &[])?;
    let config = node.dir("second")?.join("node.yaml");
    std::fs::write(&config, stage.mesh.document(node))?;
    let mut second = node.command(testbed::underpass_path()?);
    second.arg("run").arg("--config").arg(&config).arg("--cgroup").arg(node.pods_cgroup());
    for (option, directory) in [("--state-dir", "second/state"), ("--run-dir", "second/run")] {
        second.arg(option).arg(node.dir(directory)?);
    }
    let output = Process::spawn(&mut second)?.output(Duration::from_secs(20))?;
    ensure!(!output.status.success(), "{}", output.stderr);
    let expected = "listening on 127.0.0.1:15000; choose another address with --admin-addr, or --admin-addr off";
    ensure!(output.stderr.contains(expected), "{}", output.stderr);
    Ok(())
}
