//! What the bytes in the maps mean.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;
use underpass_abi::{
    Address, Counter, DIRECTION_INBOUND, DIRECTION_OUTBOUND, DIRECTION_PROBE, FlowKey, MESH_CAPTURE, MeshEntry,
    OriginalDestination, POD_ASSIGN, POD_CAPTURE_ALL, POD_OWN_RULES_ONLY, POD_SILENT, POD_STRICT, PORT_ASSIGN,
    PORT_EXCLUDED, PORT_PERMISSIVE, PORT_PROBE, PORT_STRICT, PendingFlows, PodConfig, PortKey, PortRule, ProbeKey,
    ProbeSyn,
};

use super::{
    Names,
    field::{Field, Fields},
};
use crate::capture::desired::{ALL_PODS, POD_BITS, V4_OFFSET};

/// An address; those of IPv4 as such.
pub(super) fn ip(address: Address) -> IpAddr {
    Ipv6Addr::from(address).to_canonical()
}

fn present(address: Address) -> Field {
    match ip(address) {
        a if a.is_unspecified() => Field::Nothing,
        a => Field::Address(a),
    }
}

/// A network of the tries. A prefix that is none, which nobody but the agent could have written, is shown as text.
fn network(address: Address, bits: u32) -> Field {
    let net = match ip(address) {
        IpAddr::V4(a) if bits >= V4_OFFSET => IpNet::new(a.into(), (bits - V4_OFFSET) as u8),
        _ => IpNet::new(Ipv6Addr::from(address).into(), bits.min(255) as u8),
    };
    net.map_or_else(|_| Field::Text(format!("{}/{bits}", ip(address))), Field::Network)
}

/// Names of the flags that are set; unknown ones are not hidden.
fn flags(value: u32, names: &[(u32, &'static str)]) -> Field {
    let mut words: Vec<_> = names.iter().filter(|(flag, _)| value & flag != 0).map(|(_, name)| *name).collect();
    if names.iter().fold(value, |rest, (flag, _)| rest & !flag) != 0 {
        words.push("unknown");
    }
    Field::Words(words)
}

fn word(value: u32, names: &[(u32, &'static str)]) -> Field {
    match names.iter().find(|(n, _)| *n == value) {
        Some((_, name)) => Field::Word(name),
        None => Field::Text(format!("unknown ({value})")),
    }
}

fn pod(id: u32, names: &Names) -> [(&'static str, Field); 2] {
    let name = if id == ALL_PODS { Field::Word("all pods") } else { names.pod(id).into() };
    [("pod_id", Field::Number(id.into())), ("workload", name)]
}

fn fields<const N: usize>(fields: [(&'static str, Field); N]) -> Fields {
    Fields(fields.into())
}

/// Key of `PODS`.
pub(super) fn netns(cookie: u64, names: &Names) -> Fields {
    fields([("netns_cookie", Field::Number(cookie)), ("workload", names.netns(cookie).into())])
}

/// Key of `PODS_BY_ID`.
pub(super) fn pod_id(id: u32, names: &Names) -> Fields {
    fields(pod(id, names))
}

/// Key of `NODE_INTERFACES`.
pub(super) fn interface(index: u32) -> Fields {
    fields([("interface", Field::Number(index.into()))])
}

/// Value of `PODS` and `PODS_BY_ID`.
pub(super) fn pod_config(config: &PodConfig) -> Fields {
    const FLAGS: [(u32, &str); 5] = [
        (POD_STRICT, "strict"),
        (POD_CAPTURE_ALL, "capture-all"),
        (POD_ASSIGN, "plaintext-to-agent"),
        (POD_SILENT, "silent"),
        (POD_OWN_RULES_ONLY, "own-rules-only"),
    ];
    fields([
        ("pod_id", Field::Number(config.pod_id.into())),
        ("flags", flags(config.flags, &FLAGS)),
        ("ipv4", present(config.addr4)),
        ("ipv6", present(config.addr6)),
    ])
}

/// Key of `MESH`.
pub(super) fn mesh_key(address: Address, bits: u32) -> Fields {
    fields([("network", network(address, bits))])
}

/// Value of `MESH`.
pub(super) fn mesh_entry(entry: MeshEntry) -> Fields {
    fields([("flags", flags(entry.flags, &[(MESH_CAPTURE, "capture")]))])
}

/// Key of `EXCLUDED_CIDRS`.
pub(super) fn excluded_key(key: [u8; 20], bits: u32, names: &Names) -> Fields {
    let (id, address) = key.split_at(4);
    let id = u32::from_be_bytes(id.try_into().expect("split at four"));
    let address: Address = address.try_into().expect("sixteen remain");
    let [id, name] = pod(id, names);
    fields([id, name, ("network", network(address, bits.saturating_sub(POD_BITS)))])
}

/// Key of `PORT_RULES`.
pub(super) fn port_key(key: PortKey, names: &Names) -> Fields {
    const DIRECTIONS: [(u32, &str); 3] = [
        (DIRECTION_OUTBOUND as u32, "outbound"),
        (DIRECTION_INBOUND as u32, "inbound"),
        (DIRECTION_PROBE as u32, "probe"),
    ];
    let [id, name] = pod(key.pod_id, names);
    let direction = word(key.direction.into(), &DIRECTIONS);
    fields([id, name, ("direction", direction), ("port", Field::Number(key.port.into()))])
}

/// Value of `PORT_RULES`.
pub(super) fn port_rule(rule: PortRule) -> Fields {
    const ACTIONS: [(u32, &str); 5] = [
        (PORT_EXCLUDED, "excluded"),
        (PORT_PERMISSIVE, "permissive"),
        (PORT_STRICT, "strict"),
        (PORT_ASSIGN, "plaintext-to-agent"),
        (PORT_PROBE, "probe"),
    ];
    fields([("action", word(rule.action, &ACTIONS))])
}

/// Key of `PROBE_CGROUPS`.
pub(super) fn cgroup(id: u64) -> Fields {
    fields([("cgroup_id", Field::Number(id))])
}

/// Key of `PROBES`.
pub(super) fn probe(key: &ProbeKey) -> Fields {
    fields([
        ("source", Field::Address(ip(key.src))),
        ("source_port", Field::Number(key.src_port.into())),
        ("destination", Field::Address(ip(key.dst))),
        ("port", Field::Number(key.dst_port.into())),
    ])
}

/// Value of `PROBES`.
pub(super) fn probe_syn(syn: &ProbeSyn) -> Fields {
    fields([("sequence", Field::Number(syn.sequence.into())), ("sent_at_ns", Field::Number(syn.sent_at))])
}

/// Key of `NODE_ADDRESSES`.
pub(super) fn address(address: Address) -> Fields {
    fields([("address", Field::Address(ip(address)))])
}

/// A value that says nothing.
pub(super) fn nothing() -> Fields {
    Fields::default()
}

/// Key of `FLOWS`.
pub(super) fn flow(key: &FlowKey, names: &Names) -> Fields {
    fields([
        ("netns_cookie", Field::Number(key.netns)),
        ("workload", names.netns(key.netns).into()),
        ("client", Field::Address(ip(key.client))),
        ("client_port", Field::Number(key.client_port.into())),
        ("listener", Field::Address(ip(key.listener))),
        ("listener_port", Field::Number(key.listener_port.into())),
    ])
}

/// Value of `FLOWS`.
pub(super) fn destination(value: &OriginalDestination) -> Fields {
    fields([
        ("socket_cookie", Field::Number(value.cookie)),
        ("destination", Field::Address(ip(value.addr))),
        ("port", Field::Number(value.port.into())),
        ("pod_id", Field::Number(value.pod_id.into())),
    ])
}

/// Value of `PENDING_FLOWS`.
pub(super) fn pending(value: &PendingFlows) -> Fields {
    fields([
        ("waiting", Field::Number(value.count())),
        ("added", Field::Number(value.added)),
        ("taken", Field::Number(value.taken)),
    ])
}

/// Key of `COUNTERS`.
pub(super) fn counter(index: u32) -> Fields {
    let name = Counter::ALL.iter().find(|(c, _)| *c as u32 == index).map(|(_, name)| *name);
    fields([("counter", name.map_or_else(|| Field::Text(format!("unknown ({index})")), |n| Field::Text(n.to_owned())))])
}

/// Value of `COUNTERS`.
pub(super) fn count(per_cpu: &[u64]) -> Fields {
    let total = per_cpu.iter().fold(0_u64, |sum, n| sum.wrapping_add(*n));
    fields([("total", Field::Number(total)), ("per_cpu", Field::Numbers(per_cpu.to_vec()))])
}
