//! What the maps have to hold, computed from the mesh. No I/O.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use underpass_abi::{
    Address, DIRECTION_INBOUND, DIRECTION_OUTBOUND, DIRECTION_PROBE, MESH_CAPTURE, MeshEntry, POD_ASSIGN,
    POD_CAPTURE_ALL, POD_OWN_RULES_ONLY, POD_SILENT, POD_STRICT, PORT_ASSIGN, PORT_EXCLUDED, PORT_PERMISSIVE,
    PORT_PROBE, PORT_STRICT, PodConfig, PortKey, PortRule, is_agent_port,
};

use crate::{
    mesh::{Exclusions, InboundMode, LocalPod, PlaintextRefusal, Snapshot, Workload},
    policy::{Disposition, PlaintextRules},
};

/// Bits before an IPv4 address in an [`Address`].
pub const V4_OFFSET: u32 = 96;
/// Bits of the pod id before the address in the exclusions' keys.
pub const POD_BITS: u32 = 32;
/// Value of `EXCLUDED_CIDRS`; it says nothing, being there is what counts.
const EXCLUDED: u32 = 1;
/// Value of `NODE_ADDRESSES` and `PROBE_CGROUPS`; as above.
pub const PRESENT: u32 = 1;
/// Pod id of what holds for every pod.
pub const ALL_PODS: u32 = 0;

/// A prefix in a trie of `N`-byte keys. Orders by bytes first, so that the entries of one pod are neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Prefix<const N: usize> {
    /// The key; zero behind the prefix.
    pub bytes: [u8; N],
    /// Length of the prefix in bits.
    pub bits: u32,
}

/// Key of a port rule, ordered by pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortSlot {
    /// The pod, or [`ALL_PODS`].
    pub pod_id: u32,
    /// `DIRECTION_*`.
    pub direction: u16,
    /// Destination port.
    pub port: u16,
}

impl From<PortSlot> for PortKey {
    fn from(s: PortSlot) -> Self {
        Self { pod_id: s.pod_id, port: s.port, direction: s.direction }
    }
}

impl From<PortKey> for PortSlot {
    fn from(k: PortKey) -> Self {
        Self { pod_id: k.pod_id, direction: k.direction, port: k.port }
    }
}

/// Port rules and excluded networks of one pod, or of all of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// For `EXCLUDED_CIDRS`.
    pub excluded: BTreeMap<Prefix<20>, u32>,
    /// For `PORT_RULES`.
    pub ports: BTreeMap<PortSlot, PortRule>,
}

/// What holds for the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MeshState {
    /// For `MESH`.
    pub mesh: BTreeMap<Prefix<16>, MeshEntry>,
    /// Mesh-wide exclusions, under [`ALL_PODS`].
    pub rules: Rules,
    /// For `NODE_ADDRESSES`.
    pub node_addresses: BTreeMap<Address, u32>,
    /// What holds for every pod alike.
    pub everywhere: Everywhere,
}

/// Settings of the mesh that each pod's entry carries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Everywhere {
    /// Every destination is captured.
    pub capture_all: bool,
    /// Refused plaintext gets no answer.
    pub silent: bool,
}

/// What holds for one pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodState {
    /// For `PODS` and `PODS_BY_ID`.
    pub config: PodConfig,
    /// Under the pod's own number.
    pub rules: Rules,
}

/// An address as the programs see it.
pub fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
        IpAddr::V6(a) => a.octets(),
    }
}

/// A network in `MESH`.
pub fn mesh_prefix(net: IpNet) -> Prefix<16> {
    let bits = u32::from(net.prefix_len()) + if net.addr().is_ipv4() { V4_OFFSET } else { 0 };
    Prefix { bytes: address(net.network()), bits }
}

/// A network in `EXCLUDED_CIDRS`, for one pod.
pub fn excluded_prefix(pod_id: u32, net: IpNet) -> Prefix<20> {
    let inner = mesh_prefix(net);
    let mut bytes = [0; 20];
    bytes[..4].copy_from_slice(&pod_id.to_be_bytes());
    bytes[4..].copy_from_slice(&inner.bytes);
    Prefix { bytes, bits: POD_BITS + inner.bits }
}

/// Projects a snapshot.
pub fn mesh(snapshot: &Snapshot) -> MeshState {
    let settings = &snapshot.settings;
    let mut mesh = BTreeMap::new();
    if settings.cidrs.iter().any(|n| matches!(n, IpNet::V6(v6) if covers_mapped(v6))) {
        // Every IPv4 address is ::ffff:a.b.c.d to the programs; a short IPv6 prefix such as ::/0 does not mean those.
        let bytes = address(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED));
        mesh.insert(Prefix { bytes, bits: V4_OFFSET }, MeshEntry { flags: 0 });
    }
    let networks = settings.cidrs.iter().copied().chain(snapshot.captured_addresses().map(IpNet::from));
    // In bulk: tens of thousands of entries one by one take several times as long.
    mesh.append(&mut networks.map(|n| (mesh_prefix(n), MeshEntry { flags: MESH_CAPTURE })).collect());
    let mut rules = Rules::default();
    rules.exclude(ALL_PODS, &settings.exclude);
    let node_addresses = settings.probes.node_addresses.iter().map(|a| (address(*a), PRESENT)).collect();
    let everywhere =
        Everywhere { capture_all: settings.capture_all, silent: settings.plaintext_refusal == PlaintextRefusal::Drop };
    MeshState { mesh, rules, node_addresses, everywhere }
}

/// What of [`MeshState::mesh`] is different from what it was with `before`. `None` when more than addresses is different.
pub fn mesh_changes(before: &Snapshot, snapshot: &Snapshot) -> Option<BTreeMap<Prefix<16>, Option<MeshEntry>>> {
    if before.settings != snapshot.settings {
        return None;
    }
    let networks: Vec<Prefix<16>> = snapshot.settings.cidrs.iter().map(|net| mesh_prefix(*net)).collect();
    let change = |address: IpAddr| {
        let prefix = mesh_prefix(address.into());
        let captured = snapshot.captures(address) || networks.contains(&prefix);
        (prefix, captured.then_some(MeshEntry { flags: MESH_CAPTURE }))
    };
    Some(snapshot.captured_apart(before).map(change).collect())
}

fn covers_mapped(net: &ipnet::Ipv6Net) -> bool {
    let mapped = std::net::Ipv4Addr::UNSPECIFIED.to_ipv6_mapped();
    u32::from(net.prefix_len()) < V4_OFFSET && net.contains(&mapped)
}

/// Projects one of this node's workloads. `plaintext` is what modes and policies together make of it; without policies the modes alone
/// decide.
pub fn pod(
    id: u32,
    workload: &Workload,
    local: &LocalPod,
    plaintext: Option<&PlaintextRules>,
    everywhere: Everywhere,
) -> PodState {
    let first = |v4: bool| workload.addresses.iter().find(|a| a.is_ipv4() == v4).map_or([0; 16], |a| address(*a));
    let flag = |set, flag| if set { flag } else { 0 };
    let default = plaintext.map_or_else(|| of_mode(workload.mode), |rules| rules.default);
    let config = PodConfig {
        pod_id: id,
        flags: flag(default == Disposition::Deny, POD_STRICT)
            | flag(default == Disposition::Evaluate, POD_ASSIGN)
            | flag(everywhere.capture_all || local.capture_all, POD_CAPTURE_ALL)
            | flag(everywhere.silent, POD_SILENT),
        addr4: first(true),
        addr6: first(false),
    };
    let mut rules = Rules::default();
    let of_modes = || workload.port_modes.iter().map(|m| (m.port, of_mode(workload.mode_of(m.port)))).collect();
    let ports: BTreeMap<u16, Disposition> = plaintext.map_or_else(of_modes, |rules| rules.ports.clone());
    for (port, disposition) in ports {
        let action = match disposition {
            Disposition::Allow => PORT_PERMISSIVE,
            Disposition::Deny => PORT_STRICT,
            Disposition::Evaluate => PORT_ASSIGN,
        };
        rules.inbound(id, port, action);
    }
    for &port in &local.probe_ports {
        rules.add(id, DIRECTION_PROBE, port, PORT_PROBE);
    }
    // Last: an excluded port is passed whatever its mode.
    rules.exclude(id, &local.exclude);
    PodState { config, rules }
}

/// Projects a pod that is kept, out of what holds for it and for `all` pods: STRICT on every port,
/// whatever is excluded elsewhere. Only the kubelet's probes pass as before: a container that they
/// find dead is started again.
pub fn kept(config: &PodConfig, own: &Rules, all: &Rules) -> PodState {
    let id = config.pod_id;
    let mut rules = Rules::default();
    let probes = own.ports.iter().filter(|(slot, _)| slot.direction == DIRECTION_PROBE);
    rules.ports.extend(probes.map(|(slot, rule)| (*slot, *rule)));
    for slot in all.ports.keys().filter(|slot| slot.direction == DIRECTION_INBOUND) {
        rules.inbound(id, slot.port, PORT_STRICT);
    }
    PodState { config: PodConfig { flags: config.flags & !POD_ASSIGN | POD_STRICT, ..*config }, rules }
}

/// Without policies.
fn of_mode(mode: InboundMode) -> Disposition {
    match mode {
        InboundMode::Strict => Disposition::Deny,
        InboundMode::Permissive => Disposition::Allow,
    }
}

impl Rules {
    fn exclude(&mut self, pod_id: u32, exclude: &Exclusions) {
        self.excluded.extend(exclude.outbound_cidrs.iter().map(|n| (excluded_prefix(pod_id, *n), EXCLUDED)));
        for &port in &exclude.outbound_ports {
            self.ports
                .insert(PortSlot { pod_id, direction: DIRECTION_OUTBOUND, port }, PortRule { action: PORT_EXCLUDED });
        }
        for &port in &exclude.inbound_ports {
            self.inbound(pod_id, port, PORT_EXCLUDED);
        }
    }

    fn inbound(&mut self, pod_id: u32, port: u16, action: u32) {
        self.add(pod_id, DIRECTION_INBOUND, port, action);
    }

    /// The agent's own ports take no rules: nothing in a configuration opens them.
    fn add(&mut self, pod_id: u32, direction: u16, port: u16, action: u32) {
        if !is_agent_port(port) {
            self.ports.insert(PortSlot { pod_id, direction, port }, PortRule { action });
        }
    }

    fn inbound_action(&self, pod_id: u32, port: u16) -> Option<u32> {
        self.ports.get(&PortSlot { pod_id, direction: DIRECTION_INBOUND, port }).map(|r| r.action)
    }
}

/// Does a pod with the first configuration let in less plaintext than one with the second, where no port rule says otherwise?
pub fn is_tighter(new: &PodConfig, old: &PodConfig) -> bool {
    let rank = |flags: u32| match flags {
        _ if flags & POD_STRICT != 0 => 2,
        _ if flags & POD_ASSIGN != 0 => 1,
        _ => 0,
    };
    (rank(new.flags), new.flags & POD_OWN_RULES_ONLY) > (rank(old.flags), old.flags & POD_OWN_RULES_ONLY)
}

/// Which inbound ports of a pod refuse plaintext.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Strictness {
    default: bool,
    ports: BTreeMap<u16, bool>,
}

impl Strictness {
    /// As the programs decide: the pod's own rule, else one for every pod, else the pod's mode.
    pub fn new(config: &PodConfig, own: &Rules, all: &Rules) -> Self {
        let none = Rules::default();
        let all = if config.flags & POD_OWN_RULES_ONLY == 0 { all } else { &none };
        let inbound = |r: &Rules| r.ports.keys().filter(|s| s.direction == DIRECTION_INBOUND).map(|s| s.port).collect();
        let mut ports: Vec<u16> = inbound(all);
        ports.extend::<Vec<u16>>(inbound(own));
        let decide = |port| {
            let action = own.inbound_action(config.pod_id, port).or_else(|| all.inbound_action(ALL_PODS, port));
            (port, action == Some(PORT_STRICT))
        };
        Self { default: config.flags & POD_STRICT != 0, ports: ports.into_iter().map(decide).collect() }
    }

    /// Is plaintext to `port` refused?
    pub fn refuses(&self, port: u16) -> bool {
        self.ports.get(&port).copied().unwrap_or(self.default)
    }

    /// Is plaintext refused on any port?
    pub fn refuses_any(&self) -> bool {
        self.default || self.ports.values().any(|refused| *refused)
    }

    /// Does this refuse on any port what `before` let in?
    pub fn tightens(&self, before: &Self) -> bool {
        (self.default && !before.default)
            || self.ports.keys().chain(before.ports.keys()).any(|p| self.refuses(*p) && !before.refuses(*p))
    }
}
