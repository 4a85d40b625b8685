//! Kubelet probes: the one plaintext that mode and policies do not stop.
//!
//! The kubelet has no identity, and an address would be no proof of one: pods on the node's network have the same. But its packets
//! still carry the socket that sent them when they arrive in a pod of the same node, and the socket knows the cgroup that
//! its process was in when it was made, which nobody outside of that cgroup can choose.

use aya_ebpf::{
    helpers::generated::{bpf_skb_ancestor_cgroup_id, bpf_skb_cgroup_id},
    programs::TcContext,
};
use underpass_abi::{DIRECTION_PROBE, PROBE_CGROUP_LEVELS, PortKey};

use crate::{
    maps::{NODE_ADDRESSES, PORT_RULES, PROBE_CGROUPS},
    parse::Packet,
};

/// Is this TCP packet a probe's?
#[inline(always)]
pub fn is_probe(ctx: &TcContext, packet: &Packet, pod_id: u32) -> bool {
    is_prober_socket(ctx) || is_declared(packet, pod_id)
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

/// Does it come from one of the node's addresses, for a port that the pod declares for probes?
#[inline(always)]
fn is_declared(packet: &Packet, pod_id: u32) -> bool {
    let key = PortKey { pod_id, port: packet.payload.dst_port, direction: DIRECTION_PROBE };
    // SAFETY: the references are not kept.
    unsafe { PORT_RULES.get(key).is_some() && NODE_ADDRESSES.get(packet.src).is_some() }
}
