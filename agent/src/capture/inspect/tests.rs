//! Bytes and their meaning.

use std::net::IpAddr;

use serde_json::{Value, json};
use underpass_abi::{
    Address, COUNTERS, DIRECTION_PROBE, MESH_CAPTURE, MeshEntry, POD_CAPTURE_ALL, POD_STRICT, PORT_STRICT, PodConfig,
    PortKey, PortRule,
};

use super::{Names, NotListed, decode, field::Fields};
use crate::{
    capture::{
        desired::{address, excluded_prefix, mesh_prefix},
        maps::PINNED,
    },
    mesh::WorkloadKey,
};

fn bytes(text: &str) -> Address {
    address(text.parse::<IpAddr>().unwrap())
}

fn names() -> Names {
    let mut names = Names::default();
    names.add(3, 99, &WorkloadKey { namespace: "shop".into(), name: "web".into() });
    names
}

fn value(fields: &Fields) -> Value {
    serde_json::to_value(fields).unwrap()
}

#[test]
fn pods_have_names_flags_and_addresses() {
    let config = PodConfig {
        pod_id: 3,
        flags: POD_STRICT | POD_CAPTURE_ALL | 1 << 31,
        addr4: bytes("10.77.0.2"),
        addr6: [0; 16],
    };
    let expected =
        json!({ "pod_id": 3, "flags": ["strict", "capture-all", "unknown"], "ipv4": "10.77.0.2", "ipv6": null });
    assert_eq!(value(&decode::pod_config(&config)), expected);
    assert_eq!(value(&decode::netns(99, &names())), json!({ "netns_cookie": 99, "workload": "shop/web" }));
    assert_eq!(value(&decode::netns(98, &names())), json!({ "netns_cookie": 98, "workload": null }));
    assert_eq!(value(&decode::pod_id(3, &names())), json!({ "pod_id": 3, "workload": "shop/web" }));
}

/// Networks are written as the agent writes them, and come back as they were.
#[test]
fn networks_of_both_families() {
    for text in ["10.0.0.0/8", "0.0.0.0/0", "10.77.0.2/32", "fd00::/8", "::/0", "fd00::2/128"] {
        let key = mesh_prefix(text.parse().unwrap());
        assert_eq!(value(&decode::mesh_key(key.bytes, key.bits)), json!({ "network": text }));
        let key = excluded_prefix(3, text.parse().unwrap());
        let expected = json!({ "pod_id": 3, "workload": "shop/web", "network": text });
        assert_eq!(value(&decode::excluded_key(key.bytes, key.bits, &names())), expected);
    }
    // What nobody writes is shown all the same.
    assert_eq!(value(&decode::mesh_key(bytes("10.0.0.0"), 200)), json!({ "network": "10.0.0.0/200" }));
    assert_eq!(value(&decode::mesh_entry(MeshEntry { flags: MESH_CAPTURE })), json!({ "flags": ["capture"] }));
}

#[test]
fn port_rules() {
    let key = PortKey { pod_id: 0, port: 8080, direction: DIRECTION_PROBE };
    let expected = json!({ "pod_id": 0, "workload": "all pods", "direction": "probe", "port": 8080 });
    assert_eq!(value(&decode::port_key(key, &names())), expected);
    assert_eq!(value(&decode::port_rule(PortRule { action: PORT_STRICT })), json!({ "action": "strict" }));
    assert_eq!(value(&decode::port_rule(PortRule { action: 77 })), json!({ "action": "unknown (77)" }));
}

#[test]
fn counters_are_summed() {
    assert_eq!(value(&decode::counter(0)), json!({ "counter": "captured" }));
    assert_eq!(value(&decode::counter(COUNTERS)), json!({ "counter": format!("unknown ({COUNTERS})") }));
    assert_eq!(value(&decode::count(&[1, 2, u64::MAX])), json!({ "total": 2, "per_cpu": [1, 2, u64::MAX] }));
}

/// Whoever adds a map has to say how it is shown.
#[test]
fn every_pinned_map_is_listed_or_says_why_not() {
    let listed = [
        "PODS",
        "PODS_BY_ID",
        "NODE_INTERFACES",
        "MESH",
        "EXCLUDED_CIDRS",
        "PORT_RULES",
        "PROBE_CGROUPS",
        "PROBES",
        "NODE_ADDRESSES",
        "FLOWS",
        "PENDING_FLOWS",
        "COUNTERS",
    ];
    for (name, ..) in PINNED {
        assert_eq!(NotListed::of(name).is_none(), listed.contains(&name), "{name}");
    }
}
