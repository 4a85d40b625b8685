//! Connections that have ended but for the kernel's last records: no event tells when TCP has taken them, so they are
//! looked at again, first soon, then less and less often. Events (room in the socket's buffer) bring them a turn earlier.

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

/// The kernel's worker that moves the records is on its way when there is room.
const FIRST: Duration = Duration::from_millis(1);
/// A slow reader may take its time.
const LONGEST: Duration = Duration::from_millis(128);

/// When to look at which connection.
#[derive(Default)]
pub(super) struct Settling {
    due: BTreeSet<(Instant, usize)>,
    waiting: HashMap<usize, Wait>,
}

struct Wait {
    at: Instant,
    delay: Duration,
}

impl Settling {
    /// Wants a connection looked at again. Whoever waits already keeps its place.
    pub(super) fn add(&mut self, key: usize, now: Instant) {
        let wait = self.waiting.entry(key).or_insert(Wait { at: now, delay: FIRST });
        if !self.due.contains(&(wait.at, key)) {
            wait.at = now + wait.delay;
            wait.delay = (wait.delay * 2).min(LONGEST);
            self.due.insert((wait.at, key));
        }
    }

    /// When somebody is due next.
    pub(super) fn next(&self) -> Option<Instant> {
        self.due.first().map(|&(at, _)| at)
    }

    /// Takes out who is due.
    pub(super) fn due(&mut self, now: Instant) -> Vec<usize> {
        let mut keys = Vec::new();
        while let Some(&(at, key)) = self.due.first()
            && at <= now
        {
            self.due.pop_first();
            keys.push(key);
        }
        keys
    }

    /// Forgets a connection.
    pub(super) fn remove(&mut self, key: usize) {
        if let Some(wait) = self.waiting.remove(&key) {
            self.due.remove(&(wait.at, key));
        }
    }
}
