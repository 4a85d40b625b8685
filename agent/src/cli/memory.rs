//! Memory after a burst of work: a handshake needs ten times what its connection keeps, loading a pod's programs a hundred times, and
//! glibc gives nothing back by itself as long as anything lies behind it.

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval};

use crate::{proxy::Reconciler, relay::ConnectionTable, sys::heap};

/// How often it is looked how much work there has been.
const LOOK: Duration = Duration::from_secs(2);
/// Connections opened and closed that make it worth while.
const BURST: u64 = 512;
/// An enrolment counts as so many of them.
const ENROLMENT: u64 = 32;
/// At most so many in [`LOOK`] are quiet.
const QUIET: u64 = 64;

/// What has happened, and what of it has been cleaned up after.
#[derive(Debug, Default)]
struct Watch {
    trimmed: u64,
    looked: u64,
}

impl Watch {
    /// Whether it is time, when so many connections have been opened and closed in all, or as much else has been done.
    fn is_due(&mut self, events: u64) -> bool {
        let recent = events.saturating_sub(std::mem::replace(&mut self.looked, events));
        let due = recent <= QUIET && events.saturating_sub(self.trimmed) >= BURST;
        if due {
            self.trimmed = events;
        }
        due
    }
}

/// Gives memory back whenever a burst is over. Runs until dropped.
pub(super) async fn give_back(table: Arc<ConnectionTable>, reconciler: Arc<Reconciler>) {
    let mut watch = Watch::default();
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // A start is a burst, too: of loading, and of reading what there is in the mesh.
        let started = if reconciler.applied().generation == 0 { 0 } else { BURST };
        if watch.is_due(table.events() + ENROLMENT * reconciler.enrolments() + started) {
            // A panic there is not possible, and nothing waits for the result.
            let _ = tokio::task::spawn_blocking(heap::trim).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_behind_a_burst_and_once() {
        let mut watch = Watch::default();
        let due: Vec<bool> = [0, 10, 400, 2000, 9000, 9010, 9011, 9500, 9530].map(|events| watch.is_due(events)).into();
        assert_eq!(due, [false, false, false, false, false, true, false, false, true]);
    }
}
