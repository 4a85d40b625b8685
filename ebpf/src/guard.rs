//! tc egress: whatever a pod opens to the mesh without the agent is dropped.
//!
//! The connect hooks do not see nested namespaces, processes outside the pod's cgroup, MPTCP
//! subflows or raw sockets; this sees the packets of all of them, on every interface of the pod but
//! loopback.
//!
//! The guard has two places. Inside the pod it runs at egress of the pod's interfaces, where root
//! in the pod can go around it: by a packet socket that bypasses the queueing discipline, by
//! another program before it, or by moving the interface. On the node's side of the same interface
//! ([`up_node_guard`]) the pod has no rights, and every frame passes.

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::generated::bpf_sk_fullsock,
    macros::classifier,
    programs::TcContext,
};
use underpass_abi::{Counter, TUNNEL_PORT};

use crate::{
    decide,
    events::{Ends, refuse},
    maps::{NODE_INTERFACES, POD_ID, PODS_BY_ID},
    parse::{self, Kind, Link},
    socket,
};

/// Not our business: the next program on the interface decides.
const PASS: i32 = TC_ACT_UNSPEC;

/// Ethernet interfaces.
#[classifier]
pub fn up_guard(ctx: TcContext) -> i32 {
    judge(&ctx, Link::Ethernet, POD_ID.load(), Side::Pod)
}

/// Interfaces without a link-layer header.
#[classifier]
pub fn up_guard_l3(ctx: TcContext) -> i32 {
    judge(&ctx, Link::None, POD_ID.load(), Side::Pod)
}

/// The node's side of a veth or netkit pair, both of which carry Ethernet frames. An interface that
/// is not in the map is guarded without any exclusion.
#[classifier]
pub fn up_node_guard(ctx: TcContext) -> i32 {
    // SAFETY: a field of the context, which the kernel keeps alive while the program runs.
    let interface = unsafe { (&raw const (*ctx.skb.skb).ifindex).read_volatile() };
    // SAFETY: the value stays readable while the program runs (RCU).
    let pod_id = unsafe { NODE_INTERFACES.get(interface) }.copied().unwrap_or_default();
    judge(&ctx, Link::Ethernet, pod_id, Side::Node)
}

/// Where the guard stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    /// In the pod. Whatever leaves has the socket of who sent it.
    Pod,
    /// Outside. A tunnel passes also where the kernel has lost the socket on the way: who listens
    /// on the tunnel's port of a mesh address is an agent, and takes no plaintext.
    Node,
}

#[inline(always)]
fn judge(ctx: &TcContext, link: Link, pod_id: u32, side: Side) -> i32 {
    let Some(packet) = parse::parse(ctx, link) else {
        if !parse::is_hidden_by_tags(ctx, link) {
            return PASS;
        }
        refuse(ctx, Counter::GuardUnparsable, pod_id, &Ends::default());
        return TC_ACT_SHOT;
    };
    let payload = packet.payload;
    let (reason, port) = match payload.kind {
        Kind::Tcp if payload.is_syn() => (Counter::GuardDropped, Some(payload.dst_port)),
        Kind::TcpPiece => (Counter::FragmentDropped, None),
        Kind::Unparsable => (Counter::GuardUnparsable, None),
        Kind::Tcp | Kind::TcpRest | Kind::Udp | Kind::Other => return PASS,
    };
    if side == Side::Node && port == Some(TUNNEL_PORT) {
        return PASS;
    }
    // SAFETY: the value stays readable while the program runs (RCU).
    let pod = unsafe { PODS_BY_ID.get(pod_id) };
    if !decide::is_captured(pod, &packet.dst, port) || is_agents(ctx) {
        return PASS;
    }
    refuse(ctx, reason, pod_id, &packet.ends());
    TC_ACT_SHOT
}

/// Did the agent send this? A mark would not prove it: any pod with CAP_NET_RAW can set one.
#[inline(always)]
fn is_agents(ctx: &TcContext) -> bool {
    // SAFETY: the context's socket, checked for null before and after it is known to be a full one.
    unsafe {
        let sk = (&raw const (*ctx.skb.skb).__bindgen_anon_2.sk).read_volatile();
        if sk.is_null() {
            return false;
        }
        let sk = bpf_sk_fullsock(sk);
        !sk.is_null() && socket::is_agents(sk)
    }
}
