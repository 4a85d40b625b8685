//! tc egress: whatever a pod opens to the mesh without the agent is dropped.
//!
//! The connect hooks do not see nested namespaces, processes outside the pod's cgroup, MPTCP subflows or raw sockets; this
//! sees the packets of all of them, on every interface of the pod but loopback.

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::generated::bpf_sk_fullsock,
    macros::classifier,
    programs::TcContext,
};
use underpass_abi::Counter;

use crate::{
    decide,
    events::refuse,
    maps::{POD_ID, PODS_BY_ID},
    parse::{self, Kind, Link},
    socket,
};

/// Not our business: the next program on the interface decides.
const PASS: i32 = TC_ACT_UNSPEC;

/// Ethernet interfaces.
#[classifier]
pub fn up_guard(ctx: TcContext) -> i32 {
    judge(&ctx, Link::Ethernet)
}

/// Interfaces without a link-layer header.
#[classifier]
pub fn up_guard_l3(ctx: TcContext) -> i32 {
    judge(&ctx, Link::None)
}

#[inline(always)]
fn judge(ctx: &TcContext, link: Link) -> i32 {
    let Some(packet) = parse::parse(ctx, link) else { return PASS };
    let payload = packet.payload;
    let (reason, port) = match payload.kind {
        Kind::Tcp if payload.is_syn() => (Counter::GuardDropped, Some(payload.dst_port)),
        Kind::TcpPiece => (Counter::FragmentDropped, None),
        Kind::Unparsable => (Counter::GuardUnparsable, None),
        Kind::Tcp | Kind::TcpRest | Kind::Udp | Kind::Other => return PASS,
    };
    let pod_id = POD_ID.load();
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
