//! Memory after a burst of connections: a handshake needs ten times what its connection keeps, and glibc gives nothing back by itself
//! as long as anything lies behind it.

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval};

use crate::{relay::ConnectionTable, sys::heap};

/// How often the number of connections is looked at.
const LOOK: Duration = Duration::from_secs(2);
/// Connections opened and closed that make it worth while.
const BURST: u64 = 512;
/// At most so many in [`LOOK`] are quiet.
const QUIET: u64 = 64;

/// What has happened, and what of it has been cleaned up after.
#[derive(Debug, Default)]
struct Watch {
    trimmed: u64,
    looked: u64,
}

impl Watch {
    /// Whether it is time, when `events` connections have been opened and closed in all.
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
pub(super) async fn give_back(table: Arc<ConnectionTable>) {
    let mut watch = Watch::default();
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if watch.is_due(table.events()) {
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
