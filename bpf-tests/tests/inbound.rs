//! Verdicts of the ingress program.

use std::{
    fs::File,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::MetadataExt as _,
};

use anyhow::{Context as _, Result};
use bpf_tests::{
    cgroup::Cgroup,
    namespace::{Namespace, accept},
    object::{Direction::Inbound, Loaded, POD, Verdict, address},
    packet::{ACK, Extension, Link, Packet, RST, SYN},
};
use underpass_abi::{
    Counter::{
        self, FragmentDropped, InboundAgentPort, InboundAssignFailed, InboundNoSocket, InboundProbe,
        InboundStrictDropped, InboundUnparsable,
    },
    DIRECTION_INBOUND, DIRECTION_OUTBOUND, DIRECTION_PROBE, OUTBOUND_PORTS_V6, POD_ASSIGN, POD_STRICT, PORT_ASSIGN,
    PORT_EXCLUDED, PORT_PERMISSIVE, PORT_PROBE, PORT_STRICT,
};

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address in a test")
}

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address and port in a test")
}

/// The pod's addresses.
const HOSTS: [&str; 2] = ["10.9.0.1", "[fd09::1]"];

fn client(pod: SocketAddr) -> SocketAddr {
    if pod.is_ipv4() { at("10.9.0.2:40000") } else { at("[fd09::2]:40000") }
}

/// A packet for the pod.
fn tcp(host: &str, port: u16, flags: u8) -> Packet {
    let pod = at(&format!("{host}:{port}"));
    Packet::tcp(client(pod), pod, flags)
}

fn udp(host: &str, port: u16) -> Packet {
    let pod = at(&format!("{host}:{port}"));
    Packet::udp(client(pod), pod)
}

fn with_mode(flags: u32) -> Result<Loaded> {
    let loaded = Loaded::new()?;
    loaded.pod_by_id(flags)?;
    Ok(loaded)
}

#[test]
fn the_mode_decides_about_opening_packets() -> Result<()> {
    let strict = Some(InboundStrictDropped);
    for (mode, loaded, expected) in [
        ("STRICT", with_mode(POD_STRICT)?, strict),
        ("PERMISSIVE", with_mode(0)?, None),
        ("no configuration", Loaded::new()?, strict),
    ] {
        for host in HOSTS {
            for (case, packet) in [
                ("SYN", tcp(host, 80, SYN)),
                ("SYN with ECN bits", tcp(host, 80, SYN | 0xc0)),
                ("SYN and FIN", tcp(host, 80, SYN | 0x01)),
                ("SYN in a first fragment", tcp(host, 80, SYN).fragment(0, true)),
            ] {
                loaded.expect(Inbound, &format!("{mode}, {case}, {host}"), &packet, expected)?;
            }
            for (case, packet) in [("UDP", udp(host, 80)), ("SYN to the tunnel", tcp(host, 15008, SYN))] {
                loaded.expect(Inbound, &format!("{mode}, {case}, {host}"), &packet, None)?;
            }
        }
        let other = Packet::new(ip("10.9.0.2"), ip("10.9.0.1"), 1, vec![8; 8]);
        loaded.expect(Inbound, &format!("{mode}, ICMP"), &other, None)?;
        let other = Packet::new(ip("fd09::2"), ip("fd09::1"), 58, vec![136; 24]);
        loaded.expect(Inbound, &format!("{mode}, neighbour advertisement"), &other, None)?;
    }
    Ok(())
}

#[test]
fn the_agents_ports_are_closed_to_the_outside() -> Result<()> {
    let closed = Some(InboundAgentPort);
    for (mode, loaded) in [("STRICT", with_mode(POD_STRICT)?), ("PERMISSIVE", with_mode(0)?)] {
        // a rule of the operator does not open them
        for port in [15001, 15006, 15053, 15104] {
            loaded.port_rule(POD, port, DIRECTION_INBOUND, PORT_EXCLUDED)?;
        }
        loaded.port_rule(POD, 15008, DIRECTION_INBOUND, PORT_STRICT)?;
        for host in HOSTS {
            for port in [15001, 15006, 15053].into_iter().chain(OUTBOUND_PORTS_V6) {
                for flags in [SYN, ACK, SYN | ACK, RST] {
                    let case = format!("{mode}, {host}:{port}, flags {flags}");
                    loaded.expect(Inbound, &case, &tcp(host, port, flags), closed)?;
                }
            }
            for flags in [SYN, ACK, RST] {
                let case = format!("{mode}, tunnel, {host}, flags {flags}");
                loaded.expect(Inbound, &case, &tcp(host, 15008, flags), None)?;
            }
            for (case, port, expected) in [("DNS", 15053, closed), ("outbound", 15001, None), ("before", 15052, None)] {
                loaded.expect(Inbound, &format!("{mode}, UDP, {case}, {host}"), &udp(host, port), expected)?;
            }
        }
    }
    let permissive = with_mode(0)?;
    for port in [15000, 15002, 15005, 15007, 15009, 15052, 15054, 15100, 15108] {
        permissive.expect(Inbound, &format!("port {port}"), &tcp(HOSTS[0], port, SYN), None)?;
    }
    Ok(())
}

#[test]
fn port_rules_override_the_mode() -> Result<()> {
    let strict = Some(InboundStrictDropped);
    for (mode, flags) in [("STRICT", POD_STRICT), ("PERMISSIVE", 0)] {
        let loaded = with_mode(flags)?;
        for (pod_id, port, action) in [
            (POD, 81, PORT_EXCLUDED),
            (POD, 82, PORT_PERMISSIVE),
            (POD, 83, PORT_STRICT),
            (0, 84, PORT_EXCLUDED),
            (0, 85, PORT_STRICT),
            (0, 86, PORT_STRICT),
            (POD, 86, PORT_PERMISSIVE),
            (POD, 87, 99),
            (POD, 88, PORT_ASSIGN),
        ] {
            loaded.port_rule(pod_id, port, DIRECTION_INBOUND, action)?;
        }
        for port in [89, 90] {
            loaded.port_rule(POD, port, DIRECTION_OUTBOUND, if flags == 0 { PORT_STRICT } else { PORT_EXCLUDED })?;
        }
        loaded.port_rule(POD + 1, 91, DIRECTION_INBOUND, if flags == 0 { PORT_STRICT } else { PORT_PERMISSIVE })?;
        let by_mode = (flags == POD_STRICT).then_some(InboundStrictDropped);
        for (case, port, on_syn) in [
            ("excluded", 81, None),
            ("permissive", 82, None),
            ("strict", 83, strict),
            ("excluded for all", 84, None),
            ("strict for all", 85, strict),
            ("the pod's own over that for all", 86, None),
            ("an action from the future", 87, strict),
            ("assign, nobody listens", 88, Some(InboundAssignFailed)),
            ("an outbound rule", 89, by_mode),
            ("another outbound rule", 90, by_mode),
            ("another pod's rule", 91, by_mode),
            ("no rule", 92, by_mode),
        ] {
            let on_ack = on_syn.map(|_| InboundNoSocket);
            for host in HOSTS {
                loaded.expect(Inbound, &format!("{mode}, {case}, SYN, {host}"), &tcp(host, port, SYN), on_syn)?;
                loaded.expect(Inbound, &format!("{mode}, {case}, ACK, {host}"), &tcp(host, port, ACK), on_ack)?;
            }
        }
    }
    Ok(())
}

/// `BPF_PROG_TEST_RUN` gives a packet a socket of the calling process, so the packets here come from the test's own cgroup.
#[test]
fn probes_are_known_by_the_cgroup_of_their_socket() -> Result<()> {
    let cgroup = Cgroup::join()?;
    let id = |directory: &File| Ok::<_, anyhow::Error>(directory.metadata()?.ino());
    let (own, above) = (id(cgroup.inner())?, id(cgroup.directory())?);
    for (cgroup, number, known) in [("its own", own, true), ("one above", above, true), ("another", own + 1, false)] {
        for (mode, flags, refused) in
            [("STRICT", POD_STRICT, InboundStrictDropped), ("policies", POD_ASSIGN, InboundAssignFailed)]
        {
            let loaded = with_mode(flags)?;
            loaded.probe_cgroup(number)?;
            loaded.port_rule(POD, 80, DIRECTION_PROBE, PORT_PROBE)?;
            let on_syn = if known { InboundProbe } else { refused };
            let on_ack = (!known).then_some(InboundNoSocket);
            for host in HOSTS {
                let case = format!("{mode}, {cgroup}, {host}");
                loaded.expect(Inbound, &format!("{case}, SYN"), &tcp(host, 80, SYN), Some(on_syn))?;
                loaded.expect(Inbound, &format!("{case}, ACK"), &tcp(host, 80, ACK), on_ack)?;
                loaded.expect(Inbound, &case, &tcp(host, 15006, SYN), Some(InboundAgentPort))?;
                // The kubelet has no business on a port that the pod does not declare.
                loaded.expect(Inbound, &format!("{case}, undeclared"), &tcp(host, 81, SYN), Some(refused))?;
            }
        }
        let permissive = with_mode(0)?;
        permissive.probe_cgroup(number)?;
        permissive.expect(Inbound, "PERMISSIVE asks nobody", &tcp(HOSTS[0], 80, SYN), None)?;
    }
    Ok(())
}

#[test]
fn declared_ports_take_probes_from_the_nodes_addresses() -> Result<()> {
    let loaded = with_mode(POD_STRICT)?;
    loaded.port_rule(POD, 8080, DIRECTION_PROBE, PORT_PROBE)?;
    // another pod's, and one for every pod, which there is no such thing as
    loaded.port_rule(POD + 1, 8081, DIRECTION_PROBE, PORT_PROBE)?;
    loaded.port_rule(0, 8082, DIRECTION_PROBE, PORT_PROBE)?;
    loaded.port_rule(POD, 15001, DIRECTION_PROBE, PORT_PROBE)?;
    for host in HOSTS {
        let declared = tcp(host, 8080, SYN);
        loaded.expect(Inbound, &format!("a stranger, {host}"), &declared, Some(InboundStrictDropped))?;
        loaded.node_address(client(at(&format!("{host}:1"))).ip())?;
        loaded.expect(Inbound, &format!("the node, {host}"), &declared, Some(InboundProbe))?;
        loaded.expect(Inbound, &format!("the node, {host}, ACK"), &tcp(host, 8080, ACK), None)?;
        for port in [8079, 8081, 8082] {
            let case = format!("port {port}, {host}");
            loaded.expect(Inbound, &case, &tcp(host, port, SYN), Some(InboundStrictDropped))?;
        }
        loaded.expect(Inbound, &format!("the agent's, {host}"), &tcp(host, 15001, SYN), Some(InboundAgentPort))?;
    }
    Ok(())
}

#[test]
fn fragments_are_judged_by_the_first_one() -> Result<()> {
    let strict = Some(InboundStrictDropped);
    let short = |host: &str, length| tcp(host, 80, SYN).fragment(0, true).payload_of(length);
    for (mode, loaded, refused) in [("STRICT", with_mode(POD_STRICT)?, strict), ("PERMISSIVE", with_mode(0)?, None)] {
        for host in HOSTS {
            for (case, packet, expected) in [
                ("first", tcp(host, 80, SYN).fragment(0, true), refused),
                ("first, tunnel", tcp(host, 15008, SYN).fragment(0, true), None),
                ("first, the agent's", tcp(host, 15006, SYN).fragment(0, true), Some(InboundAgentPort)),
                ("behind the header", tcp(host, 80, ACK).fragment(3, true), None),
                ("last", tcp(host, 15008, ACK).fragment(185, false), None),
                // These could be put over the ports or flags that the first one was judged by.
                ("over ports and flags", tcp(host, 80, ACK).fragment(1, true), Some(FragmentDropped)),
                ("over flags", tcp(host, 80, ACK).fragment(2, false), Some(FragmentDropped)),
                ("tiny first", short(host, 8), Some(FragmentDropped)),
                ("19 bytes", short(host, 19), Some(FragmentDropped)),
                ("UDP, first", udp(host, 80).fragment(0, true), None),
                ("UDP, later", udp(host, 15053).fragment(1, true), None),
                ("UDP, last", udp(host, 80).fragment(185, false), None),
            ] {
                loaded.expect(Inbound, &format!("{mode}, {case}, {host}"), &packet, expected)?;
            }
        }
    }
    Ok(())
}

/// The receiver cuts a packet where its IP header says, and takes the rest of the TCP header from
/// the next fragment.
#[test]
fn padding_is_no_tcp_header() -> Result<()> {
    let loaded = with_mode(POD_STRICT)?;
    for (host, length_at) in [(HOSTS[0], 2), (HOSTS[1], 4)] {
        for link in Link::ALL {
            let whole = tcp(host, 15008, ACK).fragment(0, true).bytes(link);
            let at = link.len() + length_at;
            let length = u16::from_be_bytes([whole[at], whole[at + 1]]);
            for (cut, expected) in [(0, None), (4, Some(FragmentDropped)), (12, Some(FragmentDropped))] {
                let mut padded = whole.clone();
                padded[at..at + 2].copy_from_slice(&(length - cut).to_be_bytes());
                loaded.expect_bytes(Inbound, &format!("{cut} bytes of padding, {host}"), link, &padded, expected)?;
            }
        }
    }
    Ok(())
}

/// The kernel forgets which listener was chosen for a fragment, and would take the packet to the
/// application.
#[test]
fn a_fragmented_syn_is_not_handed_over() -> Result<()> {
    let loaded = with_mode(POD_ASSIGN)?;
    for host in HOSTS {
        let whole = tcp(host, 80, SYN);
        loaded.expect(Inbound, &format!("whole, {host}"), &whole, Some(InboundAssignFailed))?;
        loaded.expect(Inbound, &format!("first, {host}"), &whole.fragment(0, true), Some(FragmentDropped))?;
    }
    Ok(())
}

#[test]
fn extension_headers_do_not_hide_tcp() -> Result<()> {
    use Extension::{Authentication, Destination, Fragment, HopByHop, Routing};
    let loaded = with_mode(POD_STRICT)?;
    let every = [HopByHop(8), Destination(16), Routing(24), Fragment(0, false), Authentication, Destination(8)];
    let seven = [&every[..], &[Destination(8)]].concat();
    let later = [Fragment(2, true), Destination(8)];
    let rest = [Fragment(3, true), Destination(8)];
    let cases: [(&str, Packet, &[Extension], Option<Counter>); 8] = [
        ("SYN", tcp(HOSTS[1], 80, SYN), &every, Some(InboundStrictDropped)),
        ("ACK", tcp(HOSTS[1], 80, ACK), &every, Some(InboundNoSocket)),
        ("agent port", tcp(HOSTS[1], 15006, SYN), &every, Some(InboundAgentPort)),
        ("tunnel", tcp(HOSTS[1], 15008, SYN), &every, None),
        ("UDP", udp(HOSTS[1], 80), &every, None),
        ("seven headers", tcp(HOSTS[1], 15008, SYN), &seven, Some(InboundUnparsable)),
        ("later fragment of an extension header", tcp(HOSTS[1], 15008, SYN), &later, Some(FragmentDropped)),
        ("one behind the first 24 bytes", tcp(HOSTS[1], 80, SYN), &rest, None),
    ];
    for (case, packet, extensions, expected) in cases {
        loaded.expect(Inbound, case, &packet.extensions(extensions), expected)?;
    }
    Ok(())
}

#[test]
fn truncated_packets_do_not_enter() -> Result<()> {
    let loaded = with_mode(0)?;
    for (host, addresses_end) in [(HOSTS[0], 20), (HOSTS[1], 40)] {
        for link in Link::ALL {
            let whole = tcp(host, 80, SYN).bytes(link);
            // BPF_PROG_TEST_RUN itself refuses what is no Ethernet frame, and short IP headers where it recognises IP
            let minimum = if link == Link::Ethernet { link.len() + addresses_end } else { 15 };
            for length in minimum..=whole.len() {
                let readable = length >= link.len() + addresses_end && length < whole.len();
                let case = format!("{length} of {} bytes, {link:?}, {host}", whole.len());
                let expected = readable.then_some(InboundUnparsable);
                loaded.expect_bytes(Inbound, &case, link, &whole[..length], expected)?;
            }
        }
    }
    Ok(())
}

#[test]
fn damaged_packets_get_a_verdict() -> Result<()> {
    let loaded = with_mode(POD_STRICT)?;
    let headers = [Extension::HopByHop(16), Extension::Authentication, Extension::Fragment(0, true)];
    let packets = [tcp(HOSTS[0], 80, SYN).options(12), tcp(HOSTS[1], 80, ACK).extensions(&headers)];
    let mut verdicts = [0u32; 2];
    for packet in &packets {
        for link in Link::ALL {
            let whole = packet.bytes(link);
            for position in 0..whole.len() {
                for value in [0, 1, 0x3c, 0x7f, 0xff] {
                    let mut damaged = whole.clone();
                    damaged[position] = value;
                    match loaded.run(Inbound, link, &damaged)? {
                        Verdict::Pass => verdicts[0] += 1,
                        Verdict::Drop | Verdict::Redirect => verdicts[1] += 1,
                    }
                }
            }
        }
    }
    assert!(verdicts.iter().all(|count| *count > 100), "some damage changes the verdict, some does not: {verdicts:?}");
    Ok(())
}

/// Connections that exist when the packets are judged, in the namespace that they are judged in.
struct Connection {
    listener: TcpListener,
    client: TcpStream,
    server: TcpStream,
}

impl Connection {
    fn open(listen: &str, dial: &str) -> Result<Self> {
        let listener = TcpListener::bind(listen).with_context(|| format!("listening on {listen}"))?;
        let client = TcpStream::connect((ip(dial), listener.local_addr()?.port()))?;
        let server = accept(std::slice::from_ref(&listener))?;
        Ok(Self { listener, client, server })
    }
}

/// What a dual-stack socket says about its IPv4 peer, as that looks in a packet.
fn on_the_wire(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[test]
fn established_connections_go_on_under_strict() -> Result<()> {
    Namespace::new()?.enter(|| {
        let loaded = with_mode(POD_STRICT)?;
        for (listen, dial) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1"), ("[::]:0", "127.0.0.1")] {
            let Connection { listener, client, server } = Connection::open(listen, dial)?;
            let (near, far) = (on_the_wire(client.local_addr()?), on_the_wire(client.peer_addr()?));
            let stranger = SocketAddr::new(near.ip(), if near.port() == 40000 { 40001 } else { 40000 });
            let spoofed = if near.is_ipv4() { at("10.9.0.2:40000") } else { at("[fd09::2]:40000") };
            let cases = [
                ("to the server", near, far, ACK, None),
                ("to the client", far, near, ACK, None),
                ("FIN", near, far, ACK | 0x01, None),
                ("RST", far, near, RST, None),
                ("SYN-ACK to the client", far, near, SYN | ACK, None),
                ("a new SYN on the same ports", near, far, SYN, Some(InboundStrictDropped)),
                ("another port, only a listener", stranger, far, ACK, Some(InboundNoSocket)),
                ("another host, only a listener", spoofed, far, ACK, Some(InboundNoSocket)),
                ("RST from another port", stranger, far, RST, Some(InboundNoSocket)),
                ("to a port nobody has", near, SocketAddr::new(far.ip(), 9), ACK, Some(InboundNoSocket)),
            ];
            for (case, src, dst, flags, expected) in cases {
                let case = format!("{listen}, {case}");
                loaded.expect(Inbound, &case, &Packet::tcp(src, dst, flags), expected)?;
            }
            // the last ACK of a connection that is already in TIME-WAIT must not be lost
            drop(client);
            drop(server);
            loaded.expect(Inbound, &format!("{listen}, TIME-WAIT"), &Packet::tcp(far, near, ACK), None)?;
            drop(listener);
        }
        Ok(())
    })?
}

#[test]
fn listeners_do_not_open_strict_ports() -> Result<()> {
    Namespace::new()?.enter(|| {
        let loaded = with_mode(POD_STRICT)?;
        let listeners = [TcpListener::bind("0.0.0.0:8080")?, TcpListener::bind("[::1]:8081")?];
        for (host, port) in [("127.0.0.1", 8080), ("[::1]", 8081)] {
            for (flags, expected) in [(SYN, InboundStrictDropped), (ACK, InboundNoSocket), (RST, InboundNoSocket)] {
                loaded.expect(Inbound, &format!("{host}, flags {flags}"), &tcp(host, port, flags), Some(expected))?;
            }
        }
        drop(listeners);
        Ok(())
    })?
}

#[test]
fn drops_are_reported() -> Result<()> {
    let loaded = with_mode(POD_STRICT)?;
    for (packet, kind, src, dst) in [
        (tcp(HOSTS[0], 80, SYN), InboundStrictDropped, "10.9.0.2:40000", "10.9.0.1:80"),
        (tcp(HOSTS[1], 80, ACK), InboundNoSocket, "[fd09::2]:40000", "[fd09::1]:80"),
        (tcp(HOSTS[0], 15001, SYN), InboundAgentPort, "10.9.0.2:40000", "10.9.0.1:15001"),
        (udp(HOSTS[1], 15053), InboundAgentPort, "[fd09::2]:40000", "[fd09::1]:15053"),
        (tcp(HOSTS[0], 80, ACK).fragment(2, false), FragmentDropped, "10.9.0.2:0", "10.9.0.1:0"),
    ] {
        loaded.run(Inbound, Link::Ethernet, &packet.bytes(Link::Ethernet))?;
        loaded.run(Inbound, Link::Ethernet, &tcp(HOSTS[0], 15008, SYN).bytes(Link::Ethernet))?;
        let (src, dst) = (at(src), at(dst));
        let expected = underpass_abi::Event {
            kind: kind as u32,
            pod_id: POD,
            src: address(src.ip()),
            dst: address(dst.ip()),
            src_port: src.port(),
            dst_port: dst.port(),
            _pad: 0,
        };
        assert_eq!(loaded.events()?, [expected]);
    }
    Ok(())
}

#[test]
fn a_pod_whose_rules_did_not_all_fit_heeds_its_own_only() -> Result<()> {
    let loaded = with_mode(POD_STRICT | underpass_abi::POD_OWN_RULES_ONLY)?;
    loaded.port_rule(0, 81, DIRECTION_INBOUND, PORT_EXCLUDED)?;
    loaded.port_rule(POD, 82, DIRECTION_INBOUND, PORT_PERMISSIVE)?;
    for (case, port, expected) in [
        ("excluded for all", 81, Some(InboundStrictDropped)),
        ("the pod's own", 82, None),
        ("no rule", 83, Some(InboundStrictDropped)),
    ] {
        loaded.expect(Inbound, case, &tcp(HOSTS[0], port, SYN), expected)?;
    }
    Ok(())
}

/// Whoever receives a packet takes off any number of tags that carry a priority only.
#[test]
fn packets_behind_many_tags_do_not_enter() -> Result<()> {
    let loaded = with_mode(POD_STRICT)?;
    for (host, ethertype) in [(HOSTS[0], [8, 0]), (HOSTS[1], [0x86, 0xdd])] {
        for tags in [3, 5] {
            let packet = tcp(host, 80, SYN).bytes(Link::None);
            let frame = [&[2; 12][..], &[0x81, 0, 0, 0].repeat(tags), &ethertype, &packet].concat();
            let case = format!("{host}, {tags} tags");
            loaded.expect_bytes(Inbound, &case, Link::Ethernet, &frame, Some(InboundUnparsable))?;
        }
    }
    Ok(())
}
