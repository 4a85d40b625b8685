//! Verdicts of the egress guard.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use bpf_tests::{
    object::{
        Direction::{Guard, NodeGuard},
        Loaded, POD, Verdict, address,
    },
    packet::{ACK, Extension, Link, Packet, RST, SYN},
};
use underpass_abi::{
    Counter::{self, FragmentDropped, GuardDropped, GuardUnparsable},
    DIRECTION_INBOUND, DIRECTION_OUTBOUND, POD_CAPTURE_ALL, POD_STRICT, PORT_EXCLUDED, PORT_PERMISSIVE,
};

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address in a test")
}

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address and port in a test")
}

/// A pod with 10.1.0.0/16 and `fd01::/32` in the mesh.
fn meshed() -> Result<Loaded> {
    let loaded = Loaded::new()?;
    loaded.pod_by_id(0)?;
    loaded.mesh(ip("10.1.0.0"), 16, true)?;
    loaded.mesh(ip("fd01::"), 32, true)?;
    Ok(loaded)
}

/// A packet of the pod to `dst`.
fn tcp(dst: &str, flags: u8) -> Packet {
    let dst = at(dst);
    Packet::tcp(if dst.is_ipv4() { at("10.9.0.1:40000") } else { at("[fd09::1]:40000") }, dst, flags)
}

fn udp(dst: &str) -> Packet {
    let dst = at(dst);
    Packet::udp(if dst.is_ipv4() { at("10.9.0.1:40000") } else { at("[fd09::1]:40000") }, dst)
}

#[test]
fn opening_packets_to_the_mesh_are_dropped() -> Result<()> {
    let loaded = meshed()?;
    let dropped = Some(GuardDropped);
    let cases: [(&str, Packet, Option<Counter>); 23] = [
        ("SYN to the mesh", tcp("10.1.2.3:80", SYN), dropped),
        ("SYN to the mesh, IPv6", tcp("[fd01::5]:80", SYN), dropped),
        ("SYN with ECN bits", tcp("10.1.2.3:80", SYN | 0xc0), dropped),
        ("SYN and FIN", tcp("10.1.2.3:80", SYN | 0x01), dropped),
        ("SYN and RST", tcp("[fd01::5]:80", SYN | RST), dropped),
        ("SYN to the tunnel port", tcp("10.1.2.3:15008", SYN), dropped),
        ("SYN behind IPv4 options", tcp("10.1.2.3:80", SYN).options(40), dropped),
        ("SYN to the first address", tcp("10.1.0.0:80", SYN), dropped),
        ("SYN to the last address", tcp("10.1.255.255:80", SYN), dropped),
        ("SYN to the address before", tcp("10.0.255.255:80", SYN), None),
        ("SYN to the address after", tcp("10.2.0.0:80", SYN), None),
        ("SYN elsewhere, IPv6", tcp("[fd02::5]:80", SYN), None),
        ("SYN-ACK", tcp("10.1.2.3:80", SYN | ACK), None),
        ("ACK", tcp("10.1.2.3:80", ACK), None),
        ("RST", tcp("[fd01::5]:80", RST), None),
        ("no flags", tcp("10.1.2.3:80", 0), None),
        ("UDP", udp("10.1.2.3:53"), None),
        ("UDP, IPv6", udp("[fd01::5]:53"), None),
        ("ICMP", Packet::new(ip("10.9.0.1"), ip("10.1.2.3"), 1, vec![8; 8]), None),
        ("ICMPv6", Packet::new(ip("fd09::1"), ip("fd01::5"), 58, vec![128; 8]), None),
        ("SCTP", Packet::new(ip("10.9.0.1"), ip("10.1.2.3"), 132, vec![SYN; 20]), None),
        ("ESP", Packet::new(ip("fd09::1"), ip("fd01::5"), 50, vec![SYN; 20]), None),
        ("no next header", Packet::new(ip("fd09::1"), ip("fd01::5"), 59, Vec::new()), None),
    ];
    for (case, packet, expected) in cases {
        loaded.expect(Guard, case, &packet, expected)?;
    }
    Ok(())
}

#[test]
fn extension_headers_do_not_hide_tcp() -> Result<()> {
    use Extension::{Authentication, Destination, Fragment, HopByHop, Routing};
    let loaded = meshed()?;
    let every = [HopByHop(8), Destination(16), Routing(24), Fragment(0, false), Authentication, Destination(8)];
    let cases: [(&str, &[Extension], Option<Counter>); 10] = [
        ("hop-by-hop", &[HopByHop(8)], Some(GuardDropped)),
        ("long hop-by-hop", &[HopByHop(248)], Some(GuardDropped)),
        ("routing", &[Routing(24)], Some(GuardDropped)),
        ("destination options", &[Destination(64)], Some(GuardDropped)),
        ("authentication", &[Authentication], Some(GuardDropped)),
        ("atomic fragment", &[Fragment(0, false)], Some(GuardDropped)),
        ("first fragment", &[Fragment(0, true)], Some(GuardDropped)),
        ("six headers", &every, Some(GuardDropped)),
        ("seven headers", &[&every[..], &[Destination(8)]].concat(), Some(GuardUnparsable)),
        ("later fragment of an extension header", &[Fragment(2, false), Destination(8)], Some(FragmentDropped)),
    ];
    for (case, extensions, expected) in cases {
        loaded.expect(Guard, case, &tcp("[fd01::5]:80", SYN).extensions(extensions), expected)?;
        loaded.expect(Guard, &format!("{case}, elsewhere"), &tcp("[fd02::5]:80", SYN).extensions(extensions), None)?;
    }
    for (case, extensions) in [("UDP", &every[..]), ("UDP, one header", &every[..1])] {
        loaded.expect(Guard, case, &udp("[fd01::5]:80").extensions(extensions), None)?;
    }
    loaded.expect(Guard, "ACK behind headers", &tcp("[fd01::5]:80", ACK).extensions(&every), None)?;
    Ok(())
}

#[test]
fn fragments_of_tcp_do_not_reach_the_mesh() -> Result<()> {
    let loaded = meshed()?;
    for (mesh, elsewhere) in [("10.1.2.3:80", "10.2.2.3:80"), ("[fd01::5]:80", "[fd02::5]:80")] {
        let cases: [(&str, Packet, Option<Counter>); 12] = [
            ("first, SYN", tcp(mesh, SYN).fragment(0, true), Some(GuardDropped)),
            ("first, ACK", tcp(mesh, ACK).fragment(0, true), None),
            ("first, 8 bytes of TCP", tcp(mesh, SYN).fragment(0, true).payload_of(8), Some(FragmentDropped)),
            ("first, 19 bytes of TCP", tcp(mesh, ACK).fragment(0, true).payload_of(19), Some(FragmentDropped)),
            ("later, at 8 bytes", tcp(mesh, ACK).fragment(1, true), Some(FragmentDropped)),
            ("later, in the header", tcp(mesh, ACK).fragment(2, false), Some(FragmentDropped)),
            // What a receiver does with these depends on a first fragment, which is judged.
            ("later, behind the header", tcp(mesh, ACK).fragment(3, true), None),
            ("last", tcp(mesh, SYN).fragment(100, false), None),
            ("last, at the end of what is possible", tcp(mesh, ACK).fragment(0x1fff, false), None),
            ("tiny first, elsewhere", tcp(elsewhere, SYN).fragment(0, true).payload_of(8), None),
            ("later, elsewhere", tcp(elsewhere, SYN).fragment(1, false), None),
            ("first SYN, elsewhere", tcp(elsewhere, SYN).fragment(0, true), None),
        ];
        for (case, packet, expected) in cases {
            loaded.expect(Guard, &format!("{case}, {mesh}"), &packet, expected)?;
        }
        for (case, packet) in [
            ("UDP, first", udp(mesh).fragment(0, true)),
            ("UDP, tiny first", udp(mesh).fragment(0, true).payload_of(3)),
            ("UDP, later", udp(mesh).fragment(1, false)),
        ] {
            loaded.expect(Guard, &format!("{case}, {mesh}"), &packet, None)?;
        }
    }
    Ok(())
}

/// Whatever length a packet is cut to, what is left of TCP to the mesh is dropped as soon as its destination can be read.
#[test]
fn truncated_packets_to_the_mesh_are_dropped() -> Result<()> {
    use Extension::{Authentication, Destination, Fragment, HopByHop};
    let loaded = meshed()?;
    let extended = [HopByHop(16), Authentication, Fragment(0, false), Destination(8)];
    let cases = [
        ("IPv4", "10.1.2.3:80", "10.2.2.3:80", 20, &[][..], 0),
        ("IPv4 with options", "10.1.2.3:80", "10.2.2.3:80", 20, &[], 24),
        ("IPv6", "[fd01::5]:80", "[fd02::5]:80", 40, &[], 0),
        ("IPv6 with extensions", "[fd01::5]:80", "[fd02::5]:80", 40, &extended, 0),
    ];
    for (case, mesh, elsewhere, addresses_end, extensions, options) in cases {
        let build = |dst, flags| match options {
            0 if extensions.is_empty() => tcp(dst, flags),
            0 => tcp(dst, flags).extensions(extensions),
            options => tcp(dst, flags).options(options),
        };
        for link in Link::ALL {
            // BPF_PROG_TEST_RUN itself refuses what is no Ethernet frame, and short IP headers where it recognises IP
            let minimum = if link == Link::Ethernet { link.len() + addresses_end } else { 15 };
            for flags in [SYN, ACK] {
                let whole = build(mesh, flags).bytes(link);
                for length in minimum..=whole.len() {
                    let expected = if length < link.len() + addresses_end {
                        None
                    } else if length < whole.len() {
                        Some(GuardUnparsable)
                    } else {
                        (flags == SYN).then_some(GuardDropped)
                    };
                    let case = format!("{case}, {length} of {} bytes, {link:?}, flags {flags}", whole.len());
                    loaded.expect_bytes(Guard, &case, link, &whole[..length], expected)?;
                }
            }
            let whole = build(elsewhere, SYN).bytes(link);
            for length in minimum..=whole.len() {
                let case = format!("{case}, {length} bytes, {link:?}, elsewhere");
                loaded.expect_bytes(Guard, &case, link, &whole[..length], None)?;
            }
        }
    }
    Ok(())
}

/// Any byte may be wrong without the programs answering anything but pass or drop.
#[test]
fn damaged_packets_get_a_verdict() -> Result<()> {
    use Extension::{Authentication, Destination, Fragment, HopByHop};
    let loaded = meshed()?;
    let extended = [HopByHop(16), Authentication, Fragment(0, true), Destination(8)];
    let packets = [tcp("10.1.2.3:80", SYN).options(12), tcp("[fd01::5]:80", SYN).extensions(&extended)];
    let mut verdicts = [0u32; 2];
    for packet in &packets {
        for link in Link::ALL {
            let whole = packet.bytes(link);
            for position in 0..whole.len() {
                for value in [0, 1, 0x3c, 0x7f, 0xff] {
                    let mut damaged = whole.clone();
                    damaged[position] = value;
                    match loaded.run(Guard, link, &damaged)? {
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

/// Header fields that no stack sends, towards the mesh.
#[test]
fn malformed_headers() -> Result<()> {
    let loaded = meshed()?;
    let link = Link::None;
    let syn = tcp("10.1.2.3:80", SYN).bytes(link);
    let changed = |position: usize, value: u8| {
        let mut packet = syn.clone();
        packet[position] = value;
        packet
    };
    loaded.expect_bytes(Guard, "header length 16", link, &changed(0, 0x44), Some(GuardUnparsable))?;
    loaded.expect_bytes(Guard, "header length 0", link, &changed(0, 0x40), Some(GuardUnparsable))?;
    loaded.expect_bytes(Guard, "header longer than the packet", link, &changed(0, 0x4f), Some(GuardUnparsable))?;
    loaded.expect_bytes(Guard, "version 5", link, &changed(0, 0x55), None)?;

    let three_tags = [&[0; 12][..], &[0x81, 0, 0, 1], &[0x81, 0, 0, 2], &[0x81, 0, 0, 3], &[8, 0], &syn].concat();
    // A receiver would take off any number of them.
    for direction in [Guard, NodeGuard] {
        loaded.expect_bytes(direction, "three tags", Link::Ethernet, &three_tags, Some(GuardUnparsable))?;
    }
    let arp = [&[0xff; 12][..], &[8, 6], &[0; 28]].concat();
    loaded.expect_bytes(Guard, "ARP", Link::Ethernet, &arp, None)?;
    Ok(())
}

#[test]
fn exclusions_are_honoured() -> Result<()> {
    let loaded = meshed()?;
    loaded.exclude(POD, ip("10.1.7.0"), 24)?;
    loaded.exclude(0, ip("10.1.8.8"), 32)?;
    loaded.exclude(POD + 1, ip("10.1.9.0"), 24)?;
    loaded.exclude(POD, ip("fd01:0:7::"), 48)?;
    loaded.port_rule(POD, 81, DIRECTION_OUTBOUND, PORT_EXCLUDED)?;
    loaded.port_rule(0, 82, DIRECTION_OUTBOUND, PORT_EXCLUDED)?;
    loaded.port_rule(0, 83, DIRECTION_OUTBOUND, PORT_EXCLUDED)?;
    loaded.port_rule(POD, 83, DIRECTION_OUTBOUND, PORT_PERMISSIVE)?;
    loaded.port_rule(POD, 84, DIRECTION_INBOUND, PORT_EXCLUDED)?;
    loaded.port_rule(POD + 1, 85, DIRECTION_OUTBOUND, PORT_EXCLUDED)?;
    loaded.mesh(ip("10.1.66.0"), 24, false)?;
    loaded.mesh(ip("10.1.66.6"), 32, true)?;
    let dropped = Some(GuardDropped);
    for (case, dst, expected) in [
        ("the pod's network", "10.1.7.1:80", None),
        ("beside the pod's network", "10.1.6.1:80", dropped),
        ("everyone's address", "10.1.8.8:80", None),
        ("beside everyone's address", "10.1.8.9:80", dropped),
        ("another pod's network", "10.1.9.1:80", dropped),
        ("the pod's network, IPv6", "[fd01:0:7::1]:80", None),
        ("beside it, IPv6", "[fd01:0:8::1]:80", dropped),
        ("the pod's port", "10.1.2.3:81", None),
        ("the pod's port, IPv6", "[fd01::5]:81", None),
        ("everyone's port", "10.1.2.3:82", None),
        ("everyone's port that the pod's own rule overrides", "10.1.2.3:83", dropped),
        ("an inbound rule", "10.1.2.3:84", dropped),
        ("another pod's port", "10.1.2.3:85", dropped),
        ("hole in the mesh", "10.1.66.5:80", None),
        ("mesh address in a hole", "10.1.66.6:80", dropped),
    ] {
        loaded.expect(Guard, case, &tcp(dst, SYN), expected)?;
    }
    // a later fragment has no port, so only networks can exclude it
    loaded.expect(
        Guard,
        "fragment, excluded port",
        &tcp("10.1.2.3:81", SYN).fragment(1, false),
        Some(FragmentDropped),
    )?;
    loaded.expect(Guard, "fragment, excluded network", &tcp("10.1.7.1:80", SYN).fragment(1, false), None)?;

    loaded.delete("PODS_BY_ID", &POD)?;
    for (case, dst, expected) in [
        ("no configuration, mesh", "10.1.2.3:80", dropped),
        ("no configuration, excluded network", "10.1.7.1:80", dropped),
        ("no configuration, excluded address", "10.1.8.8:80", dropped),
        ("no configuration, excluded port", "10.1.2.3:81", dropped),
        ("no configuration, hole", "10.1.66.5:80", None),
        ("no configuration, elsewhere", "192.0.2.1:80", None),
    ] {
        loaded.expect(Guard, case, &tcp(dst, SYN), expected)?;
    }
    Ok(())
}

#[test]
fn capture_all_guards_everything_but_exclusions() -> Result<()> {
    let loaded = meshed()?;
    loaded.pod_by_id(POD_CAPTURE_ALL)?;
    loaded.exclude(POD, ip("192.0.2.0"), 24)?;
    loaded.port_rule(0, 53, DIRECTION_OUTBOUND, PORT_EXCLUDED)?;
    let dropped = Some(GuardDropped);
    for (case, dst, expected) in [
        ("mesh", "10.1.2.3:80", dropped),
        ("elsewhere", "198.51.100.1:443", dropped),
        ("elsewhere, IPv6", "[2001:db8::1]:443", dropped),
        ("excluded network", "192.0.2.9:443", None),
        ("excluded port", "198.51.100.1:53", None),
    ] {
        loaded.expect(Guard, case, &tcp(dst, SYN), expected)?;
    }
    loaded.expect(Guard, "UDP", &udp("198.51.100.1:443"), None)?;
    loaded.expect(Guard, "ACK", &tcp("198.51.100.1:443", ACK), None)?;
    loaded.pod_by_id(POD_STRICT)?;
    loaded.expect(Guard, "switched off again", &tcp("198.51.100.1:443", SYN), None)?;
    Ok(())
}

#[test]
fn drops_are_reported() -> Result<()> {
    let loaded = meshed()?;
    let cases = [
        (tcp("10.1.2.3:80", SYN), GuardDropped, "10.9.0.1:40000", "10.1.2.3:80"),
        (tcp("[fd01::5]:443", SYN), GuardDropped, "[fd09::1]:40000", "[fd01::5]:443"),
        (tcp("10.1.2.3:80", ACK).fragment(1, false), FragmentDropped, "10.9.0.1:0", "10.1.2.3:0"),
        (tcp("[fd01::5]:443", ACK).payload_of(7), GuardUnparsable, "[fd09::1]:0", "[fd01::5]:0"),
    ];
    for (packet, kind, src, dst) in cases {
        loaded.run(Guard, Link::Ethernet, &packet.bytes(Link::Ethernet))?;
        loaded.run(Guard, Link::Ethernet, &tcp("10.2.2.3:80", SYN).bytes(Link::Ethernet))?;
        let events = loaded.events()?;
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
        assert_eq!(events, [expected]);
    }
    Ok(())
}

/// The counters go on when nobody reads the events.
#[test]
fn a_full_ring_loses_events_but_counts() -> Result<()> {
    let loaded = meshed()?;
    let packet = tcp("10.1.2.3:80", SYN).bytes(Link::Ethernet);
    let capacity = underpass_abi::capacity::EVENTS_BYTES / size_of::<underpass_abi::Event>();
    for _ in 0..=capacity {
        assert_eq!(loaded.run(Guard, Link::Ethernet, &packet)?, Verdict::Drop);
    }
    let events = loaded.events()?.len();
    assert!((1..capacity).contains(&events), "{events} events fit into room for fewer than {capacity}");
    assert_eq!(loaded.counter(GuardDropped)?, capacity as u64 + 1);
    Ok(())
}
