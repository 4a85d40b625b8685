use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use proptest::prelude::*;

use crate::{
    mesh::{
        Endpoint, InboundMode, MeshSettings, Protocol, Service, ServicePort, Snapshot, SnapshotBuilder, Workload,
        WorkloadKey,
    },
    telemetry::RefusalReason,
    tunnel::native::{MAX_HEADER, Preamble, check, decode, encode},
};

fn preamble(source: &str, destination: &str) -> Preamble {
    Preamble {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        authority: None,
        unique_id: None,
    }
}

/// A header from its parts, without any check.
fn raw(version_command: u8, family: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    bytes.extend([version_command, family]);
    bytes.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
    bytes.extend(payload);
    bytes
}

const V4: [u8; 12] = [10, 0, 0, 1, 10, 0, 0, 2, 0x9c, 0x40, 0, 80];

fn with_tlvs(tlvs: &[u8]) -> Vec<u8> {
    raw(0x21, 0x11, &[&V4, tlvs].concat())
}

fn address() -> impl Strategy<Value = SocketAddr> {
    let ip = prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)];
    (ip, any::<u16>()).prop_map(|(ip, port)| SocketAddr::new(ip.to_canonical(), port))
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        source in address(),
        destination in address(),
        authority in proptest::option::of("[a-z0-9.-]{1,253}"),
        unique_id in proptest::option::of(proptest::collection::vec(any::<u8>(), 1..=128)),
        behind in proptest::collection::vec(any::<u8>(), 0..64),
    ) {
        let written = Preamble { source, destination, authority, unique_id };
        let header = encode(&written);
        prop_assert!(header.len() <= MAX_HEADER);
        for cut in 0..header.len() {
            prop_assert_eq!(decode(&header[..cut]), Ok(None));
        }
        let bytes = [header.clone(), behind].concat();
        prop_assert_eq!(decode(&bytes), Ok(Some((written, header.len()))));
    }

    #[test]
    fn a_changed_bit_never_passes_the_checksum(bit in 0..(16 + 12 + 7 + 3 + 11) * 8_usize) {
        let mut good = preamble("10.0.0.1:40000", "10.0.0.2:80");
        good.authority = Some("web.default".into());
        let mut header = encode(&good);
        prop_assert_eq!(header.len(), 16 + 12 + 7 + 3 + 11);
        header[bit / 8] ^= 1 << (bit % 8);
        // A changed TLV type may hide the checksum, which is optional; nothing else may get through.
        let crc_type = 16 + 12;
        if bit / 8 != crc_type {
            prop_assert!(!matches!(decode(&header), Ok(Some(_))), "{:?}", decode(&header));
        }
    }

    #[test]
    fn foreign_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..1200), signed in any::<bool>()) {
        let bytes = if signed { [b"\r\n\r\n\0\r\nQUIT\n\x21\x11".as_slice(), &bytes].concat() } else { bytes };
        if let Ok(Some((_, length))) = decode(&bytes) {
            prop_assert!(length <= bytes.len() && length <= MAX_HEADER);
        }
    }
}

#[test]
fn headers_of_others_are_read() {
    // No TLVs at all, and unknown ones.
    for header in [with_tlvs(&[]), with_tlvs(&[0xea, 0, 2, 1, 2, 0x04, 0, 0])] {
        let expected = preamble("10.0.0.1:40000", "10.0.0.2:80");
        assert_eq!(decode(&header), Ok(Some((expected, header.len()))));
    }
    let mapped = encode(&preamble("[::ffff:10.0.0.1]:1", "10.0.0.2:2"));
    assert_eq!(mapped[13], 0x11, "written as IPv4");
    let mixed = encode(&preamble("10.0.0.1:1", "[fd00::2]:2"));
    assert_eq!(decode(&mixed), Ok(Some((preamble("10.0.0.1:1", "[fd00::2]:2"), mixed.len()))));
}

#[test]
fn an_authority_that_nobody_would_accept_is_not_sent() {
    for authority in ["", "two words", "line\nfeed", &"x".repeat(256)] {
        let mut p = preamble("10.0.0.1:1", "10.0.0.2:2");
        p.authority = Some(authority.to_owned());
        let (read, _) = decode(&encode(&p)).unwrap().unwrap();
        assert_eq!(read.authority, None, "{authority:?}");
    }
}

#[test]
fn refused_at_the_first_wrong_byte() {
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("version 1", b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n".to_vec(), "byte 0"),
        ("first byte", b"G".to_vec(), "byte 0"),
        ("in the signature", b"\r\n\r\n\0\r\nQUIT\r".to_vec(), "byte 11"),
        ("LOCAL", raw(0x20, 0x11, &V4)[..13].to_vec(), "0x20"),
        ("version 3", raw(0x31, 0x11, &V4)[..13].to_vec(), "0x31"),
        ("UDP", raw(0x21, 0x12, &V4)[..14].to_vec(), "0x12"),
        ("unix", raw(0x21, 0x31, &[0; 216])[..14].to_vec(), "0x31"),
        ("unspecified family", raw(0x21, 0x00, &[])[..14].to_vec(), "0x00"),
        ("unspecified protocol", raw(0x21, 0x10, &V4)[..14].to_vec(), "0x10"),
        ("too long", raw(0x21, 0x11, &[0; MAX_HEADER - 15])[..16].to_vec(), "1025 bytes"),
        ("addresses cut", raw(0x21, 0x11, &V4[..11]), "11 bytes"),
        ("IPv6 with IPv4's length", raw(0x21, 0x21, &V4), "12 bytes"),
        ("TLV cut", with_tlvs(&[0x02, 0, 9, b'a']), "TLV"),
        ("half a TLV header", with_tlvs(&[0x02, 0]), "leftover"),
        ("authority twice", with_tlvs(&[2, 0, 1, b'a', 2, 0, 1, b'b']), "twice"),
        ("unknown twice", with_tlvs(&[0xe0, 0, 0, 0xe0, 0, 0]), "twice"),
        ("empty authority", with_tlvs(&[2, 0, 0]), "host name"),
        ("authority with control characters", with_tlvs(&[2, 0, 2, b'a', 7]), "host name"),
        ("authority not UTF-8", with_tlvs(&[2, 0, 1, 0xff]), "host name"),
        ("empty unique id", with_tlvs(&[5, 0, 0]), "unique id"),
        ("CRC of two bytes", with_tlvs(&[3, 0, 2, 0, 0]), "CRC32C"),
        ("wrong CRC", with_tlvs(&[3, 0, 4, 1, 2, 3, 4]), "CRC32C"),
    ];
    for (name, bytes, expected) in cases {
        let error = decode(bytes).expect_err(name);
        assert!(error.contains(expected), "{name}: {error}");
    }
    let long = [&[2, 1, 0][..], &[b'a'; 256]].concat();
    assert!(decode(&with_tlvs(&long)).unwrap_err().contains("host name"));
    let long = [&[5, 0, 129][..], &[1; 129]].concat();
    assert!(decode(&with_tlvs(&long)).unwrap_err().contains("unique id"));
    assert_eq!(decode(&raw(0x21, 0x11, &[0; MAX_HEADER - 16])[..MAX_HEADER - 1]), Ok(None));
}

#[test]
fn checksum_of_the_specification() {
    // CRC-32C of "123456789" is the algorithm's published check value; our header uses the same one.
    assert_eq!(crc::Crc::<u32>::new(&crc::CRC_32_ISCSI).checksum(b"123456789"), 0xe306_9283);
}

fn mesh() -> (Arc<Workload>, Snapshot) {
    let id = |name: &str| format!("spiffe://td.test/ns/default/sa/{name}").parse().unwrap();
    let workload = |name: &str, address: &str| Workload {
        key: WorkloadKey { namespace: "default".into(), name: name.into() },
        identity: id(name),
        node: "n1".into(),
        addresses: vec![address.parse().unwrap()],
        protocol: Protocol::Underpass,
        mode: InboundMode::Strict,
        port_modes: vec![],
        local: None,
    };
    let mut builder = SnapshotBuilder::new("n1", "td.test".parse().unwrap(), MeshSettings::default());
    let me = builder.workload(workload("web", "10.0.0.2")).unwrap();
    let other = builder.workload(workload("other", "10.0.0.3")).unwrap();
    let service = |name: &str, vip: &str, endpoint: &Arc<Workload>| Service {
        namespace: "default".into(),
        name: name.into(),
        hostname: format!("{name}.default.svc.cluster.local").into(),
        vips: vec![vip.parse().unwrap()],
        ports: vec![
            ServicePort { port: 80, target_port: 8080 },
            ServicePort { port: 81, target_port: 15008 },
            ServicePort { port: 82, target_port: 0 },
        ],
        endpoints: vec![Endpoint { workload: Arc::clone(endpoint), ports: vec![] }],
        awaited: None,
    };
    builder.service(service("web", "10.96.0.1", &me)).unwrap();
    builder.service(service("other", "10.96.0.2", &other)).unwrap();
    (me, builder.build())
}

#[test]
fn the_receiver_trusts_nothing() {
    use RefusalReason::{ProxyDestination, ProxySource};
    let (me, mesh) = mesh();
    let peer = "10.0.1.1";
    let cases = [
        ("own address", "10.0.1.1:4000", "10.0.0.2:8080", peer, Ok(8080)),
        ("own address, mapped", "[::ffff:10.0.1.1]:4000", "[::ffff:10.0.0.2]:8080", "::ffff:10.0.1.1", Ok(8080)),
        ("service that selects it", "10.0.1.1:4000", "10.96.0.1:80", peer, Ok(8080)),
        ("service's other port", "10.0.1.1:4000", "10.96.0.1:443", peer, Err(ProxyDestination)),
        ("service's agent port", "10.0.1.1:4000", "10.96.0.1:81", peer, Err(ProxyDestination)),
        ("service's port 0", "10.0.1.1:4000", "10.96.0.1:82", peer, Err(ProxyDestination)),
        ("service of others", "10.0.1.1:4000", "10.96.0.2:80", peer, Err(ProxyDestination)),
        ("another pod", "10.0.1.1:4000", "10.0.0.3:8080", peer, Err(ProxyDestination)),
        ("not in the mesh", "10.0.1.1:4000", "8.8.8.8:53", peer, Err(ProxyDestination)),
        ("loopback", "10.0.1.1:4000", "127.0.0.1:8080", peer, Err(ProxyDestination)),
        ("loopback, mapped", "10.0.1.1:4000", "[::ffff:127.0.0.1]:8080", peer, Err(ProxyDestination)),
        ("unspecified", "10.0.1.1:4000", "0.0.0.0:8080", peer, Err(ProxyDestination)),
        ("multicast", "10.0.1.1:4000", "224.0.0.1:8080", peer, Err(ProxyDestination)),
        ("tunnel port", "10.0.1.1:4000", "10.0.0.2:15008", peer, Err(ProxyDestination)),
        ("outbound port", "10.0.1.1:4000", "10.0.0.2:15001", peer, Err(ProxyDestination)),
        ("extra outbound port", "10.0.1.1:4000", "10.0.0.2:15107", peer, Err(ProxyDestination)),
        ("port 0", "10.0.1.1:4000", "10.0.0.2:0", peer, Err(ProxyDestination)),
        ("source is another", "10.0.1.2:4000", "10.0.0.2:8080", peer, Err(ProxySource)),
        ("source is loopback", "127.0.0.1:4000", "10.0.0.2:8080", "127.0.0.1", Err(ProxySource)),
        ("source is unspecified", "[::]:4000", "10.0.0.2:8080", "::", Err(ProxySource)),
        ("source is multicast", "224.0.0.1:4000", "10.0.0.2:8080", "224.0.0.1", Err(ProxySource)),
    ];
    for (name, source, destination, peer, expected) in cases {
        assert_eq!(check(&preamble(source, destination), peer.parse().unwrap(), &me, &mesh), expected, "{name}");
    }
}
