//! When a certificate is issued again.

use std::time::{Duration, SystemTime};

use super::Svid;

/// First and longest pause after a failed attempt, for certificates that live for hours.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(1));
/// Longest pause until a certificate that is already past its half-life is looked at again.
const MAX_RECHECK: Duration = Duration::from_mins(10);
/// The half-life is varied by this fraction both ways, so that a node's certificates do not all renew at once.
const JITTER: f64 = 0.1;

/// One identity's place in the schedule. A new one is due at once.
#[derive(Debug, Default)]
pub(super) struct Slot {
    /// `None`: at once.
    due: Option<SystemTime>,
    failures: u32,
    running: bool,
    /// Became due again while running.
    again: bool,
}

impl Slot {
    /// How long until it is due; `None` while an attempt is under way.
    pub(super) fn wait(&self, now: SystemTime) -> Option<Duration> {
        let wait = || self.due.map_or(Duration::ZERO, |due| due.duration_since(now).unwrap_or_default());
        (!self.running).then(wait)
    }

    pub(super) fn start(&mut self) {
        self.running = true;
    }

    /// The material changed: whatever is under way may have seen the old.
    pub(super) fn at_once(&mut self) {
        self.due = None;
        self.failures = 0;
        self.again = self.running;
    }

    pub(super) fn issued(&mut self, svid: &Svid, now: SystemTime) {
        self.failures = 0;
        let jitter = 1.0 + JITTER * (2.0 * rand::random::<f64>() - 1.0);
        self.over(renewal(svid, now, jitter));
    }

    /// Returns the pause until the next attempt.
    pub(super) fn failed(&mut self, old: Option<&Svid>, now: SystemTime) -> Duration {
        let pause = retry(self.failures, old.map(validity));
        self.failures = self.failures.saturating_add(1);
        self.over(now + pause);
        pause
    }

    fn over(&mut self, due: SystemTime) {
        self.running = false;
        self.due = (!std::mem::take(&mut self.again)).then_some(due);
    }
}

fn validity(svid: &Svid) -> Duration {
    svid.not_after.duration_since(svid.not_before).unwrap_or_default()
}

/// Half-life times `jitter`. Past it (files nobody has replaced) a tenth of what is left.
pub(super) fn renewal(svid: &Svid, now: SystemTime, jitter: f64) -> SystemTime {
    let validity = validity(svid);
    let ideal = svid.not_before + (validity / 2).mul_f64(jitter);
    if ideal > now {
        return ideal;
    }
    let left = svid.not_after.duration_since(now).unwrap_or_default();
    now + (left / 10).clamp(RETRY.0.min(validity / 20), MAX_RECHECK)
}

/// Doubles with every failure in a row; short-lived certificates are retried faster.
pub(super) fn retry(failures: u32, validity: Option<Duration>) -> Duration {
    let (first, longest) = match validity {
        Some(v) => (RETRY.0.min(v / 20), RETRY.1.min(v / 10)),
        None => RETRY,
    };
    first.saturating_mul(1 << failures.min(16)).min(longest)
}
