//! Kubelet probes get through STRICT and policies, on the ports that are declared for them; nothing
//! else that the node sends does.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testbed::{
    Mode, Nginx, Node, Output, Pod, Process,
    addresses::{pod_v4, pod_v6},
    app_path,
};

use crate::world::{Stage, World, app, app_error, at, counter, eventually, serve, wait_counter};

/// How long a client waits that gets no answer.
const DROPPED: &str = "3";

/// `testbed-app request` on a node, in one of its cgroups.
fn request(node: &Node, cgroup: &Path, to: &str) -> Result<Output> {
    let mut command = node.command_in(cgroup, app_path()?);
    Process::spawn(command.args(["request", to, "--timeout", DROPPED]))?.output(Duration::from_mins(1))
}

fn passes(node: &Node, cgroup: &Path, to: &str) -> Result<()> {
    request(node, cgroup, to)?.success().with_context(|| format!("a probe from {} to {to}", cgroup.display())).map(drop)
}

fn is_refused(node: &Node, cgroup: &Path, to: &str) -> Result<()> {
    let error = request(node, cgroup, to)?.last_json()?;
    ensure!(error["error"] == "ECONNREFUSED", "from {} to {to}: {error}", cgroup.display());
    Ok(())
}

/// Declares ports of the server for probes.
fn declare(stage: &mut Stage, ports: &[u16]) -> Result<()> {
    stage.mesh.workload("server").enroll.as_mut().context("enrolled")?.probe_ports = ports.to_vec();
    Ok(())
}

/// Has a cgroup like the kubelet's made on each node, and that of `b` configured.
fn kubelets(stage: &mut Stage) -> Result<[PathBuf; 2]> {
    let [a, b] = ["a", "b"].map(|name| stage.bed.node(name).cgroup("kubelet.service"));
    let kubelets = [a?, b?];
    stage.mesh.probes.cgroups.push(stage.bed.node("b").cgroup_path(&kubelets[1])?);
    Ok(kubelets)
}

fn states(world: &World) -> Result<Value> {
    let list = world.b.status()?["probe_cgroups"].take();
    ensure!(list.is_array(), "no probe cgroups in the status");
    Ok(list.as_array().into_iter().flatten().map(|c| c["state"].clone()).collect())
}

/// An HTTP request, as of an `httpGet` probe.
fn curl(node: &Node, cgroup: &Path, url: &str) -> Result<Output> {
    let mut command = node.command_in(cgroup, "curl");
    Process::spawn(command.args(["-sS", "-o", "/dev/null", "--max-time", DROPPED, url]))?.output(Duration::from_mins(1))
}

/// Waits until plaintext from a pod is refused in a certain way.
fn wait_refused(world: &World, pod: &Pod, to: &str, how: &str) -> Result<()> {
    eventually(Duration::from_secs(20), || {
        let error = app_error(pod, &["request", to, "--timeout", DROPPED])?;
        ensure!(error == how, "{error}; log:\n{}", world.b.log());
        Ok(())
    })
}

#[test]
fn strict_lets_the_kubelet_in_and_nobody_else() -> Result<()> {
    let mut stage = Stage::new("probe")?;
    let [elsewhere, kubelet] = kubelets(&mut stage)?;
    let neighbour = stage.bed.node("b").pod("neighbour")?;
    stage.mesh.workload("server").mode = Some(Mode::Strict);
    declare(&mut stage, &[8080, 9090])?;
    let nginx = Nginx::start(&stage.server, 8080, "alive")?;
    let world = stage.start()?;
    let _tcp = serve(&world.server, 9090, &[])?;
    let _undeclared = serve(&world.server, 9091, &[])?;
    let (a, b) = (world.bed.node("a"), world.bed.node("b"));
    let below = b.cgroup("kubelet.service/worker")?;
    // A pod with the node's network: its cgroup is among the pods'.
    let host_network = b.cgroup("pods/hostnet")?;
    let beside = b.cgroup("kubelet.service-2")?;
    for host in [world.server.ipv4().to_string(), format!("[{}]", world.server.ipv6())] {
        let (http, tcp) = (format!("http://{host}:8080/"), format!("{host}:9090"));
        curl(b, &kubelet, &http)?.success()?;
        passes(b, &kubelet, &tcp)?;
        passes(b, &below, &tcp)?;
        for cgroup in [&b.own_cgroup(), &beside, &host_network] {
            is_refused(b, cgroup, &tcp)?;
        }
        ensure!(!curl(b, &host_network, &http)?.status.success(), "HTTP with the node's network");
        ensure!(app_error(&neighbour, &["request", &tcp, "--timeout", DROPPED])? == "ECONNREFUSED", "a pod beside it");
        // The kubelet's exemption ends where the pod's declarations end.
        is_refused(b, &kubelet, &format!("{host}:9091"))?;
        // The other node's kubelet.
        is_refused(a, &elsewhere, &tcp)?;
        // The agent's own ports are closed to everybody.
        is_refused(b, &kubelet, &format!("{host}:15006"))?;
        app(&world.client, &["request", &tcp])?;
    }
    ensure!(counter(&world.b, "bpf.inbound_probe")? == 6, "{}", world.b.counters()?);
    ensure!(counter(&world.b, "bpf.inbound_strict_dropped")? >= 12, "{}", world.b.counters()?);
    // What is let in is what the application sees: the node itself, nobody in between.
    for (line, node) in nginx.access_log(2)?.iter().zip([pod_v4(2, 1).to_string(), pod_v6(2, 1).to_string()]) {
        ensure!(line.starts_with(&node), "{line}");
    }
    Ok(())
}

#[test]
fn policies_do_not_stop_the_kubelet() -> Result<()> {
    let mut stage = Stage::new("probepol")?;
    let [_, kubelet] = kubelets(&mut stage)?;
    let neighbour = stage.bed.node("b").pod("neighbour")?;
    let policy = |name: &str, action: &str, rules: Value| json!({ "name": name, "namespace": "default", "action": action, "rules": rules });
    // No plaintext at all; then, only from an address that nobody has, which the agent is asked about.
    let none = policy("no-plaintext", "DENY", json!([{ "from": [{ "source": { "notPrincipals": ["*"] } }] }]));
    let blocks = policy("one-address", "ALLOW", json!([{ "from": [{ "source": { "ipBlocks": ["192.0.2.1"] } }] }]));
    stage.mesh.policies.push(none);
    declare(&mut stage, &[8080])?;
    let mut world = stage.start()?;
    let _echo = serve(&world.server, 8080, &[])?;
    let to = [at(world.server.ipv4(), 8080), at(world.server.ipv6(), 8080)];
    for (policy, refused) in [(None, "ECONNREFUSED"), (Some(blocks), "ECONNRESET")] {
        if let Some(policy) = policy {
            world.mesh.policies = vec![policy];
            world.reload()?;
            // Programs refuse plaintext until the pod's rules are written.
            wait_refused(&world, &neighbour, &to[0], refused)?;
        }
        for to in &to {
            passes(world.bed.node("b"), &kubelet, to)?;
            let error = app_error(&neighbour, &["request", to, "--timeout", DROPPED])?;
            ensure!(error == refused, "{error}, not {refused}");
        }
    }
    ensure!(counter(&world.b, "bpf.inbound_probe")? == 4, "{}", world.b.counters()?);
    Ok(())
}

#[test]
fn a_kubelet_that_is_restarted_is_recognised_again() -> Result<()> {
    let mut stage = Stage::new("probenew")?;
    let [_, kubelet] = kubelets(&mut stage)?;
    fs::remove_dir(&kubelet)?;
    // A mistake in the configuration opens nothing.
    stage.mesh.probes.cgroups.push(stage.bed.node("b").cgroup_path(&stage.bed.node("b").pods_cgroup())?);
    stage.mesh.workload("server").mode = Some(Mode::Strict);
    declare(&mut stage, &[8080])?;
    let world = stage.start()?;
    let _echo = serve(&world.server, 8080, &[])?;
    let (to, b) = (at(world.server.ipv4(), 8080), world.bed.node("b"));
    let active = |state: &'static str| {
        world.b.wait_status(Duration::from_secs(10), |s| Ok(s["probe_cgroups"][0]["state"] == state)).map(drop)
    };
    ensure!(states(&world)? == json!(["missing", "refused"]), "{}", states(&world)?);
    is_refused(b, &b.cgroup("pods/hostnet")?, &to)?;
    for _ in 0..2 {
        b.cgroup("kubelet.service")?;
        active("active")?;
        passes(b, &kubelet, &to)?;
        fs::remove_dir(&kubelet)?;
        active("missing")?;
    }
    Ok(())
}

/// By default the node's address opens nothing, which is what `NodePort` traffic comes with that was
/// masqueraded on the node. Where it is asked for, declared ports are open to it, whoever on the
/// node it is, and the status warns.
#[test]
fn declared_ports_take_probes_from_the_nodes_addresses() -> Result<()> {
    let mut stage = Stage::new("probecfg")?;
    let neighbour = stage.bed.node("b").pod("neighbour")?;
    stage.mesh.probes.node_addresses = vec![pod_v4(2, 1).into(), pod_v6(2, 1).into()];
    let server = stage.mesh.workload("server");
    server.mode = Some(Mode::Strict);
    server.enroll.as_mut().context("enrolled")?.probe_ports = vec![8080];
    let mut world = stage.start()?;
    let _declared = serve(&world.server, 8080, &[])?;
    let _other = serve(&world.server, 8081, &[])?;
    let (a, b) = (world.bed.node("a").clone(), world.bed.node("b").clone());
    let (a, b) = (&a, &b);
    for ip in [world.server.ipv4().into(), std::net::IpAddr::from(world.server.ipv6())] {
        let to = at(ip, 8080);
        passes(b, &b.own_cgroup(), &to)?;
        is_refused(b, &b.own_cgroup(), &at(ip, 8081))?;
        is_refused(a, &a.own_cgroup(), &to)?;
        ensure!(app_error(&neighbour, &["request", &to, "--timeout", DROPPED])? == "ECONNREFUSED", "a pod");
    }
    wait_counter(&world.b, "bpf.inbound_probe", 2)?;
    let status = world.b.status()?;
    let open: Vec<_> = [pod_v4(2, 1).to_string(), pod_v6(2, 1).to_string()].map(Value::from).into();
    ensure!(status["probe_node_addresses"] == Value::from(open), "{status}");
    // Taken back, the address is nobody's.
    world.mesh.probes.node_addresses.clear();
    world.mesh.probes.cgroups = vec!["/nobody".into()];
    world.reload()?;
    let to = at(world.server.ipv4(), 8080);
    eventually(Duration::from_secs(20), || is_refused(b, &b.own_cgroup(), &to))?;
    ensure!(world.b.status()?["probe_node_addresses"].is_null(), "{}", world.b.status()?);
    Ok(())
}

/// On the way to the pod's second address every packet is forwarded by the other node, and loses
/// its socket there.
#[test]
fn the_kubelet_is_recognised_where_packets_lose_their_socket() -> Result<()> {
    let mut stage = Stage::new("problost")?;
    let [_, kubelet] = kubelets(&mut stage)?;
    stage.mesh.workload("server").mode = Some(Mode::Strict);
    declare(&mut stage, &[8080])?;
    let (far4, far6) = stage.server.add_interface("eth1", stage.bed.node("a"))?;
    let mut world = stage.start()?;
    let _declared = serve(&world.server, 8080, &[])?;
    let _undeclared = serve(&world.server, 8081, &[])?;
    let b = world.bed.node("b").clone();
    let b = &b;
    let host_network = b.cgroup("pods/hostnet")?;
    let check = |world: &World, ip: std::net::IpAddr| -> Result<()> {
        passes(b, &kubelet, &at(ip, 8080))?;
        is_refused(b, &kubelet, &at(ip, 8081))?;
        for cgroup in [&b.own_cgroup(), &host_network] {
            is_refused(b, cgroup, &at(ip, 8080))?;
        }
        let pins = fs::read_dir(world.b.pin_root())?.next().context("a version's directory")??.path();
        let links = fs::read_dir(pins.join("links"))?.collect::<std::io::Result<Vec<_>>>()?;
        ensure!(links.iter().any(|link| link.file_name().to_string_lossy().starts_with("probe-")), "{links:?}");
        Ok(())
    };
    let far: [std::net::IpAddr; 2] = [far4.into(), far6.into()];
    for ip in far {
        check(&world, ip)?;
    }
    // While no agent runs, too; and with the program of the next one.
    world.b.kill()?;
    check(&world, far[0])?;
    world.b.restart()?;
    for ip in far {
        check(&world, ip)?;
    }
    // The control: nothing but the recording let these in.
    world.mesh.probes.cgroups.clear();
    world.mesh.probes.node_addresses = vec!["192.0.2.1".parse()?];
    world.reload()?;
    eventually(Duration::from_secs(20), || is_refused(b, &kubelet, &at(far[0], 8080)))
}
