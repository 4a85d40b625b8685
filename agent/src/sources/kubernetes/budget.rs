//! How often snapshots are made: at once after quiet, and with a bounded part of a core when changes do not end.

use std::time::{Duration, Instant};

/// Part of a core that making snapshots takes in the long run: one in so many. Putting them into force takes less than that again.
const SHARE: u32 = 10;
/// What can be saved up in quiet times.
const SAVED: Duration = Duration::from_millis(500);
/// Longest pause between two snapshots.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Time that may be spent.
#[derive(Debug)]
pub(super) struct Budget {
    /// How much, at `since`; and from then on it grows.
    left: Duration,
    since: Instant,
    /// When the next snapshot may be made.
    not_before: Instant,
}

impl Budget {
    pub(super) fn new(now: Instant) -> Self {
        Self { left: SAVED, since: now, not_before: now }
    }

    /// When the next snapshot may be made.
    pub(super) fn not_before(&self) -> Instant {
        self.not_before
    }

    /// One was made from `began` to `now`.
    pub(super) fn spend(&mut self, began: Instant, now: Instant) {
        let took = now.saturating_duration_since(began);
        let earned = now.saturating_duration_since(self.since) / SHARE;
        let had = (self.left + earned).min(SAVED);
        self.left = had.saturating_sub(took);
        let owed = took.saturating_sub(had);
        self.not_before = now + owed.saturating_mul(SHARE).min(LONGEST_PAUSE);
        // The pause pays what is owed, and earns nothing beside that.
        self.since = self.not_before;
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Budget, LONGEST_PAUSE, SAVED, SHARE};

    #[test]
    fn changes_after_quiet_are_immediate_and_endless_ones_take_their_share() {
        let start = Instant::now();
        let (mut budget, mut now) = (Budget::new(start), start);
        let cost = Duration::from_millis(50);
        // A change every two seconds costs less than is earned: none has to wait.
        for _ in 0..100 {
            now += Duration::from_secs(2);
            budget.spend(now, now + cost);
            assert!(budget.not_before() <= now + cost);
            now += cost;
        }
        // Changes without end: each begins as soon as it may.
        let (before, rounds) = (now, 1000);
        for _ in 0..rounds {
            now = now.max(budget.not_before());
            budget.spend(now, now + cost);
            now += cost;
        }
        let share = (cost * rounds).as_secs_f64() / (now - before).as_secs_f64();
        assert!(share < 1.2 / f64::from(SHARE), "{share}");
        assert!(now - before + SAVED * SHARE > cost * rounds * (SHARE - 2), "{:?}", now - before);
    }

    #[test]
    fn no_pause_is_longer_than_the_longest() {
        let (now, minute) = (Instant::now(), Duration::from_mins(1));
        let mut budget = Budget::new(now);
        budget.spend(now, now + minute);
        assert_eq!(budget.not_before(), now + minute + LONGEST_PAUSE);
    }
}
