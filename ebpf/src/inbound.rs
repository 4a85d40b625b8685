//! tc ingress, inside the pod's namespace: plaintext enters only as far as the pod's mode and port rules let it.

use aya_ebpf::{
    bindings::{BPF_F_CURRENT_NETNS, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_sock, bpf_sock_tuple},
    helpers::generated::{bpf_sk_assign, bpf_sk_release, bpf_skc_lookup_tcp},
    macros::classifier,
    programs::TcContext,
};
use underpass_abi::{
    Counter, DNS_PORT, PLAINTEXT_PORT, PORT_ASSIGN, PORT_EXCLUDED, PORT_PERMISSIVE, TUNNEL_PORT, is_agent_port,
};

use crate::{
    decide,
    events::{Ends, count, report},
    maps::POD_ID,
    parse::{self, Kind, Link, Packet},
    probe, reset, socket,
};

/// Not our business: the next program on the interface decides.
const PASS: i32 = TC_ACT_UNSPEC;

/// `TCP_LISTEN` of the kernel's socket states.
const LISTEN: u32 = 10;

/// Ethernet interfaces.
#[classifier]
pub fn up_inbound(ctx: TcContext) -> i32 {
    judge(&ctx, Link::Ethernet)
}

/// Interfaces without a link-layer header.
#[classifier]
pub fn up_inbound_l3(ctx: TcContext) -> i32 {
    judge(&ctx, Link::None)
}

#[inline(always)]
fn judge(ctx: &TcContext, link: Link) -> i32 {
    let Some(packet) = parse::parse(ctx, link) else {
        if !parse::is_hidden_by_tags(ctx, link) {
            return PASS;
        }
        report(Counter::InboundUnparsable, POD_ID.load(), &Ends::default());
        return TC_ACT_SHOT;
    };
    let pod_id = POD_ID.load();
    let reason = match packet.payload.kind {
        Kind::Tcp => match tcp(ctx, &packet, pod_id) {
            Ok(()) => return PASS,
            Err(reason) => reason,
        },
        Kind::Udp if packet.payload.dst_port == DNS_PORT => Counter::InboundAgentPort,
        Kind::TcpPiece => Counter::FragmentDropped,
        Kind::Unparsable => Counter::InboundUnparsable,
        Kind::TcpRest | Kind::Udp | Kind::Other => return PASS,
    };
    // A line for aya-log would not fit on the stack beside the answer; the event says the same.
    report(reason, pod_id, &packet.ends());
    if packet.payload.kind == Kind::Tcp { reset::answer(ctx, link, pod_id) } else { TC_ACT_SHOT }
}

#[inline(always)]
fn tcp(ctx: &TcContext, packet: &Packet, pod_id: u32) -> Result<(), Counter> {
    let dst_port = packet.payload.dst_port;
    if dst_port == TUNNEL_PORT {
        return Ok(());
    }
    if is_agent_port(dst_port) {
        return Err(Counter::InboundAgentPort);
    }
    let action = decide::inbound_action(pod_id, dst_port);
    if action == PORT_EXCLUDED || action == PORT_PERMISSIVE {
        return Ok(());
    }
    let syn = packet.payload.is_syn();
    // Part of a connection that was admitted when it began, or that the pod itself opened. A listener does not count:
    // with SYN cookies its ACK would begin a connection that no SYN rule has judged.
    if !syn && Socket::lookup(ctx, packet, dst_port).is_some_and(|socket| socket.is_connected()) {
        return Ok(());
    }
    // Also the ACK that a SYN cookie is in: liveness must not depend on how full a listener's queue is.
    if probe::is_probe(ctx, packet, pod_id) {
        if syn {
            count(Counter::InboundProbe);
        }
        return Ok(());
    }
    if !syn {
        return Err(Counter::InboundNoSocket);
    }
    if action != PORT_ASSIGN {
        return Err(Counter::InboundStrictDropped);
    }
    // The kernel puts fragments together after this program and forgets the socket that was chosen
    // here: the SYN would reach the application.
    if packet.payload.fragmented != 0 {
        return Err(Counter::FragmentDropped);
    }
    let assigned = Socket::lookup(ctx, packet, PLAINTEXT_PORT).is_some_and(|socket| socket.take(ctx));
    if !assigned {
        return Err(Counter::InboundAssignFailed);
    }
    count(Counter::InboundAssigned);
    Ok(())
}

/// A reference to a socket of the pod. Every method gives it back: the verifier insists.
struct Socket(*mut bpf_sock);

impl Socket {
    #[inline(always)]
    fn lookup(ctx: &TcContext, packet: &Packet, dst_port: u16) -> Option<Self> {
        let src_port = packet.payload.src_port;
        let [s0, s1, s2, s3] = socket::words(&packet.src);
        let [d0, d1, d2, d3] = socket::words(&packet.dst);
        // SAFETY: every field of the union is plain data.
        let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
        let size = if packet.is_ipv4() {
            let v4 = unsafe { &mut tuple.__bindgen_anon_1.ipv4 };
            (v4.saddr, v4.daddr, v4.sport, v4.dport) = (s3, d3, src_port.to_be(), dst_port.to_be());
            size_of_val(v4)
        } else {
            let v6 = unsafe { &mut tuple.__bindgen_anon_1.ipv6 };
            (v6.saddr, v6.daddr) = ([s0, s1, s2, s3], [d0, d1, d2, d3]);
            (v6.sport, v6.dport) = (src_port.to_be(), dst_port.to_be());
            size_of_val(v6)
        };
        let namespace = i64::from(BPF_F_CURRENT_NETNS).cast_unsigned();
        // SAFETY: the tuple is read during the call; the result is null or a socket that must be released.
        let sk = unsafe { bpf_skc_lookup_tcp(ctx.skb.skb.cast(), &raw mut tuple, size as u32, namespace, 0) };
        (!sk.is_null()).then_some(Self(sk))
    }

    #[inline(always)]
    fn is_connected(self) -> bool {
        // SAFETY: not null, and released exactly once, after the last use.
        unsafe {
            let state = (&raw const (*self.0).state).read_volatile();
            bpf_sk_release(self.0.cast());
            state != LISTEN
        }
    }

    /// Hands the packet to this socket if it is a listener.
    #[inline(always)]
    fn take(self, ctx: &TcContext) -> bool {
        // SAFETY: not null, and released exactly once, after the last use.
        unsafe {
            let listening = (&raw const (*self.0).state).read_volatile() == LISTEN;
            let taken = listening && bpf_sk_assign(ctx.skb.skb.cast(), self.0.cast(), 0) == 0;
            bpf_sk_release(self.0.cast());
            taken
        }
    }
}
