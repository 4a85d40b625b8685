//! Attempts to get plaintext out of an enrolled pod, or in under STRICT. The sniffer's control is `http_with_keep_alive…` and the
//! control capture at the start of each test here.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use testbed::{Mode, Pod, Process, app_path};

use crate::world::{
    MARKER, Stage, World, app, app_error, assert_plaintext_seen, at, counter, eventually, serve, sniff, wait_counter,
};

/// How long a client waits that gets no answer.
const DROPPED: &str = "3";

/// Runs `testbed-app request` in the pod's network namespace but outside of its cgroup.
fn from_outside_the_cgroup(pod: &Pod, arguments: &[&str]) -> Result<testbed::Output> {
    Process::spawn(pod.command_outside_cgroup(app_path()?).args(arguments))?.output(Duration::from_mins(1))
}

#[test]
fn mptcp_nested_namespaces_foreign_cgroups_marks_and_second_interfaces_do_not_leak() -> Result<()> {
    let stage = Stage::new("bypass")?;
    let nested = stage.client.nested("inner")?;
    let _echo = serve(&stage.server, 8080, &[])?;
    let to = at(stage.server.ipv4(), 8080);
    let to6 = at(stage.server.ipv6(), 8080);
    // Controls: every one of these ways works, in plaintext, before the pods are enrolled.
    let sniffer = sniff(&stage.bed)?;
    app(&stage.client, &["request", &to, "--mptcp", "--line", MARKER])?;
    app(&nested, &["request", &to, "--line", MARKER])?;
    app(&nested, &["request", &to6, "--line", MARKER])?;
    from_outside_the_cgroup(&stage.client, &["request", &to, "--line", MARKER])?.success()?;
    assert_plaintext_seen(&sniffer.stop()?)?;

    // A process outside of the cgroup at enrolment would be refused, so it comes later.
    let world = stage.start_with(&["--log", "info,underpass::capture=debug"])?;
    // An interface added after enrolment, straight into the server's network.
    let (second, _) = world.client.add_interface("eth1", world.bed.node("b"))?;
    world.a.wait_log("guarded a new interface", Duration::from_secs(10))?;
    let dropped = counter(&world.a, "bpf.guard_dropped")?;
    let sniffer = world.sniff()?;
    let bridge = testbed::Sniffer::start(world.bed.node("b").namespace(), &testbed::SnifferOptions::markers([MARKER]))?;
    let attempt = ["--timeout", DROPPED, "--line", MARKER];
    let line = |first: &[&'static str], to: &str| -> Vec<String> {
        ["request", to].iter().chain(first).chain(&attempt).map(|s| (*s).to_owned()).collect()
    };
    // Captured or dropped, never plaintext: whether MPTCP reaches the connect hook depends on the kernel.
    let mptcp = line(&["--mptcp"], &to);
    let _ = world.client.app(&mptcp.iter().map(String::as_str).collect::<Vec<_>>())?.output(Duration::from_mins(1))?;
    for to in [&to, &to6] {
        let arguments = line(&[], to);
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        app_error(&nested, &arguments)?;
        let output = from_outside_the_cgroup(&world.client, &arguments)?;
        ensure!(!output.status.success(), "a process outside of the cgroup got through");
    }
    // The agent's mark is no passport.
    let marked = line(&["--mark", "0x539"], &to);
    let marked: Vec<_> = marked.iter().map(String::as_str).collect();
    ensure!(!from_outside_the_cgroup(&world.client, &marked)?.status.success(), "the mark let plaintext out");
    // Over the second interface.
    let source = second.to_string();
    let bound = ["request", &to, "--bind", &source, "--timeout", DROPPED, "--line", MARKER];
    ensure!(!from_outside_the_cgroup(&world.client, &bound)?.status.success(), "the second interface is not guarded");
    for capture in [sniffer.stop()?, bridge.stop()?] {
        ensure!(capture.marker_hits == 0, "plaintext: {capture:?}");
    }
    wait_counter(&world.a, "bpf.guard_dropped", dropped + 6)?;
    // The pod's own programs work over the second interface too.
    app(&world.client, &["request", &to, "--line", MARKER])?;
    Ok(())
}

#[test]
fn strict_refuses_plaintext_and_serves_the_mesh() -> Result<()> {
    let mut stage = Stage::new("strict")?;
    let outsider = stage.bed.node("a").pod("outsider")?;
    stage.mesh.workload("server").mode = Some(Mode::Strict);
    stage.mesh.workload("server").ports = vec![testbed::PortMode { port: 8081, mode: Mode::Permissive }];
    let world = stage.start()?;
    let _strict = serve(&world.server, 8080, &[])?;
    let _open = serve(&world.server, 8081, &[])?;
    for ip in [world.server.ipv4().to_string(), format!("[{}]", world.server.ipv6())] {
        let to = format!("{ip}:8080");
        ensure!(
            app_error(&outsider, &["request", &to, "--timeout", DROPPED])? == "ECONNREFUSED",
            "plaintext under STRICT"
        );
        app(&outsider, &["request", &format!("{ip}:8081")])?;
        app(&world.client, &["request", &to])?;
        // The agent's private ports are not reachable from outside.
        for port in [15001, 15006, 15053] {
            let error = app_error(&outsider, &["request", &format!("{ip}:{port}"), "--timeout", DROPPED])?;
            ensure!(error == "ECONNREFUSED", "{port}: {error}");
        }
    }
    ensure!(counter(&world.b, "bpf.inbound_strict_dropped")? >= 2, "{}", world.b.counters()?);
    // The STRICT pod's own connections out of the mesh still get their answers.
    let _outside = serve(&outsider, 9090, &[])?;
    app(&world.server, &["request", &at(outsider.ipv4(), 9090)])?;
    Ok(())
}

#[test]
fn switching_to_strict_destroys_admitted_plaintext_and_nothing_else() -> Result<()> {
    let mut stage = Stage::new("switch")?;
    let outsider = stage.bed.node("a").pod("outsider")?;
    stage.mesh.workload("server").mode = Some(Mode::Permissive);
    let mut world = stage.start()?;
    let _echo = serve(&world.server, 8080, &[])?;
    let to = at(world.server.ipv4(), 8080);
    let plaintext = outsider.app(&["expect-reset", &to])?;
    plaintext.wait_json("established", Duration::from_secs(10))?;
    let tunnelled = world.client.app(&["hold", &to, "--count", "5", "--exchange"])?;
    let held = tunnelled.wait_json("held", Duration::from_secs(20))?;
    ensure!(held["held"] == 5, "{held}");
    world.mesh.workload("server").mode = Some(Mode::Strict);
    world.reload()?;
    let output = plaintext.output(Duration::from_secs(10))?;
    ensure!(output.status.success(), "the plaintext connection was not reset: {}", output.stdout);
    let alive = tunnelled.output(Duration::from_secs(20))?.last_json()?;
    ensure!(alive["alive"] == 5, "tunnelled connections died too: {alive}");
    Ok(())
}

#[test]
fn a_pod_that_holds_the_agents_ports_is_refused_clearly() -> Result<()> {
    let stage = Stage::new("taken")?;
    let _holder = serve(&stage.client, 15001, &[])?;
    let _other = serve(&stage.server, 15008, &[])?;
    let (mesh, bed) = (stage.mesh, stage.bed);
    for (node, pod, port) in [("a", "client", "15001"), ("b", "server", "15008")] {
        let options = testbed::AgentOptions { ready_within: None, ..Default::default() };
        let agent = testbed::Agent::start(
            bed.node(node),
            &testbed::underpass_path()?,
            &mesh.document(bed.node(node)),
            options,
        )?;
        eventually(Duration::from_secs(20), || {
            let status = agent.status()?;
            let text = status["pods"].to_string();
            ensure!(text.contains("refused") && text.contains(port) && text.contains(pod), "{status}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_pod_outside_of_the_attach_point_is_refused_clearly() -> Result<()> {
    let stage = Stage::new("cgroup")?;
    let listen = at(stage.client.ipv4(), 7000);
    let outside = Process::spawn(stage.client.command_outside_cgroup(app_path()?).args(["serve", &listen]))?;
    outside.wait_json("listening", Duration::from_secs(10))?;
    let options = testbed::AgentOptions { ready_within: None, ..Default::default() };
    let node = stage.bed.node("a");
    let agent = testbed::Agent::start(node, &testbed::underpass_path()?, &stage.mesh.document(node), options)?;
    eventually(Duration::from_secs(20), || {
        let text = agent.status()?["pods"].to_string();
        ensure!(
            text.contains("refused") && text.contains("cgroup") && text.contains(&outside.pid().to_string()),
            "{text}"
        );
        Ok(())
    })?;
    // And it is taken in as soon as the reason is gone.
    outside.kill()?;
    agent.wait_status(Duration::from_secs(20), |s| Ok(s["pods"][0]["state"] == "enrolled"))?;
    Ok(())
}

#[test]
fn dialling_the_outbound_listener_directly_is_a_reset() -> Result<()> {
    let world = World::new("direct")?;
    for to in ["127.0.0.1:15001", "[::1]:15001", "[::1]:15103"] {
        let error = app_error(&world.client, &["request", to])?;
        ensure!(error == "ECONNRESET", "{to}: {error}");
    }
    wait_counter(&world.a, "refused.no-original-destination", 3)?;
    ensure!(Path::new(&world.a.pin_root()).exists());
    Ok(())
}

/// Refused plaintext fails at once, unless silence is asked for; and a change reaches pods that are
/// enrolled already.
#[test]
fn refused_plaintext_is_answered_unless_silence_is_asked_for() -> Result<()> {
    let mut stage = Stage::new("answer")?;
    let outsider = stage.bed.node("a").pod("outsider")?;
    stage.mesh.workload("server").mode = Some(Mode::Strict);
    stage.mesh.plaintext_refusal = Some("drop".into());
    let mut world = stage.start()?;
    let _echo = serve(&world.server, 8080, &[])?;
    let to = [at(world.server.ipv4(), 8080), at(world.server.ipv6(), 8080)];
    let refusal = |to: &str| app_error(&outsider, &["request", to, "--timeout", DROPPED]);
    for to in &to {
        ensure!(refusal(to)? == "timeout", "an answer from {to}");
    }
    world.mesh.plaintext_refusal = None;
    world.reload()?;
    for to in &to {
        eventually(Duration::from_secs(20), || {
            let error = refusal(to)?;
            ensure!(error == "ECONNREFUSED", "{to}: {error}");
            Ok(())
        })?;
        app(&world.client, &["request", to])?;
    }
    // Without an agent, the kernel answers.
    world.b.kill()?;
    for to in &to {
        let begun = std::time::Instant::now();
        ensure!(refusal(to)? == "ECONNREFUSED", "{to}, no agent");
        ensure!(begun.elapsed() < Duration::from_secs(1), "{to}: after {:?}", begun.elapsed());
    }
    Ok(())
}

/// A network that cuts packets to pieces: the tunnel and PERMISSIVE pods do not notice, STRICT
/// refuses as ever.
#[test]
fn fragments_reach_whoever_whole_packets_reach() -> Result<()> {
    let mut stage = Stage::new("pieces")?;
    let outsider = stage.bed.node("a").pod("outsider")?;
    stage.mesh.workload("server").ports = vec![testbed::PortMode { port: 8081, mode: Mode::Strict }];
    for pod in [&outsider, &stage.client, &stage.server] {
        // No "don't fragment" on what it sends.
        pod.namespace().sysctl(&[("net.ipv4.ip_no_pmtu_disc", "1")])?;
    }
    let world = stage.start()?;
    for name in ["a", "b"] {
        world.bed.node(name).namespace().ip("link set wire mtu 1300\n")?;
    }
    let _bulk = serve(&world.server, 8080, &["--mode", "bulk"])?;
    let _strict = serve(&world.server, 8081, &[])?;
    let to = at(world.server.ipv4(), 8080);
    let transfer = ["bulk", to.as_str(), "--up", "1000000", "--down", "1000000"];
    for pod in [&world.client, &outsider] {
        let before = created_fragments(&world)?;
        app(pod, &transfer).with_context(|| format!("from {}", pod.name()))?;
        ensure!(created_fragments(&world)? > before + 500, "{}: nothing was fragmented", pod.name());
    }
    ensure!(counter(&world.a, "tunnels_out")? == 1, "{}", world.a.counters()?);
    for agent in [&world.a, &world.b] {
        ensure!(counter(agent, "bpf.fragment_dropped")? == 0, "{}", agent.counters()?);
    }
    let refused = app_error(&outsider, &["request", &at(world.server.ipv4(), 8081), "--timeout", DROPPED])?;
    ensure!(refused == "ECONNREFUSED", "{refused}");
    Ok(())
}

/// `FragCreates` of both nodes.
fn created_fragments(world: &World) -> Result<u64> {
    let mut sum = 0;
    for name in ["a", "b"] {
        let snmp =
            world.bed.node(name).namespace().enter(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))??;
        let lines: Vec<Vec<&str>> =
            snmp.lines().filter(|line| line.starts_with("Ip:")).map(|line| line.split(' ').collect()).collect();
        let [names, values] = &lines[..] else { anyhow::bail!("not two lines about IP: {snmp}") };
        let at = names.iter().position(|name| *name == "FragCreates").context("FragCreates")?;
        sum += values[at].parse::<u64>()?;
    }
    Ok(sum)
}
