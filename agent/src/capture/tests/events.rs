use std::time::Duration;

use underpass_abi::Address;

use super::*;

/// A record as the kernel writes it.
fn record(kind: u32, pod_id: u32, ends: [(Address, u16); 2]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(pod_id.to_ne_bytes());
    bytes.extend(ends[0].0);
    bytes.extend(ends[1].0);
    bytes.extend(ends[0].1.to_ne_bytes());
    bytes.extend(ends[1].1.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes
}

fn v4(a: [u8; 4]) -> Address {
    std::net::Ipv4Addr::from(a).to_ipv6_mapped().octets()
}

#[test]
fn the_fields_are_where_the_programs_put_them() {
    use std::mem::offset_of;
    use underpass_abi::Event as Raw;
    let offsets = [
        offset_of!(Raw, kind),
        offset_of!(Raw, pod_id),
        offset_of!(Raw, src),
        offset_of!(Raw, dst),
        offset_of!(Raw, src_port),
        offset_of!(Raw, dst_port),
    ];
    assert_eq!(offsets, [0, 4, 8, 24, 40, 42]);
}

#[test]
fn a_record_is_read() {
    let bytes = record(Counter::GuardDropped as u32, 7, [(v4([10, 0, 0, 1]), 4000), (v4([10, 0, 0, 2]), 80)]);
    let event = parse_event(&bytes).unwrap();
    assert_eq!(event.name(), "guard_dropped");
    assert_eq!(event.pod_id, 7);
    assert_eq!(event.source, "10.0.0.1:4000".parse().unwrap());
    assert_eq!(event.destination, "10.0.0.2:80".parse().unwrap());

    let six: std::net::Ipv6Addr = "2001:db8::1".parse().unwrap();
    let event = parse_event(&record(0, 0, [(six.octets(), 1), (six.octets(), 2)])).unwrap();
    assert_eq!(event.destination, "[2001:db8::1]:2".parse().unwrap());
}

#[test]
fn what_is_no_record_is_refused() {
    let bytes = record(0, 0, [([0; 16], 0), ([0; 16], 0)]);
    assert_eq!(parse_event(&[]), Err(EventError::Length(0)));
    assert_eq!(parse_event(&bytes[1..]), Err(EventError::Length(bytes.len() - 1)));
    assert_eq!(parse_event(&[bytes, vec![0]].concat()), Err(EventError::Length(LENGTH + 1)));
    let unknown = underpass_abi::COUNTERS;
    assert_eq!(parse_event(&record(unknown, 0, [([0; 16], 0), ([0; 16], 0)])), Err(EventError::Kind(unknown)));
}

#[test]
fn lines_are_limited_and_the_rest_counted() {
    let start = Instant::now();
    let mut limit = Limit::new(start);
    let admitted = (0..LINES * 3).filter(|_| limit.admit()).count();
    assert_eq!(admitted, LINES as usize);
    assert_eq!(limit.roll(start), 0, "the window is not over");
    assert_eq!(limit.roll(start + WINDOW - Duration::from_millis(1)), 0, "the window is not over");
    assert!(!limit.admit());
    assert_eq!(limit.roll(start + WINDOW), u64::from(LINES) * 2 + 1);
    assert!(limit.admit());
    assert_eq!(limit.roll(start + WINDOW), 0);
}

proptest::proptest! {
    #[test]
    fn no_bytes_are_too_strange(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..=2 * LENGTH)) {
        let known = |k: u32| k < underpass_abi::COUNTERS;
        let expected = bytes.len() == LENGTH && known(u32::from_ne_bytes(bytes[..4].try_into().unwrap()));
        proptest::prop_assert_eq!(parse_event(&bytes).is_ok(), expected);
    }
}
