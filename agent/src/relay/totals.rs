//! What all connections together have moved, and how they ended.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::{CloseReason, Connection, DataPath};

/// Sums over the connections of a table. Bytes of live ones are in it after [`Totals::take`].
#[derive(Debug, Default)]
pub struct Totals {
    moved: [Moved; DataPath::ALL.len()],
    ended: [AtomicU64; CloseReason::ALL.len()],
}

/// Bytes of one data path.
#[derive(Debug, Default)]
struct Moved {
    sent: AtomicU64,
    received: AtomicU64,
}

/// How much of a connection's bytes is in the sums.
#[derive(Debug, Default)]
pub(super) struct Taken {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Totals {
    /// Application bytes towards upstreams, and from them.
    pub fn moved(&self, path: DataPath) -> (u64, u64) {
        let moved = &self.moved[path as usize];
        (moved.sent.load(Relaxed), moved.received.load(Relaxed))
    }

    /// Connections that ended for `reason`.
    pub fn ended(&self, reason: CloseReason) -> u64 {
        self.ended[reason as usize].load(Relaxed)
    }

    /// Counts an end.
    pub(super) fn end(&self, reason: CloseReason) {
        self.ended[reason as usize].fetch_add(1, Relaxed);
    }

    /// Adds what a connection has moved since the last time. May be called from several threads at once: every byte is counted once.
    pub(super) fn take(&self, connection: &Connection) {
        let sent = connection.taken.sent.newer(connection.sent.load(Relaxed));
        let received = connection.taken.received.newer(connection.received.load(Relaxed));
        if sent == 0 && received == 0 {
            return;
        }
        let moved = &self.moved[connection.what.data_path as usize];
        moved.sent.fetch_add(sent, Relaxed);
        moved.received.fetch_add(received, Relaxed);
        if let Some(account) = &connection.account {
            account.moved(sent, received);
        }
    }
}

trait Newer {
    /// By how much `now` is more than what was seen before.
    fn newer(&self, now: u64) -> u64;
}

impl Newer for AtomicU64 {
    fn newer(&self, now: u64) -> u64 {
        now.saturating_sub(self.fetch_max(now, Relaxed))
    }
}
