//! `getpeername` and `getsockname`: a captured connection looks to its application as if it had not been rewritten.

use aya_ebpf::{
    EbpfContext as _, bindings::bpf_sock_addr, helpers::generated::bpf_get_netns_cookie, macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use underpass_abi::{Address, SOCKET_CAPTURED, SocketState};

use crate::{maps::PODS, socket};

/// The only value the kernel accepts from these hooks.
const OK: i32 = 1;

/// Peer of an IPv4 socket.
#[cgroup_sock_addr(getpeername4)]
pub fn up_peername4(ctx: SockAddrContext) -> i32 {
    if let Some(state) = captured(&ctx) {
        write4(ctx.sock_addr, &state.addr);
        write_port(ctx.sock_addr, state.port);
    }
    OK
}

/// Peer of an IPv6 socket.
#[cgroup_sock_addr(getpeername6)]
pub fn up_peername6(ctx: SockAddrContext) -> i32 {
    if let Some(state) = captured(&ctx) {
        write6(ctx.sock_addr, &state.addr);
        write_port(ctx.sock_addr, state.port);
    }
    OK
}

/// Own address of an IPv4 socket.
#[cgroup_sock_addr(getsockname4)]
pub fn up_sockname4(ctx: SockAddrContext) -> i32 {
    // SAFETY: a field of the context.
    let local = socket::mapped(unsafe { (&raw const (*ctx.sock_addr).user_ip4).read_volatile() });
    if let Some(addr) = pod_address(&ctx, &local) {
        write4(ctx.sock_addr, addr);
    }
    OK
}

/// Own address of an IPv6 socket.
#[cgroup_sock_addr(getsockname6)]
pub fn up_sockname6(ctx: SockAddrContext) -> i32 {
    let local = read6(ctx.sock_addr);
    if let Some(addr) = pod_address(&ctx, &local) {
        write6(ctx.sock_addr, addr);
    }
    OK
}

/// The state of a socket that is captured now, not only by an earlier connect.
#[inline(always)]
fn captured<'a>(ctx: &SockAddrContext) -> Option<&'a SocketState> {
    // SAFETY: the context's socket, never null in these hooks.
    let (state, peer_port) = unsafe {
        let sk = (&raw const (*ctx.sock_addr).__bindgen_anon_1.sk).read_volatile();
        (socket::state(sk)?, u16::from_be((&raw const (*sk).dst_port).read_volatile()))
    };
    (state.flags & SOCKET_CAPTURED != 0 && socket::is_outbound_port(peer_port)).then_some(state)
}

/// What to answer instead of `local`: the pod's address of the family that the application dialled.
#[inline(always)]
fn pod_address<'a>(ctx: &SockAddrContext, local: &Address) -> Option<&'a Address> {
    if !socket::is_loopback(local) {
        return None;
    }
    let state = captured(ctx)?;
    // SAFETY: the context is a sock_addr; the value stays readable while the program runs (RCU).
    let pod = unsafe { PODS.get(bpf_get_netns_cookie(ctx.as_ptr())) }?;
    let addr = if socket::is_v4_mapped(&state.addr) { &pod.addr4 } else { &pod.addr6 };
    (!socket::is_unspecified(addr)).then_some(addr)
}

#[inline(always)]
fn read6(addr: *const bpf_sock_addr) -> Address {
    // SAFETY: `addr` is the program's context.
    unsafe {
        socket::address([
            (&raw const (*addr).user_ip6[0]).read_volatile(),
            (&raw const (*addr).user_ip6[1]).read_volatile(),
            (&raw const (*addr).user_ip6[2]).read_volatile(),
            (&raw const (*addr).user_ip6[3]).read_volatile(),
        ])
    }
}

#[inline(always)]
fn write4(addr: *mut bpf_sock_addr, answer: &Address) {
    let [_, _, _, v4] = socket::words(answer);
    // SAFETY: `addr` is the program's context.
    unsafe { (&raw mut (*addr).user_ip4).write_volatile(v4) };
}

#[inline(always)]
fn write6(addr: *mut bpf_sock_addr, answer: &Address) {
    let [a, b, c, d] = socket::words(answer);
    // SAFETY: `addr` is the program's context.
    unsafe {
        (&raw mut (*addr).user_ip6[0]).write_volatile(a);
        (&raw mut (*addr).user_ip6[1]).write_volatile(b);
        (&raw mut (*addr).user_ip6[2]).write_volatile(c);
        (&raw mut (*addr).user_ip6[3]).write_volatile(d);
    }
}

#[inline(always)]
fn write_port(addr: *mut bpf_sock_addr, port: u16) {
    // SAFETY: `addr` is the program's context.
    unsafe { (&raw mut (*addr).user_port).write_volatile(u32::from(port.to_be())) };
}
