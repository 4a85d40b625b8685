//! The guard on the node's side of a pod's interface: its decisions over crafted packets, and what
//! it sees on a real pair.

use std::{
    net::{IpAddr, SocketAddr, TcpListener},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    namespace::{Namespace, accept, eventually},
    object::{Direction::NodeGuard, Loaded, POD},
    packet::{ACK, Extension, Link, Packet, SYN},
};
use libbpf_rs::TC_INGRESS;
use nix::{errno::Errno, libc, net::if_::if_nametoindex};
use socket2::{Domain, Socket, Type};
use underpass_abi::{
    Counter::{self, FragmentDropped, GuardDropped, GuardUnparsable},
    DIRECTION_OUTBOUND, PORT_EXCLUDED, TUNNEL_PORT, programs,
};

/// The interface that `BPF_PROG_TEST_RUN` gives a packet: loopback.
const LOOPBACK: u32 = 1;

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address in a test")
}

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address and port in a test")
}

fn tcp(dst: &str, flags: u8) -> Packet {
    let dst = at(dst);
    Packet::tcp(if dst.is_ipv4() { at("10.9.0.1:40000") } else { at("[fd09::1]:40000") }, dst, flags)
}

#[test]
fn only_tunnels_and_exclusions_pass_to_the_mesh() -> Result<()> {
    let loaded = Loaded::new()?;
    loaded.pod_by_id(0)?;
    loaded.node_interface(LOOPBACK, POD)?;
    loaded.mesh(ip("10.1.0.0"), 16, true)?;
    loaded.mesh(ip("fd01::"), 32, true)?;
    loaded.exclude(POD, ip("10.1.7.0"), 24)?;
    loaded.port_rule(POD, 81, DIRECTION_OUTBOUND, PORT_EXCLUDED)?;
    let excluded: [(&str, Packet); 2] =
        [("an excluded network", tcp("10.1.7.1:80", SYN)), ("an excluded port", tcp("[fd01::5]:81", SYN))];
    let cases: [(&str, Packet, Option<Counter>); 9] = [
        ("SYN", tcp("10.1.2.3:80", SYN), Some(GuardDropped)),
        ("SYN, IPv6", tcp("[fd01::5]:80", SYN), Some(GuardDropped)),
        (
            "SYN behind an extension header",
            tcp("[fd01::5]:80", SYN).extensions(&[Extension::HopByHop(8)]),
            Some(GuardDropped),
        ),
        ("a later fragment", tcp("10.1.2.3:80", SYN).fragment(1, false), Some(FragmentDropped)),
        ("half a header", tcp("10.1.2.3:80", SYN).payload_of(8), Some(GuardUnparsable)),
        ("a tunnel's SYN", tcp("10.1.2.3:15008", SYN), None),
        ("a tunnel's SYN, IPv6", tcp("[fd01::5]:15008", SYN), None),
        ("ACK", tcp("10.1.2.3:80", ACK), None),
        ("SYN elsewhere", tcp("10.2.2.3:80", SYN), None),
    ];
    for (case, packet, expected) in &cases {
        loaded.expect(NodeGuard, case, packet, *expected)?;
    }
    for (case, packet) in &excluded {
        loaded.expect(NodeGuard, case, packet, None)?;
    }
    // An interface that nobody has a pod for: nothing is excluded, and a tunnel still passes.
    loaded.delete("NODE_INTERFACES", &LOOPBACK)?;
    for (case, packet, expected) in &cases {
        loaded.expect(NodeGuard, &format!("{case}, unknown interface"), packet, *expected)?;
    }
    for (case, packet) in &excluded {
        loaded.expect(NodeGuard, &format!("{case}, unknown interface"), packet, Some(GuardDropped))?;
    }
    Ok(())
}

/// A pod and the node that it is connected to; the guard is on the node's side only.
struct Pair {
    pod: Namespace,
    node: Namespace,
}

impl Pair {
    fn new() -> Result<Self> {
        let (pod, node) = (Namespace::new()?, Namespace::new()?);
        pod.connect(&node)?;
        Ok(Self { pod, node })
    }

    fn guard(&self) -> Result<Loaded> {
        self.node.enter(|| -> Result<Loaded> {
            let loaded = Loaded::new()?;
            loaded.pod_by_id(0)?;
            loaded.node_interface(if_nametoindex("eth0")?, POD)?;
            loaded.mesh(ip("10.9.0.2"), 32, true)?;
            loaded.mesh(ip("fd09::2"), 128, true)?;
            loaded.attach_tc(programs::NODE_GUARD, "eth0", TC_INGRESS)?;
            Ok(loaded)
        })?
    }
}

fn socket(to: SocketAddr) -> Result<Socket> {
    Ok(Socket::new(Domain::for_address(to), Type::STREAM, None)?)
}

fn start(socket: &Socket, to: SocketAddr) -> Result<()> {
    socket.set_nonblocking(true)?;
    let error = socket.connect(&to.into()).err().context("the connection cannot be there yet")?;
    ensure!(error.raw_os_error() == Some(Errno::EINPROGRESS as i32), "connecting to {to}: {error}");
    Ok(())
}

fn dropped(loaded: &Loaded, what: &str, more_than: u64) -> Result<u64> {
    eventually(what, || Ok(loaded.counter(GuardDropped)? > more_than))?;
    loaded.counter(GuardDropped)
}

/// The kernel keeps the sender's socket on a packet's way through the pair: that is how the agent's
/// own connections pass.
#[test]
fn the_agents_sockets_are_known_on_the_nodes_side() -> Result<()> {
    let pair = Pair::new()?;
    let listeners = pair
        .node
        .enter(|| -> Result<_> { Ok([TcpListener::bind("10.9.0.2:80")?, TcpListener::bind("[fd09::2]:80")?]) })??;
    let loaded = pair.guard()?;
    let mut before = 0;
    for listener in &listeners {
        let to = listener.local_addr()?;
        pair.pod.enter(|| -> Result<()> {
            let other = socket(to)?;
            start(&other, to)?;
            before = dropped(&loaded, "a SYN of the pod is dropped", before)?;
            let own = socket(to)?;
            loaded.mark_agents(&own)?;
            own.connect_timeout(&to.into(), Duration::from_secs(10)).context("the agent's own connection")?;
            accept(std::slice::from_ref(listener))?;
            Ok(())
        })??;
        // Sent again in the meantime.
        before = loaded.counter(GuardDropped)?;
    }
    Ok(())
}

/// A packet socket of the pod on `eth0`; with `bypass` its packets do not pass the queueing
/// discipline, and with it what tc has there.
fn packet_socket(bypass: bool) -> Result<OwnedFd> {
    const PACKET_QDISC_BYPASS: libc::c_int = 20;
    let index = if_nametoindex("eth0")?;
    // SAFETY: no pointers; the descriptor is checked, and owned from here on.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    Errno::result(fd).context("a packet socket")?;
    // SAFETY: just made, nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: every field is plain data.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::sa_family_t::try_from(libc::AF_PACKET)?;
    address.sll_ifindex = index.cast_signed();
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address is read during the call.
    Errno::result(unsafe { libc::bind(fd, (&raw const address).cast(), length) }).context("binding a packet socket")?;
    let value = libc::c_int::from(bypass);
    // SAFETY: the value is read during the call.
    let set = unsafe {
        let length = size_of_val(&value) as libc::socklen_t;
        libc::setsockopt(fd, libc::SOL_PACKET, PACKET_QDISC_BYPASS, (&raw const value).cast(), length)
    };
    Errno::result(set).context("PACKET_QDISC_BYPASS")?;
    Ok(socket)
}

fn send(socket: &OwnedFd, frame: &[u8]) -> Result<()> {
    // SAFETY: the bytes are read during the call.
    let sent = unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
    let sent = usize::try_from(Errno::result(sent).context("sending a frame")?)?;
    ensure!(sent == frame.len(), "a frame was sent in part");
    Ok(())
}

/// Root in the pod writes frames of its own, tagged or not.
#[test]
fn packet_sockets_of_the_pod_do_not_reach_the_mesh() -> Result<()> {
    let pair = Pair::new()?;
    let loaded = pair.guard()?;
    for bypass in [false, true] {
        for link in [Link::Ethernet, Link::Vlan, Link::DoubleVlan] {
            for to in ["10.9.0.2:80", "[fd09::2]:80"] {
                let before = loaded.counter(GuardDropped)?;
                let frame = tcp(to, SYN).bytes(link);
                pair.pod.enter(|| send(&packet_socket(bypass)?, &frame))??;
                dropped(&loaded, &format!("{to} behind {link:?}, bypass {bypass}"), before)?;
            }
        }
    }
    Ok(())
}

/// An interface on top of the pod's own leads through the same pair.
fn through(pair: &Pair, loaded: &Loaded, namespace: &Namespace, device: &str) -> Result<()> {
    namespace.ip(&format!("addr add 10.9.0.77/32 dev {device}"))?;
    namespace.ip(&format!("link set {device} up"))?;
    namespace.ip(&format!("route replace 10.9.0.2/32 dev {device} src 10.9.0.77"))?;
    namespace.ip(&format!("neigh replace 10.9.0.2 lladdr 02:00:00:00:00:02 dev {device} nud permanent"))?;
    let (before, to) = (loaded.counter(GuardDropped)?, at("10.9.0.2:80"));
    let _listener = pair.node.enter(|| TcpListener::bind(to))??;
    namespace.enter(|| -> Result<()> {
        let socket = socket(to)?;
        start(&socket, to)?;
        dropped(loaded, device, before).map(drop)
    })?
}

#[test]
fn a_macvlan_of_the_pod_in_a_nested_namespace_does_not_reach_the_mesh() -> Result<()> {
    let pair = Pair::new()?;
    let loaded = pair.guard()?;
    let nested = Namespace::new()?;
    pair.pod.ip("link add mac0 link eth0 type macvlan mode bridge")?;
    pair.pod.ip(&format!("link set mac0 netns {}", nested.path()))?;
    through(&pair, &loaded, &nested, "mac0")
}

mod vlan_devices {
    use super::*;

    /// The tag is outside of the packet's bytes: the pair hands it on as a field of its own.
    #[test]
    #[ignore = "needs VLANs: cargo xtask vm"]
    fn a_vlan_of_the_pod_does_not_reach_the_mesh() -> Result<()> {
        let pair = Pair::new()?;
        let loaded = pair.guard()?;
        pair.pod.ip("link add vlan7 link eth0 type vlan id 7")?;
        pair.pod.ip("link add vlan9 link vlan7 type vlan id 9")?;
        for device in ["vlan7", "vlan9"] {
            if device == "vlan9" {
                pair.pod.ip("addr del 10.9.0.77/32 dev vlan7")?;
            }
            through(&pair, &loaded, &pair.pod, device)?;
        }
        Ok(())
    }
}

/// The pod's own end in another namespace is still the same pair.
#[test]
fn moving_the_interface_changes_nothing() -> Result<()> {
    let pair = Pair::new()?;
    let loaded = pair.guard()?;
    let nested = Namespace::new()?;
    pair.pod.ip(&format!("link set eth0 netns {} name other0", nested.path()))?;
    nested.ip("addr add 10.9.0.3/24 dev other0")?;
    nested.ip("link set other0 up")?;
    nested.ip("neigh replace 10.9.0.2 lladdr 02:00:00:00:00:02 dev other0 nud permanent")?;
    let to = at("10.9.0.2:80");
    nested.enter(|| -> Result<()> {
        let (socket, tunnel) = (socket(to)?, socket(to)?);
        start(&socket, to)?;
        dropped(&loaded, "a SYN from the nested namespace", 0)?;
        // Refused by the node, where nobody listens, and not by the guard.
        let refused = tunnel.connect_timeout(&SocketAddr::new(to.ip(), TUNNEL_PORT).into(), Duration::from_secs(10));
        assert_eq!(refused.err().and_then(|e| e.raw_os_error()), Some(Errno::ECONNREFUSED as i32));
        Ok(())
    })?
}
