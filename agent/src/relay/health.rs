//! Whether the relay threads go on.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// A relay thread's sign of life. Written by it alone, twice in a round of its loop, without looking at a clock.
#[derive(Debug, Default)]
pub(super) struct Beat(AtomicU64);

/// The thread is gone.
const ENDED: u64 = u64::MAX;

impl Beat {
    /// It has something to do: odd from here on.
    pub(super) fn work(&self) {
        self.0.store(self.0.load(Relaxed) | 1, Relaxed);
    }

    /// It waits for events, and may do so for ever: even, and another number than before.
    pub(super) fn rest(&self) {
        let now = self.0.load(Relaxed);
        self.0.store(now + (now & 1), Relaxed);
    }

    /// It will do nothing more.
    pub(super) fn end(&self) {
        self.0.store(ENDED, Relaxed);
    }
}

/// How a relay thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadHealth {
    /// Connections that it has.
    pub connections: usize,
    /// For how long it has been at one and the same round of work, as far as was noticed; zero when it waits or gets on.
    pub stuck: Duration,
    /// It serves nobody any more.
    pub ended: bool,
}

/// What was last seen of a thread.
#[derive(Debug)]
pub(super) struct Seen {
    beat: u64,
    since: Instant,
}

impl Seen {
    pub(super) fn new(now: Instant) -> Self {
        Self { beat: 0, since: now }
    }

    /// Looks again.
    pub(super) fn look(&mut self, beat: &Beat, connections: usize, now: Instant) -> ThreadHealth {
        let beat = beat.0.load(Relaxed);
        let working = beat & 1 == 1 && beat != ENDED;
        if beat != self.beat || !working {
            *self = Self { beat, since: now };
        }
        ThreadHealth { connections, stuck: now.saturating_duration_since(self.since), ended: beat == ENDED }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_is_not_being_stuck_and_one_round_of_work_that_does_not_end_is() {
        let (beat, start) = (Beat::default(), Instant::now());
        let mut seen = Seen::new(start);
        let mut at = |s| seen.look(&beat, 0, start + Duration::from_secs(s));
        let stuck = |s| ThreadHealth { connections: 0, stuck: Duration::from_secs(s), ended: false };
        assert_eq!((at(0), at(3600)), (stuck(0), stuck(0)), "it has not begun");
        beat.work();
        assert_eq!((at(3601), at(3611)), (stuck(0), stuck(10)));
        beat.rest();
        assert_eq!((at(3612), at(4000)), (stuck(0), stuck(0)));
        beat.rest();
        beat.work();
        at(4001);
        beat.rest();
        beat.work();
        assert_eq!(at(4011), stuck(0), "another round");
        beat.end();
        assert!(at(4012).ended);
    }
}
