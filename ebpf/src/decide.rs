//! Which destinations of a pod are the agent's business: one answer for capture and for its guard.

use aya_ebpf::btf_maps::lpm_trie::Key;
use underpass_abi::{
    Address, DIRECTION_INBOUND, DIRECTION_OUTBOUND, MESH_CAPTURE, POD_ASSIGN, POD_CAPTURE_ALL, POD_OWN_RULES_ONLY,
    POD_STRICT, PORT_ASSIGN, PORT_EXCLUDED, PORT_PERMISSIVE, PORT_STRICT, PodConfig, PortKey,
};

use crate::maps::{EXCLUDED_CIDRS, MESH, PODS_BY_ID, PORT_RULES};

/// Must a connection of this pod to `dst` go through the agent? Without a `pod` nothing is excluded, and without a
/// `port` (it is in another fragment) exclusions by port cannot apply.
#[inline(always)]
pub fn is_captured(pod: Option<&PodConfig>, dst: &Address, port: Option<u16>) -> bool {
    let everything = pod.is_some_and(|pod| pod.flags & POD_CAPTURE_ALL != 0);
    if !everything && !MESH.get(&Key::new(128, *dst)).is_some_and(|entry| entry.flags & MESH_CAPTURE != 0) {
        return false;
    }
    let Some(pod) = pod else { return true };
    if let Some(port) = port
        && port_action(pod.pod_id, port, DIRECTION_OUTBOUND) == Some(PORT_EXCLUDED)
    {
        return false;
    }
    !is_excluded(pod.pod_id, dst) && !is_excluded(ALL_PODS, dst)
}

/// What to do with plaintext arriving for `port`, a `PORT_*`: the port's rule, else the pod's mode, else the safe choice.
#[inline(always)]
pub fn inbound_action(pod_id: u32, port: u16) -> u32 {
    if let Some(action) = rule(pod_id, port, DIRECTION_INBOUND) {
        return action;
    }
    // SAFETY: the reference is not kept, and a removed value stays readable until the program ends (RCU).
    let flags = unsafe { PODS_BY_ID.get(pod_id) }.map_or(POD_STRICT, |pod| pod.flags);
    if flags & POD_OWN_RULES_ONLY == 0
        && let Some(action) = rule(ALL_PODS, port, DIRECTION_INBOUND)
    {
        return action;
    }
    match flags {
        _ if flags & POD_STRICT != 0 => PORT_STRICT,
        _ if flags & POD_ASSIGN != 0 => PORT_ASSIGN,
        _ => PORT_PERMISSIVE,
    }
}

/// The pod id of rules that hold for every pod.
const ALL_PODS: u32 = 0;

/// The rule for a port: the pod's own, else the one for every pod.
#[inline(always)]
fn port_action(pod_id: u32, port: u16, direction: u16) -> Option<u32> {
    rule(pod_id, port, direction).or_else(|| rule(ALL_PODS, port, direction))
}

#[inline(always)]
fn rule(pod_id: u32, port: u16, direction: u16) -> Option<u32> {
    // SAFETY: the reference is not kept, and a removed value stays readable until the program ends (RCU).
    unsafe { PORT_RULES.get(PortKey { pod_id, port, direction }) }.map(|rule| rule.action)
}

#[inline(always)]
fn is_excluded(pod_id: u32, dst: &Address) -> bool {
    let [p0, p1, p2, p3] = pod_id.to_be_bytes();
    let [d0, d1, d2, d3, d4, d5, d6, d7, d8, d9, d10, d11, d12, d13, d14, d15] = *dst;
    let key = [p0, p1, p2, p3, d0, d1, d2, d3, d4, d5, d6, d7, d8, d9, d10, d11, d12, d13, d14, d15];
    EXCLUDED_CIDRS.get(&Key::new(160, key)).is_some()
}
