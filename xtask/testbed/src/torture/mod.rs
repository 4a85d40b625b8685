//! Connections that are made to hurt: what both ends of one do follows from a seed and the connection's number, so either end
//! knows what the other has to send, and whether what it saw is what plain TCP would have shown it.
//!
//! `testbed-app torture` runs the ends, `cargo xtask torture` the scenarios.

mod bytes;
mod judge;
mod plan;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use bytes::{Mismatch, Source, Verifier};
pub use judge::{Outcome, ReadEnd, judge};
pub use plan::{Act, Buffers, Header, Plan, Reads, Scenario, Side, SidePlan, Trigger, Writes, mix};

/// What one end of many connections saw, as `testbed-app torture` prints it in its last line.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// Connections that ended, one way or another.
    pub connections: u64,
    /// Connections that went before they had told their number; only a server has those.
    pub unidentified: u64,
    /// Bytes that the kernel took.
    pub sent: u64,
    /// Bytes that came, every one of them right.
    pub received: u64,
    /// How many connections ended how: `end`, `reset`, or by this side's own `stopped`.
    pub ends: BTreeMap<String, u64>,
    /// What must not be, at most [`Report::MOST_FAILURES`].
    pub failures: Vec<Failure>,
    /// Failures in all.
    pub failed: u64,
}

/// A connection on which something was seen that must not be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    /// The connection; `None` when it had not told its number.
    pub number: Option<u64>,
    /// The end that saw it.
    pub side: Side,
    /// What was seen.
    pub what: String,
}

impl Report {
    /// Failures that are described; more are counted.
    pub const MOST_FAILURES: usize = 20;

    /// Adds a failure.
    pub fn fail(&mut self, failure: Failure) {
        self.failed += 1;
        if self.failures.len() < Self::MOST_FAILURES {
            self.failures.push(failure);
        }
    }

    /// Adds what one connection's end saw, and judges it.
    pub fn add(&mut self, plan: &Plan, side: Side, outcome: &Outcome, least: u64) {
        self.connections += 1;
        self.sent += outcome.sent;
        self.received += outcome.received;
        *self.ends.entry(outcome.read_end.name().to_owned()).or_default() += 1;
        if let Err(what) = judge(plan, side, outcome, least) {
            self.fail(Failure { number: Some(plan.number), side, what });
        }
    }

    /// Adds another report.
    pub fn merge(&mut self, more: Self) {
        self.connections += more.connections;
        self.unidentified += more.unidentified;
        self.sent += more.sent;
        self.received += more.received;
        for (name, count) in more.ends {
            *self.ends.entry(name).or_default() += count;
        }
        let described = more.failures.len() as u64;
        more.failures.into_iter().for_each(|failure| self.fail(failure));
        self.failed += more.failed - described;
    }
}

/// A seed that nobody chose.
pub fn random_seed() -> u64 {
    rand::random()
}
