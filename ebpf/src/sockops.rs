//! Tells the agent where a captured connection wanted to go: `connect()` knows the socket, `accept()` knows the 4-tuple,
//! and the moment before the SYN is sent knows both.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_EXIST, BPF_NOEXIST, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
        BPF_TCP_CLOSE, BPF_TCP_FIN_WAIT2, bpf_sock, bpf_sock_ops,
    },
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie},
    macros::sock_ops,
    programs::SockOpsContext,
};
use underpass_abi::{Counter, FlowKey, OriginalDestination, SOCKET_CAPTURED};

use crate::{
    events::{Ends, count, refuse},
    maps::{FLOWS, PODS},
    pending,
    socket::{self, AF_INET, AF_INET6},
};

/// "The reply stands", which is then whatever other programs on the cgroup made of it; 0 would discard theirs.
const KEEP_REPLY: u32 = 1;

/// Re-keys captured connections.
#[sock_ops]
pub fn up_sockops(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => record(&ctx),
        BPF_SOCK_OPS_STATE_CB => abandon(&ctx),
        _ => {}
    }
    KEEP_REPLY
}

/// The source address and port are final here: routing and port selection come before the kernel builds the SYN.
#[inline(always)]
fn record(ctx: &SockOpsContext) {
    let Some(sk) = sock(ctx.ops) else { return };
    // SAFETY: the context's socket.
    let Some(state) = (unsafe { socket::state(sk) }) else { return };
    if state.flags & SOCKET_CAPTURED == 0 {
        return;
    }
    let Some(key) = flow_key(ctx) else { return };
    // A pod that has just left the mesh has no listeners any more, and nobody takes entries of it.
    // SAFETY: the value stays readable while the program runs (RCU).
    let Some(pod) = (unsafe { PODS.get(key.netns) }) else { return };
    let pod_id = pod.pod_id;
    // SAFETY: the context is a sock_ops with a full socket.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let original = OriginalDestination { cookie, addr: state.addr, port: state.port, _pad: 0, pod_id };
    if let Err(reason) = insert(&key, &original) {
        // The agent finds nothing when it accepts, and resets the connection.
        let ends = Ends { src: key.client, dst: original.addr, src_port: key.client_port, dst_port: original.port };
        refuse(ctx, reason, pod_id, &ends);
        return;
    }
    // Without this the entry could outlive its connection; it is then overwritten by the next one with the same ports.
    let _ = ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
}

/// Makes an entry within the pod's share.
#[inline(always)]
fn insert(key: &FlowKey, original: &OriginalDestination) -> Result<(), Counter> {
    if !pending::reserve(original.pod_id) {
        return Err(Counter::RefusedFlowsShare);
    }
    if FLOWS.insert(key, original, u64::from(BPF_NOEXIST)).is_ok() {
        return Ok(());
    }
    pending::release(original.pod_id);
    // The map is full, or an ended connection with the same ports still waits to be accepted: its entry is counted already.
    FLOWS.insert(key, original, u64::from(BPF_EXIST)).map_err(|_| Counter::RefusedFlowsFull)
}

/// Removes the entry of a connection that ended before the agent accepted it.
///
/// Not when it ends in FIN-WAIT-2: the application has written, closed, and the agent's end has acknowledged it all, so the
/// connection waits in the agent's accept queue with data that must still be delivered.
#[inline(always)]
fn abandon(ctx: &SockOpsContext) {
    if ctx.arg(1) != BPF_TCP_CLOSE || ctx.arg(0) == BPF_TCP_FIN_WAIT2 {
        return;
    }
    let Some(sk) = sock(ctx.ops) else { return };
    // SAFETY: the context's socket.
    if !unsafe { socket::state(sk) }.is_some_and(|state| state.flags & SOCKET_CAPTURED != 0) {
        return;
    }
    let Some(key) = flow_key(ctx) else { return };
    // SAFETY: the context is a sock_ops with a full socket; the value stays readable while the program runs (RCU).
    let (cookie, flow) = unsafe { (bpf_get_socket_cookie(ctx.as_ptr()), FLOWS.get(key)) };
    let Some(pod_id) = flow.filter(|flow| flow.cookie == cookie).map(|flow| flow.pod_id) else { return };
    if FLOWS.remove(key).is_ok() {
        pending::release(pod_id);
        count(Counter::FlowsAbandoned);
    }
}

#[inline(always)]
fn sock(ops: *mut bpf_sock_ops) -> Option<*mut bpf_sock> {
    // SAFETY: a field of the context.
    let sk = unsafe { (&raw const (*ops).__bindgen_anon_2.sk).read_volatile() };
    (!sk.is_null()).then_some(sk)
}

/// The connection as `accept` shows it, if it really goes to the agent.
#[inline(always)]
fn flow_key(ctx: &SockOpsContext) -> Option<FlowKey> {
    let ops = ctx.ops;
    // SAFETY: fields of the context, read one word at a time: the kernel refuses wider loads of this context.
    let (family, remote4, local4, remote6, remote_port, local_port) = unsafe {
        (
            (&raw const (*ops).family).read_volatile(),
            (&raw const (*ops).remote_ip4).read_volatile(),
            (&raw const (*ops).local_ip4).read_volatile(),
            socket::address([
                (&raw const (*ops).remote_ip6[0]).read_volatile(),
                (&raw const (*ops).remote_ip6[1]).read_volatile(),
                (&raw const (*ops).remote_ip6[2]).read_volatile(),
                (&raw const (*ops).remote_ip6[3]).read_volatile(),
            ]),
            (&raw const (*ops).remote_port).read_volatile(),
            (&raw const (*ops).local_port).read_volatile(),
        )
    };
    let listener_port = u32::from_be(remote_port) as u16;
    if !socket::is_outbound_port(listener_port) {
        return None;
    }
    let (client, listener) = if family == AF_INET || (family == AF_INET6 && socket::is_v4_mapped(&remote6)) {
        // IPv6 sockets connected to IPv4 have both forms of the remote address, but not always of the local one.
        (socket::mapped(local4), socket::mapped(remote4))
    } else if family == AF_INET6 {
        // SAFETY: as above.
        let local6 = unsafe {
            socket::address([
                (&raw const (*ops).local_ip6[0]).read_volatile(),
                (&raw const (*ops).local_ip6[1]).read_volatile(),
                (&raw const (*ops).local_ip6[2]).read_volatile(),
                (&raw const (*ops).local_ip6[3]).read_volatile(),
            ])
        };
        (local6, remote6)
    } else {
        return None;
    };
    if !socket::is_loopback(&listener) {
        return None;
    }
    // SAFETY: the context is a sock_ops.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    Some(FlowKey { netns, client, listener, client_port: local_port as u16, listener_port, _pad: 0 })
}
