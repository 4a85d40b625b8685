//! Root in an enrolled pod tries to get plaintext to the mesh, with every means that a network
//! administrator of the pod has. What stops such a pod is the guard on the node's side of the pod's
//! interface. Each means works before the pods are enrolled.

use std::{
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{foreign::Foreign, namespace::Namespace};
use testbed::{Pod, Process, app_path};

use crate::world::{
    MARKER, Stage, World, app, assert_plaintext_seen, at, counter, eventually, serve, sniff, start_agent, wait_counter,
};

/// How long a client waits whose SYN is dropped.
const DROPPED: Duration = Duration::from_secs(3);

/// Writes a SYN that carries a payload to a packet socket, with and without the queueing
/// discipline, plain and with one and five VLAN tags of priority only, which every receiver takes
/// off.
const FRAMES: &str = r#"
import socket, struct, sys, time
source, destination, hop, port, payload, device, own = sys.argv[1:]
payload = payload.encode()
hello = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
deadline = time.monotonic() + 20
mac = None
while mac is None:
    hello.sendto(b"x", (hop, 9))
    entries = [line.split() for line in open("/proc/net/arp")]
    mac = next((e[3] for e in entries if e[0] == hop and e[5] == device and e[3] != "00:00:00:00:00:00"), None)
    assert time.monotonic() < deadline, "no neighbour"
raw = lambda text: bytes.fromhex(text.strip().replace(":", ""))
def checksum(b):
    b += b"\0" * (len(b) % 2)
    s = sum(struct.unpack("!%dH" % (len(b) // 2), b))
    s = (s >> 16) + (s & 0xffff)
    return ~(s + (s >> 16)) & 0xffff
def packet(sport):
    src, dst = socket.inet_aton(source), socket.inet_aton(destination)
    tcp = struct.pack("!HHIIBBHHH", sport, int(port), 1000, 0, 5 << 4, 2, 64000, 0, 0) + payload
    c = checksum(src + dst + struct.pack("!BBH", 0, 6, len(tcp)) + tcp)
    tcp = tcp[:16] + struct.pack("!H", c) + tcp[18:]
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0, src, dst)
    return ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:] + tcp
sport = 41000
for bypass in (0, 1):
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    s.bind((device, 0))
    s.setsockopt(263, 20, struct.pack("i", bypass))
    for tag in (b"", b"\x81\x00\x00\x00", 5 * b"\x81\x00\x00\x00"):
        sport += 1
        try: s.send(raw(mac) + raw(own) + tag + b"\x08\x00" + packet(sport))
        except OSError as e: assert e.errno == 105, e # ENOBUFS: the guard inside the pod
        print("sent", bypass, len(tag))
"#;

/// The number of frames that [`FRAMES`] sends, and of those whose destination is found.
const SENT: u64 = 6;
const JUDGED: u64 = 4;

fn frames(pod: &Pod, to: &Pod) -> Result<()> {
    let after = |text: &str, word: &str| text.split_whitespace().skip_while(|w| *w != word).nth(1).map(str::to_owned);
    let mac = after(&pod.check(&["ip", "-o", "link", "show", "dev", "eth0"])?, "link/ether");
    let mac = mac.context("eth0 has an Ethernet address")?;
    let (from, to) = (pod.ipv4().to_string(), to.ipv4().to_string());
    let hop = after(&pod.check(&["ip", "-o", "route", "get", &to])?, "via").unwrap_or_else(|| to.clone());
    let printed = pod.check(&["python3", "-c", FRAMES, &from, &to, &hop, "8080", MARKER, "eth0", &mac])?;
    ensure!(printed.lines().count() as u64 == SENT, "{printed}");
    Ok(())
}

fn from_outside_the_cgroup(pod: &Pod, to: &str) -> Result<testbed::Output> {
    let mut command = pod.command_outside_cgroup(app_path()?);
    command.args(["request", to, "--timeout", "3", "--line", MARKER]);
    Process::spawn(&mut command)?.output(Duration::from_mins(1))
}

fn stage(label: &str, tc: &str) -> Result<(World, Process)> {
    let stage = Stage::new(label)?;
    let echo = serve(&stage.server, 8080, &[])?;
    // The control: what the tests below do gets through while nothing is enrolled.
    let sniffer = sniff(&stage.bed)?;
    frames(&stage.client, &stage.server)?;
    app(&stage.client, &["request", &at(stage.server.ipv4(), 8080), "--line", MARKER])?;
    let capture = sniffer.stop()?;
    assert_plaintext_seen(&capture)?;
    ensure!(capture.marker_hits > SENT, "the frames were not seen: {capture:?}");
    let a = start_agent(&stage.mesh, stage.bed.node("a"), &["--tc", tc])?;
    let b = start_agent(&stage.mesh, stage.bed.node("b"), &["--tc", tc])?;
    let Stage { client, server, mesh, bed } = stage;
    Ok((World { a, b, client, server, mesh, bed }, echo))
}

fn no_plaintext(world: &World, what: &str, attempt: impl FnOnce() -> Result<()>) -> Result<()> {
    let sniffer = world.sniff()?;
    attempt().context(what.to_owned())?;
    let capture = sniffer.stop()?;
    ensure!(capture.dropped_by_kernel == 0, "the sniffer missed packets: {capture:?}");
    ensure!(capture.marker_hits == 0, "{what}: plaintext on the wire: {capture:?}");
    Ok(())
}

/// The guard that stands on the node's side of the client's interface, as `status` names it.
fn node_guard(world: &World) -> Result<serde_json::Value> {
    let status = world.a.status()?;
    let interfaces = status["interfaces"].as_array().with_context(|| format!("no interfaces in {status}"))?;
    Ok(interfaces.iter().find(|i| i["workload"] == "default/client").cloned().unwrap_or_default())
}

fn packet_sockets(label: &str, tc: &str) -> Result<()> {
    let (world, _echo) = stage(label, tc)?;
    let guard = node_guard(&world)?;
    ensure!(guard["node_guard"].is_string() && guard["kind"] == "veth" && guard["moved"] == false, "{guard}");
    let before = counter(&world.a, "bpf.guard_dropped")?;
    no_plaintext(&world, "packet sockets", || {
        frames(&world.client, &world.server)?;
        wait_counter(&world.a, "bpf.guard_dropped", before + JUDGED)
    })?;
    // Tunnels go on.
    app(&world.client, &["request", &at(world.server.ipv4(), 8080), "--line", MARKER])?;
    Ok(())
}

#[test]
fn packet_sockets_reach_nobody() -> Result<()> {
    packet_sockets("frames", "auto")
}

#[test]
fn packet_sockets_reach_nobody_with_clsact() -> Result<()> {
    packet_sockets("framesc", "clsact")
}

/// Root in the pod takes the guard inside the pod away, where that is possible.
#[test]
fn without_the_filters_in_the_pod_the_node_still_guards() -> Result<()> {
    let (world, _echo) = stage("filters", "clsact")?;
    world.client.check(&["tc", "qdisc", "del", "dev", "eth0", "clsact"])?;
    let before = counter(&world.a, "bpf.guard_dropped")?;
    no_plaintext(&world, "no filters in the pod", || {
        let output = from_outside_the_cgroup(&world.client, &at(world.server.ipv4(), 8080))?;
        ensure!(!output.status.success(), "plaintext got through: {}", output.stdout);
        frames(&world.client, &world.server)?;
        wait_counter(&world.a, "bpf.guard_dropped", before + JUDGED + 1)
    })
}

/// Moves the pod's interface into a nested namespace, with another name and address.
fn moved(world: &World) -> Result<Namespace> {
    let routes = world.client.check(&["ip", "-4", "route", "show"])?;
    let nested = Namespace::new()?;
    let address = world.client.ipv4();
    world.client.check(&["ip", "link", "set", "eth0", "netns", &nested.path(), "name", "moved0"])?;
    nested.ip(&format!("addr add {address}/24 dev moved0"))?;
    nested.ip("link set moved0 up")?;
    if let Some(gateway) = routes.lines().find_map(|line| line.strip_prefix("default via ")?.split(' ').next()) {
        nested.ip(&format!("route add default via {gateway}"))?;
    }
    Ok(nested)
}

fn from_a_nested_namespace(label: &str, tc: &str) -> Result<()> {
    let (mut world, _echo) = stage(label, tc)?;
    let nested = moved(&world)?;
    eventually(Duration::from_secs(10), || {
        let guard = node_guard(&world)?;
        ensure!(guard["moved"] == true && guard["node_guard"].is_string(), "{guard}");
        Ok(())
    })?;
    let to = SocketAddr::new(world.server.ipv4().into(), 8080);
    let dial = |world: &World, what: &str| {
        let before = counter(&world.a, "bpf.guard_dropped")?;
        no_plaintext(world, what, || {
            let connected = nested.enter(|| TcpStream::connect_timeout(&to, testbed::pace::patience(DROPPED)))?;
            ensure!(connected.is_err(), "a connection from the nested namespace");
            wait_counter(&world.a, "bpf.guard_dropped", before + 1)
        })
    };
    dial(&world, "moved")?;
    // Nor after a new agent, which finds no interface in the pod any more.
    world.a.kill()?;
    world.a.restart()?;
    world.a.wait_ready(testbed::pace::patience(Duration::from_secs(20)))?;
    let guard = node_guard(&world)?;
    ensure!(guard["moved"] == true && guard["node_guard"].is_string(), "{guard}");
    dial(&world, "moved, and the agent is a new one")
}

#[test]
fn a_moved_interface_stays_guarded() -> Result<()> {
    from_a_nested_namespace("moved", "auto")
}

#[test]
fn a_moved_interface_stays_guarded_with_clsact() -> Result<()> {
    from_a_nested_namespace("movedc", "clsact")
}

/// An interface without an end on this node has only the guard inside the pod, and `status` says
/// so.
#[test]
fn what_the_node_cannot_guard_is_said() -> Result<()> {
    let world = World::new("bare")?;
    world.client.add_interface("net1", world.bed.node("b"))?;
    eventually(Duration::from_secs(10), || {
        let status = world.a.status()?;
        let interfaces = status["interfaces"].as_array().with_context(|| format!("no interfaces in {status}"))?;
        let net1 = interfaces.iter().find(|i| i["interface"] == "net1").with_context(|| format!("{interfaces:?}"))?;
        ensure!(net1["node_guard"].is_null() && net1["kind"] == "veth", "{net1}");
        Ok(())
    })?;
    Ok(())
}

/// The name of the other end of a pod's `eth0`, on the node.
fn node_end(pod: &Pod) -> Result<String> {
    let inside = pod.check(&["ip", "-o", "link", "show", "dev", "eth0"])?;
    let index = inside.split("eth0@if").nth(1).and_then(|rest| rest.split(':').next()).context("eth0 has an end")?;
    let links = pod.node().namespace().ip("link show\n")?;
    let line = links.lines().find_map(|line| line.strip_prefix(&format!("{index}: ")));
    let name = line.and_then(|line| line.split(['@', ':']).next()).with_context(|| format!("{index} in {links}"))?;
    Ok(name.to_owned())
}

/// A network plugin that was there first, with a filter of the highest priority that accepts every
/// packet.
fn behind_a_network_plugin(label: &str, tc: &str) -> Result<()> {
    let stage = Stage::new(label)?;
    let _echo = serve(&stage.server, 8080, &[])?;
    let port = node_end(&stage.client)?;
    let pin = stage.bed.pin("plugin");
    let plugin = Foreign::pinned_acceptor(&pin)?;
    let pinned = pin.to_str().context("a path in UTF-8")?;
    let tc_on_the_node = |arguments: &[&str]| -> Result<()> {
        let run = || std::process::Command::new("tc").args(arguments).output();
        let output = stage.bed.node("a").namespace().enter(run)?.context("running tc")?;
        ensure!(output.status.success(), "tc {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    tc_on_the_node(&["qdisc", "add", "dev", &port, "clsact"])?;
    let filter = ["filter", "add", "dev", port.as_str(), "ingress", "prio", "1", "handle", "1", "bpf", "da"];
    tc_on_the_node(&[&filter[..], &["object-pinned", pinned]].concat())?;
    std::fs::remove_file(&pin).context("removing a pin")?;
    let a = start_agent(&stage.mesh, stage.bed.node("a"), &["--tc", tc])?;
    let b = start_agent(&stage.mesh, stage.bed.node("b"), &["--tc", tc])?;
    let Stage { client, server, mesh, bed } = stage;
    let mut world = World { a, b, client, server, mesh, bed };
    for when in ["at first", "after a restart"] {
        let (before, runs) = (counter(&world.a, "bpf.guard_dropped")?, plugin.runs()?);
        no_plaintext(&world, when, || {
            frames(&world.client, &world.server)?;
            wait_counter(&world.a, "bpf.guard_dropped", before + JUDGED)
        })?;
        app(&world.client, &["request", &at(world.server.ipv4(), 8080), "--line", MARKER])?;
        ensure!(plugin.runs()? > runs, "{when}: the plugin's own program runs no more");
        world.a.kill()?;
        world.a.restart()?;
        world.a.wait_ready(testbed::pace::patience(Duration::from_secs(20)))?;
    }
    Ok(())
}

#[test]
fn the_guard_comes_before_a_network_plugins_program() -> Result<()> {
    behind_a_network_plugin("plugin", "auto")
}

#[test]
fn the_guard_comes_before_a_network_plugins_program_with_clsact() -> Result<()> {
    behind_a_network_plugin("pluginc", "clsact")
}
