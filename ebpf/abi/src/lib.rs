//! Plain data shared by the BPF programs and the agent.
//!
//! Every type here is `repr(C)`, has no implicit padding (the verifier and map lookups compare whole
//! keys, so stray bytes would matter) and is the same on both sides of the system call. A change to this
//! file or to the map definitions changes the ABI hash, and with it the directory the agent pins under.
#![no_std]
#![allow(clippy::pub_underscore_fields)] // padding is public because both sides must write zeroes into it

/// Port of the agent's outbound listener inside a pod's namespace; the same number as Istio's.
pub const OUTBOUND_PORT: u16 = 15001;
/// Port of the agent's plaintext inbound listener, used when an L4 policy has to see the connection.
pub const PLAINTEXT_PORT: u16 = 15006;
/// Port of the agent's tunnel listener inside a pod's namespace; the same number as Istio's HBONE.
pub const TUNNEL_PORT: u16 = 15008;
/// Port kept for the agent's DNS listener; never reachable from outside a pod.
pub const DNS_PORT: u16 = 15053;
/// Further IPv6 outbound listeners: IPv6 has one loopback address, so ports are spread instead of addresses.
/// With [`OUTBOUND_PORT`] they allow 8 times the ephemeral port range of connections at once.
pub const OUTBOUND_PORTS_V6: [u16; 8] = [OUTBOUND_PORT, 15101, 15102, 15103, 15104, 15105, 15106, 15107];
/// First and last of the extra IPv6 outbound ports, for range checks in BPF.
pub const OUTBOUND_V6_EXTRA: (u16, u16) = (15101, 15107);
/// Socket mark of connections the agent makes to applications; it selects the reply route, nothing more.
pub const AGENT_MARK: u32 = 0x539;

/// Is `port` one the agent owns inside an enrolled pod?
#[must_use]
pub const fn is_agent_port(port: u16) -> bool {
    matches!(port, OUTBOUND_PORT | PLAINTEXT_PORT | TUNNEL_PORT | DNS_PORT)
        || (port >= OUTBOUND_V6_EXTRA.0 && port <= OUTBOUND_V6_EXTRA.1)
}

/// An IPv6 address, or an IPv4 address as `::ffff:a.b.c.d`, in network byte order.
pub type Address = [u8; 16];

/// First 12 bytes of an IPv4 address written as [`Address`].
pub const V4_MAPPED_PREFIX: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// What the programs need to know of one enrolled pod. Value of `PODS` (by namespace cookie, for cgroup hooks)
/// and of `PODS_BY_ID` (for tc programs, which cannot read the cookie on every supported kernel).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodConfig {
    /// The agent's number for the pod; stable while the pod is enrolled, also across agent restarts. Never 0.
    pub pod_id: u32,
    /// `POD_*` flags.
    pub flags: u32,
    /// What `getsockname` answers on captured IPv4 sockets bound to loopback; all zero when the pod has none.
    pub addr4: Address,
    /// The same for IPv6.
    pub addr6: Address,
}

/// Inbound plaintext is refused unless a port rule says otherwise.
pub const POD_STRICT: u32 = 1 << 0;
/// Every TCP destination is captured, not only mesh addresses.
pub const POD_CAPTURE_ALL: u32 = 1 << 1;
/// Inbound plaintext goes to the agent, as with [`PORT_ASSIGN`], unless a port rule says otherwise. [`POD_STRICT`] goes before.
pub const POD_ASSIGN: u32 = 1 << 2;
/// Refused TCP packets get no answer; otherwise the pod answers them with a reset.
pub const POD_SILENT: u32 = 1 << 3;
/// Some of the pod's port rules did not fit into `PORT_RULES`. Inbound rules for all pods do not hold for this pod: one of them
/// could open a port that a missing rule of the pod's own keeps closed.
pub const POD_OWN_RULES_ONLY: u32 = 1 << 4;

/// Value of the `MESH` trie (key: an [`Address`]; 96 is added to IPv4 prefix lengths).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MeshEntry {
    /// `MESH_*` flags; 0 makes a hole in a shorter prefix.
    pub flags: u32,
}

/// Connections to addresses under this prefix are captured and guarded.
pub const MESH_CAPTURE: u32 = 1 << 0;

/// Key of the `EXCLUDED_CIDRS` trie: pod id in network byte order, then the address.
/// A pod's own entries have prefix length 32 + n (IPv4: 32 + 96 + n).
pub type ExcludeKey = [u8; 20];

/// Key of `PORT_RULES`. Pod id 0 holds rules for every pod; a pod's own rule wins.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortKey {
    /// [`PodConfig::pod_id`], or 0 for all pods.
    pub pod_id: u32,
    /// Destination port, host byte order.
    pub port: u16,
    /// [`DIRECTION_OUTBOUND`] or [`DIRECTION_INBOUND`].
    pub direction: u16,
}

/// A connection the pod makes.
pub const DIRECTION_OUTBOUND: u16 = 0;
/// A connection made to the pod.
pub const DIRECTION_INBOUND: u16 = 1;
/// The port answers the kubelet: an entry, whatever its action, admits the kubelet's plaintext, and
/// that of `NODE_ADDRESSES`.
pub const DIRECTION_PROBE: u16 = 2;

/// Value of `PORT_RULES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortRule {
    /// `PORT_*`.
    pub action: u32,
}

/// The port is none of ours: outbound not captured nor guarded, inbound plaintext passed.
pub const PORT_EXCLUDED: u32 = 1;
/// Inbound plaintext passes.
pub const PORT_PERMISSIVE: u32 = 2;
/// Inbound plaintext is dropped.
pub const PORT_STRICT: u32 = 3;
/// Inbound plaintext is handed to the agent's listener on [`PLAINTEXT_PORT`].
pub const PORT_ASSIGN: u32 = 4;

/// Action of entries with [`DIRECTION_PROBE`]; being there is what counts.
pub const PORT_PROBE: u32 = 5;

/// Deepest level of the cgroup v2 hierarchy, the root being 0, at which a probe cgroup is recognised. Levels count from the
/// root of the hierarchy, also for an agent in a cgroup namespace: a node that is a container (kind) is three or four deep itself.
pub const PROBE_CGROUP_LEVELS: i32 = 16;

/// Key of `PROBES`: a connection that a probe cgroup opens, as its SYN leaves the node's network
/// namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ProbeKey {
    /// Source address.
    pub src: Address,
    /// Destination address.
    pub dst: Address,
    /// Source port, host byte order.
    pub src_port: u16,
    /// Destination port, host byte order.
    pub dst_port: u16,
}

/// Value of `PROBES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProbeSyn {
    /// When the SYN left, in nanoseconds of the monotonic clock.
    pub sent_at: u64,
    /// The SYN's sequence number, host byte order. The kernel chooses this number at random (RFC
    /// 6528), so a packet with the same addresses and ports from another sender does not match.
    pub sequence: u32,
    /// Zero.
    pub _pad: u32,
}

/// How long an entry of `PROBES` admits its connection, in nanoseconds. The SYN needs microseconds
/// from one end of the node to the other, and a repeated SYN renews the entry.
pub const PROBE_LIFE: u64 = 5_000_000_000;

/// Per-socket state in `SOCKETS` (socket storage): it lives and dies with the socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketState {
    /// `SOCKET_*` flags.
    pub flags: u32,
    /// Original destination port, host byte order.
    pub port: u16,
    /// Zero.
    pub _pad: u16,
    /// Original destination address.
    pub addr: Address,
}

/// The socket is the agent's own. Set only through the descriptor, so no pod can claim it.
pub const SOCKET_AGENT: u32 = 1 << 0;
/// The socket's destination was rewritten; `addr` and `port` hold the original.
pub const SOCKET_CAPTURED: u32 = 1 << 1;

/// Key of `FLOWS`: a captured connection as the agent's `accept` sees it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Cookie of the pod's network namespace.
    pub netns: u64,
    /// The application's end.
    pub client: Address,
    /// The rewritten destination: the agent's listener.
    pub listener: Address,
    /// The application's port, host byte order.
    pub client_port: u16,
    /// The listener's port, host byte order.
    pub listener_port: u16,
    /// Zero.
    pub _pad: u32,
}

/// Value of `FLOWS`: where the application wanted to go.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OriginalDestination {
    /// Cookie of the application's socket.
    pub cookie: u64,
    /// Destination as dialled.
    pub addr: Address,
    /// Destination port, host byte order.
    pub port: u16,
    /// Zero.
    pub _pad: u16,
    /// The pod whose share of `FLOWS` the entry counts against: [`PodConfig::pod_id`].
    pub pod_id: u32,
}

/// Value of the array `PENDING_FLOWS`: how many entries of `FLOWS` are one pod's (index: the pod's number), or everybody's
/// (index [`ALL_FLOWS`]). Each side of the kernel's boundary adds to a word of its own, atomically, so neither undoes what
/// the other has just written. The number of entries is `added - taken`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PendingFlows {
    /// Written by the programs: one up for an entry that is made, one down for an entry that is removed.
    pub added: u64,
    /// Written by the agent, through the map's memory: one up for an entry that it removes.
    pub taken: u64,
}

impl PendingFlows {
    /// The number of entries. A count below zero, which only lost additions can make, is none.
    #[must_use]
    pub const fn count(&self) -> u64 {
        let difference = self.added.wrapping_sub(self.taken);
        if difference.cast_signed() < 0 { 0 } else { difference }
    }
}

/// Index in `PENDING_FLOWS` of the count of all entries; no pod has this number.
pub const ALL_FLOWS: u32 = 0;

/// How many entries of `FLOWS` one pod may hold while there are `all` entries: a sixteenth of what is free, so at most
/// 15,420, and less the fuller the map is. However many pods hold all they can, the next one has some room: what is left
/// shrinks by a seventeenth with each of them. The backlog of a listener (4,096) is reached long before.
#[must_use]
pub const fn flow_share(all: u64) -> u64 {
    (capacity::FLOWS as u64).saturating_sub(all) / 16
}

/// Something a program refused or could not do, sent through the `EVENTS` ring buffer. The ring may drop
/// events under load; `COUNTERS` never do.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// One of the [`Counter`] numbers: what happened.
    pub kind: u32,
    /// The pod concerned, 0 when unknown.
    pub pod_id: u32,
    /// Source address.
    pub src: Address,
    /// Destination address.
    pub dst: Address,
    /// Source port, host byte order.
    pub src_port: u16,
    /// Destination port, host byte order.
    pub dst_port: u16,
    /// Zero.
    pub _pad: u32,
}

/// Indices of `COUNTERS`, a per-CPU array of `u64`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// `connect()` rewritten to the agent.
    Captured = 0,
    /// `connect()` refused because per-socket state could not be stored.
    RefusedNoStorage = 1,
    /// A captured flow could not be recorded (`FLOWS` full); the agent resets it.
    RefusedFlowsFull = 2,
    /// Egress guard: SYN to a mesh address from a socket that is not the agent's.
    GuardDropped = 3,
    /// Egress guard: packet to a mesh address that could not be parsed far enough to be judged.
    GuardUnparsable = 4,
    /// Inbound: plaintext SYN refused under STRICT.
    InboundStrictDropped = 5,
    /// Inbound: packet for one of the agent's private ports from outside.
    InboundAgentPort = 6,
    /// Inbound: non-SYN without a connected socket, under STRICT.
    InboundNoSocket = 7,
    /// Fragment of a TCP packet that cannot be judged: a first one without a whole TCP header, a
    /// later one that reaches into the header, or a SYN that the agent would have to be given
    /// whole.
    FragmentDropped = 8,
    /// Inbound: SYN handed to the plaintext listener.
    InboundAssigned = 9,
    /// Inbound: SYN should have been handed over but no listener was there; refused.
    InboundAssignFailed = 10,
    /// Abandoned flows removed before the agent accepted them.
    FlowsAbandoned = 11,
    /// Inbound: packet that could hide TCP and could not be parsed far enough to be judged.
    InboundUnparsable = 12,
    /// Inbound: SYN that mode or policies would not have let in, of a kubelet probe; passed.
    InboundProbe = 13,
    /// `connect()` refused because the pod has its share of `FLOWS` ([`flow_share`]).
    RefusedFlowsShare = 14,
}

/// Number of [`Counter`]s.
pub const COUNTERS: u32 = 15;

impl Counter {
    /// All counters with their metric names, in index order.
    pub const ALL: [(Counter, &'static str); COUNTERS as usize] = [
        (Counter::Captured, "captured"),
        (Counter::RefusedNoStorage, "refused_no_storage"),
        (Counter::RefusedFlowsFull, "refused_flows_full"),
        (Counter::GuardDropped, "guard_dropped"),
        (Counter::GuardUnparsable, "guard_unparsable"),
        (Counter::InboundStrictDropped, "inbound_strict_dropped"),
        (Counter::InboundAgentPort, "inbound_agent_port"),
        (Counter::InboundNoSocket, "inbound_no_socket"),
        (Counter::FragmentDropped, "fragment_dropped"),
        (Counter::InboundAssigned, "inbound_assigned"),
        (Counter::InboundAssignFailed, "inbound_assign_failed"),
        (Counter::FlowsAbandoned, "flows_abandoned"),
        (Counter::InboundUnparsable, "inbound_unparsable"),
        (Counter::InboundProbe, "inbound_probe"),
        (Counter::RefusedFlowsShare, "refused_flows_share"),
    ];
}

/// Sizes of the maps, in entries unless said otherwise. Hash maps are not preallocated.
pub mod capacity {
    /// `PODS`, `PODS_BY_ID`: enrolled pods on a node.
    pub const PODS: usize = 4096;
    /// `NODE_INTERFACES`: interfaces of the node that lead to enrolled pods, four for each pod.
    pub const NODE_INTERFACES: usize = 4 * PODS;
    /// `MESH`: mesh addresses, VIPs and captured CIDRs. The most that the agent may be told to use: the trie takes memory for
    /// each entry, none for its size.
    pub const MESH: usize = 1_048_576;
    /// `EXCLUDED_CIDRS`.
    pub const EXCLUDED_CIDRS: usize = RULES;
    /// `PORT_RULES`.
    pub const PORT_RULES: usize = RULES;
    /// `EXCLUDED_CIDRS` and `PORT_RULES` each: what every pod is sure to have, what all pods share, and what holds for all pods.
    const RULES: usize = PODS * RULES_PER_POD_SURE + RULES_IN_COMMON + RULES_FOR_ALL_PODS;
    /// Of `EXCLUDED_CIDRS` and of `PORT_RULES`: entries that every pod can have, whatever other pods have.
    pub const RULES_PER_POD_SURE: usize = 16;
    /// Most entries of one pod in each of them, while there are no more than [`RULES_IN_COMMON`] of all pods.
    pub const RULES_PER_POD_MOST: usize = 512;
    /// Entries in each of them for pods that need more than they are sure to have.
    pub const RULES_IN_COMMON: usize = 61_440;
    /// Most entries in each of them under pod id 0.
    pub const RULES_FOR_ALL_PODS: usize = 4096;
    /// `PROBE_CGROUPS`: a node has one kubelet, which may have one cgroup or a few.
    pub const PROBE_CGROUPS: usize = 16;
    /// `NODE_ADDRESSES`.
    pub const NODE_ADDRESSES: usize = 64;
    /// `PROBES`: SYNs of the last moments; the oldest yields to the newest.
    pub const PROBES: usize = 4096;
    /// `FLOWS`: connections between `connect` and the agent's `accept`.
    pub const FLOWS: usize = 262_144;
    /// `PENDING_FLOWS`: a number for every pod, and one for all.
    pub const PENDING_FLOWS: usize = PODS + 1;
    /// `EVENTS`, in bytes; a power of two and a multiple of the page size.
    pub const EVENTS_BYTES: usize = 256 * 1024;
}

/// Names of the programs in the object, as user space finds them.
pub mod programs {
    /// Outbound capture, IPv4 sockets.
    pub const CONNECT4: &str = "up_connect4";
    /// Outbound capture, IPv6 sockets, v4-mapped destinations included.
    pub const CONNECT6: &str = "up_connect6";
    /// Original destination for `getpeername`, IPv4.
    pub const GETPEERNAME4: &str = "up_peername4";
    /// Original destination for `getpeername`, IPv6.
    pub const GETPEERNAME6: &str = "up_peername6";
    /// Pod address for `getsockname`, IPv4.
    pub const GETSOCKNAME4: &str = "up_sockname4";
    /// Pod address for `getsockname`, IPv6.
    pub const GETSOCKNAME6: &str = "up_sockname6";
    /// Re-keys captured connections by 4-tuple.
    pub const SOCKOPS: &str = "up_sockops";
    /// Records the connections that a probe cgroup opens.
    pub const PROBE: &str = "up_probe";
    /// tc egress guard for Ethernet interfaces.
    pub const GUARD: &str = "up_guard";
    /// tc egress guard for interfaces without a link-layer header.
    pub const GUARD_L3: &str = "up_guard_l3";
    /// The guard on the node's side of pods' interfaces: one program for all of them.
    pub const NODE_GUARD: &str = "up_node_guard";
    /// tc ingress program for Ethernet interfaces.
    pub const INBOUND: &str = "up_inbound";
    /// tc ingress program for interfaces without a link-layer header.
    pub const INBOUND_L3: &str = "up_inbound_l3";
}

/// Name of the read-only global that tells a tc program whose pod it guards; the loader sets it per pod.
pub const POD_ID_GLOBAL: &str = "POD_ID";

#[cfg(feature = "user")]
mod pod {
    //! Invariant of every impl below: `repr(C)`, no padding, valid for any bit pattern.
    #![allow(clippy::undocumented_unsafe_blocks)] // stated once above for all of them
    unsafe impl aya::Pod for super::PodConfig {}
    unsafe impl aya::Pod for super::MeshEntry {}
    unsafe impl aya::Pod for super::PortKey {}
    unsafe impl aya::Pod for super::PortRule {}
    unsafe impl aya::Pod for super::ProbeKey {}
    unsafe impl aya::Pod for super::ProbeSyn {}
    unsafe impl aya::Pod for super::SocketState {}
    unsafe impl aya::Pod for super::FlowKey {}
    unsafe impl aya::Pod for super::OriginalDestination {}
    unsafe impl aya::Pod for super::PendingFlows {}
}
