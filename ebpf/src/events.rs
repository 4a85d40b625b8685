//! Counters, and events about what was refused.

use aya_ebpf::EbpfContext;
use underpass_abi::{Address, Counter, Event};

use crate::{
    log,
    maps::{COUNTERS, EVENTS},
};

/// Adds one. A plain addition: the slot is this CPU's, and programs do not migrate.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: a non-null slot of the map is a u64 that lives as long as the program runs.
        unsafe { *slot += 1 };
    }
}

/// The two ends of a connection or packet, for an event.
#[derive(Default)]
pub struct Ends {
    pub src: Address,
    pub dst: Address,
    pub src_port: u16,
    pub dst_port: u16,
}

/// Counts a refusal and tells user space about it.
#[inline(always)]
pub fn report(counter: Counter, pod_id: u32, ends: &Ends) {
    count(counter);
    let &Ends { src, dst, src_port, dst_port } = ends;
    EVENTS.send(Event { kind: counter as u32, pod_id, src, dst, src_port, dst_port, _pad: 0 });
}

/// [`report`], and a line with feature `log`.
#[inline(always)]
pub fn refuse(ctx: &impl EbpfContext, counter: Counter, pod_id: u32, ends: &Ends) {
    report(counter, pod_id, ends);
    let &Ends { src, dst, src_port, dst_port } = ends;
    log::info!(
        ctx,
        "refused, reason {}, pod {}: {:i}:{} to {:i}:{}",
        counter as u32,
        pod_id,
        src,
        src_port,
        dst,
        dst_port
    );
    let _ = (ctx, src, dst, src_port, dst_port);
}
