//! Probes whose packets lose their socket on the way: recognised by what the kubelet's cgroup has
//! just sent, and by nothing less.

use std::{
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::MetadataExt as _,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    cgroup::Cgroup,
    namespace::{Namespace, accept, eventually},
    object::{Direction::Inbound, Loaded, POD, Verdict, address},
    packet::{ACK, Link, Packet, SYN},
};
use libbpf_rs::{MapCore as _, TC_INGRESS};
use socket2::{Domain, Socket, Type};
use underpass_abi::{
    Counter::{InboundNoSocket, InboundProbe, InboundStrictDropped},
    DIRECTION_PROBE, POD_STRICT, PORT_PROBE, PROBE_LIFE, ProbeKey, ProbeSyn, programs,
};

/// How long a client waits that is not answered.
const DROPPED: Duration = Duration::from_millis(700);

/// A node and a pod, with a router between them: packets that are forwarded have no socket any
/// more.
struct Routed {
    node: Namespace,
    pod: Namespace,
    _router: Namespace,
}

impl Routed {
    fn new() -> Result<Self> {
        let (node, router, pod) = (Namespace::new()?, Namespace::new()?, Namespace::new()?);
        for (end, name, net) in [(&node, "node", 7), (&pod, "pod", 8)] {
            router.ip(&format!("link add {name} type veth peer name eth0 netns {}", end.path()))?;
            for (namespace, interface, host) in [(&router, name, 1), (end, "eth0", 2)] {
                namespace.ip(&format!("addr add 10.{net}.0.{host}/24 dev {interface}"))?;
                namespace.ip(&format!("addr add fd0{net}::{host}/64 dev {interface} nodad"))?;
                namespace.ip(&format!("link set {interface} up"))?;
            }
            end.ip(&format!("route add default via 10.{net}.0.1"))?;
            end.ip(&format!("-6 route add default via fd0{net}::1"))?;
        }
        router.enter(|| -> Result<()> {
            for switch in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                std::fs::write(format!("/proc/sys/net/{switch}"), "1").context(switch)?;
            }
            Ok(())
        })??;
        // Routers come to know their neighbours by and by.
        for host in POD_ADDRESSES {
            let host: IpAddr = host.parse()?;
            let listener = pod.enter(|| TcpListener::bind((host, 9)))??;
            let to = listener.local_addr()?;
            let reached = || node.enter(|| TcpStream::connect_timeout(&to, Duration::from_millis(200)).is_ok());
            eventually("packets are forwarded", reached)?;
        }
        Ok(Self { node, pod, _router: router })
    }
}

const POD_ADDRESSES: [&str; 2] = ["10.8.0.2", "fd08::2"];
const NODE_ADDRESSES: [&str; 2] = ["10.7.0.2", "fd07::2"];

fn connects(node: &Namespace, to: SocketAddr) -> Result<bool> {
    node.enter(|| match TcpStream::connect_timeout(&to, DROPPED) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.kind(), std::io::ErrorKind::TimedOut | std::io::ErrorKind::ConnectionRefused) => Ok(false),
        Err(e) => Err(e).with_context(|| format!("connecting to {to}")),
    })?
}

#[test]
fn recorded_connections_pass_without_their_socket() -> Result<()> {
    let cgroup = Cgroup::join()?;
    let Routed { node, pod, _router } = Routed::new()?;
    let loaded = pod.enter(|| -> Result<Loaded> {
        let loaded = Loaded::new()?;
        loaded.pod_by_id(POD_STRICT)?;
        loaded.attach_tc(programs::INBOUND, "eth0", TC_INGRESS)?;
        Ok(loaded)
    })??;
    // The control: known by its cgroup, were the socket there.
    loaded.probe_cgroup(cgroup.directory().metadata()?.ino())?;
    for host in POD_ADDRESSES {
        let host: IpAddr = host.parse()?;
        let listeners = pod.enter(|| -> Result<_> { Ok([TcpListener::bind((host, 80))?]) })??;
        let other = pod.enter(|| TcpListener::bind((host, 81)))??;
        let to = listeners[0].local_addr()?;
        loaded.port_rule(POD, 80, DIRECTION_PROBE, PORT_PROBE)?;
        ensure!(!connects(&node, to)?, "{host}: its socket is not seen, and nothing was recorded");

        let recording = loaded.attach_cgroup(programs::PROBE, cgroup.directory())?;
        let before = loaded.counter(InboundProbe)?;
        ensure!(connects(&node, to)?, "{host}: recorded, and refused");
        accept(&listeners)?;
        assert_eq!(loaded.counter(InboundProbe)?, before + 1);
        ensure!(!connects(&node, other.local_addr()?)?, "{host}: a port that is not declared");
        loaded.delete("PORT_RULES", &underpass_abi::PortKey { pod_id: POD, port: 80, direction: DIRECTION_PROBE })?;
        ensure!(!connects(&node, to)?, "{host}: no port is declared any more");
        drop(recording);
    }
    Ok(())
}

/// The node's own address, a port of a probe that is open at this moment: all that another program
/// of the node, or the node's address translation, could come up with.
#[test]
fn the_same_addresses_and_ports_are_not_enough() -> Result<()> {
    let cgroup = Cgroup::join()?;
    let Routed { node, pod, _router } = Routed::new()?;
    let loaded = Loaded::new()?;
    loaded.pod_by_id(POD_STRICT)?;
    loaded.port_rule(POD, 80, DIRECTION_PROBE, PORT_PROBE)?;
    let _recording = loaded.attach_cgroup(programs::PROBE, cgroup.directory())?;
    for (from, host) in NODE_ADDRESSES.iter().zip(POD_ADDRESSES) {
        let host: IpAddr = host.parse()?;
        let listener = pod.enter(|| TcpListener::bind((host, 80)))??;
        let to = listener.local_addr()?;
        let probe = node.enter(|| TcpStream::connect_timeout(&to, Duration::from_secs(10)))??;
        let client = probe.local_addr()?;
        assert_eq!(client.ip(), from.parse::<IpAddr>()?);
        let key =
            ProbeKey { src: address(client.ip()), dst: address(to.ip()), src_port: client.port(), dst_port: to.port() };
        let recorded: ProbeSyn =
            loaded.lookup("PROBES", &key)?.with_context(|| format!("{client} was not recorded"))?;
        let judge = |case: &str, flags: u8, sequence: u32, passes: bool| -> Result<()> {
            let mut bytes = Packet::tcp(client, to, flags).bytes(Link::Ethernet);
            let tcp = bytes.len() - 20;
            bytes[tcp + 4..tcp + 8].copy_from_slice(&sequence.to_be_bytes());
            let counter = if flags == SYN { InboundStrictDropped } else { InboundNoSocket };
            let refused = loaded.counter(counter)?;
            let verdict = loaded.run(Inbound, Link::Ethernet, &bytes)?;
            assert_eq!(verdict, if passes { Verdict::Pass } else { Verdict::Drop }, "{client}: {case}");
            assert_eq!(loaded.counter(counter)?, refused + u64::from(!passes), "{client}: {case}");
            Ok(())
        };
        let next = recorded.sequence.wrapping_add(1);
        judge("its own SYN", SYN, recorded.sequence, true)?;
        judge("another SYN", SYN, next, false)?;
        judge("a guess", SYN, recorded.sequence ^ 0x8000_0000, false)?;
        judge("the ACK that follows it", ACK, next, true)?;
        judge("another ACK", ACK, next.wrapping_add(1), false)?;
        // Long ago.
        let old = ProbeSyn { sent_at: recorded.sent_at.saturating_sub(PROBE_LIFE), ..recorded };
        loaded.update("PROBES", &key, &old)?;
        judge("its SYN, seen again later", SYN, recorded.sequence, false)?;
        drop((probe, listener));
    }
    Ok(())
}

#[test]
fn only_syns_of_the_cgroup_are_recorded() -> Result<()> {
    let cgroup = Cgroup::join()?;
    let loaded = Loaded::new()?;
    let namespace = Namespace::new()?;
    let count = || -> Result<usize> { Ok(loaded.map("PROBES")?.keys().count()) };
    let exchange = || -> Result<()> {
        namespace.enter(|| -> Result<()> {
            for host in ["127.0.0.1", "::1"] {
                let listeners = [TcpListener::bind((host, 0))?];
                let _client = TcpStream::connect(listeners[0].local_addr()?)?;
                accept(&listeners)?;
                let datagrams = Socket::new(Domain::for_address(listeners[0].local_addr()?), Type::DGRAM, None)?;
                datagrams.send_to(b"probe", &listeners[0].local_addr()?.into())?;
            }
            Ok(())
        })?
    };
    exchange()?;
    assert_eq!(count()?, 0, "nothing is attached");
    let recording = loaded.attach_cgroup(programs::PROBE, cgroup.directory())?;
    exchange()?;
    assert_eq!(count()?, 2, "one SYN of each family; no answers, no datagrams");
    drop(recording);
    exchange()?;
    assert_eq!(count()?, 2);
    Ok(())
}
