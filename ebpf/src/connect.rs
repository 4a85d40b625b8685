//! `connect()`: sends connections to the mesh to the agent's listener in the pod instead, and remembers where they wanted to go.

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock_addr,
    helpers::{bpf_get_prandom_u32, generated::bpf_get_netns_cookie},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use underpass_abi::{
    Address, Counter, OUTBOUND_PORT, OUTBOUND_PORTS_V6, OUTBOUND_V6_EXTRA, SOCKET_AGENT, SOCKET_CAPTURED, SocketState,
};

use crate::{
    decide,
    events::{Ends, count, refuse},
    log,
    maps::PODS,
    pending,
    socket::{self, MAPPED_WORD},
};

/// What a hook returns: the connect goes on, or fails with EPERM.
const ALLOW: i32 = 1;
const REFUSE: i32 = 0;

const SOCK_STREAM: u32 = 1;
const IPPROTO_TCP: u32 = 6;

enum Decision {
    Leave,
    Capture,
    Refuse,
}

/// IPv4 sockets.
#[cgroup_sock_addr(connect4)]
pub fn up_connect4(ctx: SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    // SAFETY: the context is valid while the program runs; fields are read and written whole, as the verifier demands.
    unsafe {
        let dst = socket::mapped((&raw const (*addr).user_ip4).read_volatile());
        match decide(&ctx, &dst, port(addr)) {
            Decision::Leave => return ALLOW,
            Decision::Refuse => return REFUSE,
            Decision::Capture => {}
        }
        (&raw mut (*addr).user_ip4).write_volatile(spread_loopback());
        (&raw mut (*addr).user_port).write_volatile(u32::from(OUTBOUND_PORT.to_be()));
    }
    ALLOW
}

/// IPv6 sockets. A v4-mapped destination is IPv4 on the wire, so it is rewritten to an IPv4 loopback address.
#[cgroup_sock_addr(connect6)]
pub fn up_connect6(ctx: SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    // SAFETY: the context is valid while the program runs; fields are read and written whole, as the verifier demands.
    unsafe {
        let dst = socket::address([
            (&raw const (*addr).user_ip6[0]).read_volatile(),
            (&raw const (*addr).user_ip6[1]).read_volatile(),
            (&raw const (*addr).user_ip6[2]).read_volatile(),
            (&raw const (*addr).user_ip6[3]).read_volatile(),
        ]);
        match decide(&ctx, &dst, port(addr)) {
            Decision::Leave => return ALLOW,
            Decision::Refuse => return REFUSE,
            Decision::Capture => {}
        }
        let (third, fourth, port) = if socket::is_v4_mapped(&dst) {
            (MAPPED_WORD, spread_loopback(), OUTBOUND_PORT)
        } else {
            (0, 1u32.to_be(), spread_port())
        };
        (&raw mut (*addr).user_ip6[0]).write_volatile(0);
        (&raw mut (*addr).user_ip6[1]).write_volatile(0);
        (&raw mut (*addr).user_ip6[2]).write_volatile(third);
        (&raw mut (*addr).user_ip6[3]).write_volatile(fourth);
        (&raw mut (*addr).user_port).write_volatile(u32::from(port.to_be()));
    }
    ALLOW
}

/// Destination port, host byte order.
///
/// # Safety
/// `addr` is the program's context.
#[inline(always)]
unsafe fn port(addr: *const bpf_sock_addr) -> u16 {
    // SAFETY: the caller's promise.
    u16::from_be(unsafe { (&raw const (*addr).user_port).read_volatile() } as u16)
}

/// Decides, and on capture stores the destination with the socket.
#[inline(always)]
fn decide(ctx: &SockAddrContext, dst: &Address, port: u16) -> Decision {
    let addr = ctx.sock_addr;
    // SAFETY: fields of the context, valid while the program runs; its socket is never null in these hooks.
    let (kind, protocol, sk) = unsafe {
        (
            (&raw const (*addr).type_).read_volatile(),
            (&raw const (*addr).protocol).read_volatile(),
            (&raw const (*addr).__bindgen_anon_1.sk).read_volatile(),
        )
    };
    if kind != SOCK_STREAM || protocol != IPPROTO_TCP {
        return Decision::Leave;
    }
    // SAFETY: the context's own socket.
    let state = unsafe { socket::state(sk) };
    if state.as_ref().is_some_and(|state| state.flags & SOCKET_AGENT != 0) {
        return Decision::Leave;
    }
    // SAFETY: the context is a sock_addr; the reference is not kept past this program run, which RCU covers.
    let pod = unsafe { PODS.get(bpf_get_netns_cookie(ctx.as_ptr())) };
    let captured = !socket::is_loopback(dst)
        && !socket::is_unspecified(dst)
        && pod.is_some_and(|pod| decide::is_captured(Some(pod), dst, Some(port)));
    if !captured {
        // An earlier connect() of this socket was captured, this one is not. Or another copy of this program, attached higher up
        // or about to be replaced, has just rewritten the destination: then the state is what it has stored.
        let rewritten = socket::is_loopback(dst) && socket::is_outbound_port(port);
        if let Some(state) = state
            && !rewritten
        {
            *state = SocketState::default();
        }
        return Decision::Leave;
    }

    let pod_id = pod.map_or(0, |pod| pod.pod_id);
    let ends = Ends { src: [0; 16], dst: *dst, src_port: 0, dst_port: port };
    if !pending::has_room(pod_id) {
        refuse(ctx, Counter::RefusedFlowsShare, pod_id, &ends);
        return Decision::Refuse;
    }
    let destination = SocketState { flags: SOCKET_CAPTURED, port, _pad: 0, addr: *dst };
    let stored = match state {
        Some(state) => {
            *state = destination;
            true
        }
        // SAFETY: the context's own socket.
        None => unsafe { socket::create_state(sk, destination) },
    };
    if !stored {
        refuse(ctx, Counter::RefusedNoStorage, pod_id, &ends);
        return Decision::Refuse;
    }
    count(Counter::Captured);
    log::debug!(ctx, "captured connect to {:i}:{}", *dst, port);
    Decision::Capture
}

/// A random address in 127/8, in memory order. One address would cap a pod's connections at the ephemeral port range.
#[inline(always)]
fn spread_loopback() -> u32 {
    // SAFETY: no arguments, no state of ours.
    let [a, b, c, _] = unsafe { bpf_get_prandom_u32() }.to_ne_bytes();
    // neither 127.0.0.0 nor 127.255.255.255, which are not addresses of a host
    u32::from_ne_bytes([127, a, b, 1 + c % 254])
}

/// A random one of [`OUTBOUND_PORTS_V6`], without a table in memory.
#[inline(always)]
fn spread_port() -> u16 {
    const { assert!(OUTBOUND_PORTS_V6.len() == 8 && OUTBOUND_V6_EXTRA.1 - OUTBOUND_V6_EXTRA.0 == 6) };
    // SAFETY: no arguments, no state of ours.
    match (unsafe { bpf_get_prandom_u32() } & 7) as u16 {
        0 => OUTBOUND_PORT,
        n => OUTBOUND_V6_EXTRA.0 - 1 + n,
    }
}
