//! Whose the entries of `FLOWS` are: a pod that lets its connections pile up is refused, and nobody else is.

use core::arch::asm;

use underpass_abi::{ALL_FLOWS, PendingFlows, flow_share};

use crate::maps::PENDING_FLOWS;

/// May the pod have one more entry? A pod without a count, which the agent gives no pod, may not.
#[inline(always)]
pub fn has_room(pod_id: u32) -> bool {
    match (count(pod_id), count(ALL_FLOWS)) {
        (Some(own), Some(all)) => own < flow_share(all),
        _ => false,
    }
}

/// Counts one more entry, before it is made. False, and nothing is counted, when that is more than the pod may have. Counted
/// first and compared then, so that connections made at the same time on other processors are not overlooked.
#[inline(always)]
pub fn reserve(pod_id: u32) -> bool {
    add(pod_id, 1);
    let fits = match (count(pod_id), count(ALL_FLOWS)) {
        (Some(own), Some(all)) => own <= flow_share(all - 1),
        _ => false,
    };
    if !fits {
        release(pod_id);
    }
    fits
}

/// Counts an entry that is gone, or was not made.
#[inline(always)]
pub fn release(pod_id: u32) {
    add(pod_id, u64::MAX);
}

/// `u64::MAX` takes one away.
#[inline(always)]
fn add(pod_id: u32, amount: u64) {
    for index in [pod_id, ALL_FLOWS] {
        if let Some(slot) = PENDING_FLOWS.get_ptr_mut(index) {
            // SAFETY: a slot of the array lives as long as the program runs, its words are aligned, and everybody else who
            // writes this word does so atomically, too.
            unsafe {
                let added = &raw mut (*slot).added;
                asm!("lock *(u64 *)({added} + 0) += {amount}", added = in(reg) added, amount = in(reg) amount);
            }
        }
    }
}

#[inline(always)]
fn count(index: u32) -> Option<u64> {
    let slot = PENDING_FLOWS.get_ptr(index)?;
    // SAFETY: a slot of the array lives as long as the program runs; other processors may be writing it.
    let now = unsafe {
        PendingFlows {
            added: (&raw const (*slot).added).read_volatile(),
            taken: (&raw const (*slot).taken).read_volatile(),
        }
    };
    Some(now.count())
}
