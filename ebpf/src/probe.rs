//! Kubelet probes: the one plaintext that mode and policies do not stop.
//!
//! The kubelet has no identity, and an address would be no proof of one: pods on the node's network
//! have the same. But its sockets know the cgroup that its process was in when they were made,
//! which nobody outside of that cgroup can choose. Where a packet still carries its socket when it
//! arrives in a pod of the same node, the socket tells. Where the network takes the socket off,
//! [`up_probe`] has recorded the SYN as it left: addresses, ports, and the sequence number, which
//! nobody else knows. Both count only for ports that the pod declares for probes and lifecycle
//! hooks.

use aya_ebpf::{
    bindings::BPF_ANY,
    helpers::{
        bpf_ktime_get_ns,
        generated::{bpf_skb_ancestor_cgroup_id, bpf_skb_cgroup_id},
    },
    macros::cgroup_skb,
    programs::{SkBuffContext, TcContext},
};
use underpass_abi::{DIRECTION_PROBE, PROBE_CGROUP_LEVELS, PROBE_LIFE, PortKey, ProbeKey, ProbeSyn};

use crate::{
    maps::{NODE_ADDRESSES, PORT_RULES, PROBE_CGROUPS, PROBES},
    parse::{self, Kind, Link, Packet},
};

/// The packet goes on.
const ALLOW: i32 = 1;

/// On each probe cgroup: records the SYNs that its sockets send. The kernel has done its own
/// address translation by then.
#[cgroup_skb(egress)]
pub fn up_probe(ctx: SkBuffContext) -> i32 {
    // The same kernel context, and the same helper reads it.
    let ctx = TcContext::new(ctx.skb.skb);
    if let Some(packet) = parse::parse(&ctx, Link::None)
        && packet.payload.kind == Kind::Tcp
        && packet.payload.is_syn()
        && let Some(sequence) = sequence(&ctx, &packet)
    {
        // SAFETY: no arguments.
        let syn = ProbeSyn { sent_at: unsafe { bpf_ktime_get_ns() }, sequence, _pad: 0 };
        // Without an entry the probe is refused, and the kubelet tries again.
        let _ = PROBES.insert(key(&packet), syn, u64::from(BPF_ANY));
    }
    ALLOW
}

/// Is this TCP packet a probe's?
#[inline(always)]
pub fn is_probe(ctx: &TcContext, packet: &Packet, pod_id: u32) -> bool {
    is_declared(packet.payload.dst_port, pod_id)
        && (is_prober_socket(ctx) || is_recorded(ctx, packet) || is_from_node(packet))
}

/// Does the pod declare the port for probes or lifecycle hooks?
#[inline(always)]
fn is_declared(port: u16, pod_id: u32) -> bool {
    // SAFETY: the reference is not kept.
    unsafe { PORT_RULES.get(PortKey { pod_id, port, direction: DIRECTION_PROBE }) }.is_some()
}

/// Was it sent by a socket of a probe cgroup, or of a cgroup below one?
#[inline(always)]
fn is_prober_socket(ctx: &TcContext) -> bool {
    let skb = ctx.skb.skb.cast();
    // SAFETY: the context is the program's own; the answer is 0 without a socket, as for all that comes from another node.
    if unsafe { bpf_skb_cgroup_id(skb) } == 0 {
        return false;
    }
    for level in 1..=PROBE_CGROUP_LEVELS {
        // SAFETY: as above; 0 below the socket's own cgroup.
        let id = unsafe { bpf_skb_ancestor_cgroup_id(skb, level) };
        if id == 0 {
            return false;
        }
        // SAFETY: the reference is not kept.
        if unsafe { PROBE_CGROUPS.get(id) }.is_some() {
            return true;
        }
    }
    false
}

/// Is it a SYN that [`up_probe`] has just seen, or what follows that SYN directly? The latter opens
/// the connection where the listener answers with a SYN cookie.
#[inline(always)]
fn is_recorded(ctx: &TcContext, packet: &Packet) -> bool {
    // SAFETY: the reference is not kept, and an entry that is replaced meanwhile is one of the same
    // connection or fails the comparison.
    let Some(&syn) = (unsafe { PROBES.get(key(packet)) }) else { return false };
    let Some(sequence) = sequence(ctx, packet) else { return false };
    let expected = if packet.payload.is_syn() { syn.sequence } else { syn.sequence.wrapping_add(1) };
    // SAFETY: no arguments.
    sequence == expected && unsafe { bpf_ktime_get_ns() }.wrapping_sub(syn.sent_at) < PROBE_LIFE
}

/// Does it come from one of the node's addresses, where these are let in?
#[inline(always)]
fn is_from_node(packet: &Packet) -> bool {
    // SAFETY: the reference is not kept.
    unsafe { NODE_ADDRESSES.get(packet.src) }.is_some()
}

#[inline(always)]
fn key(packet: &Packet) -> ProbeKey {
    let payload = &packet.payload;
    ProbeKey { src: packet.src, dst: packet.dst, src_port: payload.src_port, dst_port: payload.dst_port }
}

#[inline(always)]
fn sequence(ctx: &TcContext, packet: &Packet) -> Option<u32> {
    ctx.load::<[u8; 4]>(packet.payload.offset + 4).ok().map(u32::from_be_bytes)
}
