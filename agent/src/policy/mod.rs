//! Who may connect to what: Istio's authorization semantics for TCP connections. No I/O.
//!
//! The policies themselves are data of [`crate::mesh`]. Here they are selected for a workload, compiled into a
//! [`PolicySet`], and evaluated on what is known of a connection, a [`Request`]: the identity that the handshake proved
//! (none for plaintext), the peer's address, and the workload's own address and port.
//!
//! 1. A policy that cannot be evaluated, or that is named but unknown, denies. Who enforces may hold a connection until a policy
//!    that is unknown arrives.
//! 2. A DENY policy that matches denies.
//! 3. Without an ALLOW policy that selects the workload, the connection is allowed.
//! 4. An ALLOW policy that matches allows. Otherwise the connection is denied.
//!
//! Dry-run policies decide nothing; [`Verdict::dry_run`] tells what they would. Whether plaintext is let in at all is
//! the inbound mode's question, not a policy's; [`plaintext_rules`] and [`explain()`] answer both together.

mod bits;
mod explain;
mod index;
mod matching;
mod plaintext;
mod ports;
mod report;
mod request;
mod select;
mod set;
mod table;
#[cfg(test)]
mod tests;

use std::{fmt, sync::Arc};

pub use explain::{MAX_ENDPOINTS, Peer, Query, QueryError, explain};
pub use plaintext::{Disposition, PlaintextRules, plaintext_rules};
pub use report::{Considered, DecidedBy, Explanation, Explanations, Opinion, PolicyList, PolicySummary, summaries};
pub use request::Request;
pub use select::{Selection, select};
pub use set::{NodePolicies, PolicySet};

use crate::mesh::{Policy, PolicyKey};

/// What becomes of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What is enforced.
    pub decision: Decision,
    /// What would be, if the dry-run policies were enforced too. Absent when no dry-run policy selects the workload.
    pub dry_run: Option<Decision>,
}

impl Verdict {
    /// May the connection go on?
    pub fn is_allowed(&self) -> bool {
        self.decision.is_allowed()
    }
}

/// A decision and what it rests on. Displayed, it is a reason for logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// No DENY policy matches and no ALLOW policy selects the workload.
    AllowedByDefault,
    /// By this rule of an ALLOW policy.
    Allowed(RuleRef),
    /// By this rule of a DENY policy.
    Denied(RuleRef),
    /// ALLOW policies select the workload and none of them matches.
    NotAllowed,
    /// This policy selects the workload and cannot be evaluated.
    Invalid(Arc<Policy>),
    /// The workload is subject to a policy of this name, and there is none.
    Unknown(PolicyKey),
}

impl Decision {
    /// Is it in favour of the connection?
    pub fn is_allowed(&self) -> bool {
        matches!(self, Decision::AllowedByDefault | Decision::Allowed(_))
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Decision::AllowedByDefault => {
                f.write_str("no DENY policy matches and no ALLOW policy selects the workload")
            }
            Decision::Allowed(rule) | Decision::Denied(rule) => rule.fmt(f),
            Decision::NotAllowed => f.write_str("ALLOW policies select the workload and none of them matches"),
            Decision::Invalid(policy) => write!(f, "policy {} cannot be evaluated, so it denies", policy.key),
            Decision::Unknown(key) => write!(f, "policy {key} is named by the workload but not known, so it denies"),
        }
    }
}

/// One rule of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleRef {
    /// The policy.
    pub policy: Arc<Policy>,
    /// Index into its rules.
    pub rule: usize,
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} policy {}, rules[{}]", self.policy.action, self.policy.key, self.rule)
    }
}
