//! Policies and verdicts in the words that operators and scripts read. A public interface: fields are added, never
//! renamed or removed.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::{Decision, select::selects};
use crate::mesh::{Action, EffectiveMode, PolicyStatus, Snapshot};

/// All policies of a configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyList {
    /// Ordered by name.
    pub policies: Vec<PolicySummary>,
}

/// One policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicySummary {
    /// `namespace/name`.
    pub name: String,
    /// `mesh`, `namespace` or `workload`.
    pub scope: String,
    /// What it does.
    pub action: Action,
    /// It only reports.
    pub dry_run: bool,
    /// Number of rules.
    pub rules: usize,
    /// Workloads of the mesh that it selects, on all nodes.
    pub workloads: usize,
    /// Those of this node, where it is enforced by this agent.
    pub local_workloads: usize,
    /// Is it enforced as written?
    pub status: PolicyStatus,
}

/// Lists the policies of `snapshot`. Takes time in proportion to policies times workloads.
pub fn summaries(snapshot: &Snapshot) -> PolicyList {
    let policies = snapshot.policies().map(|policy| {
        let selected = |key| selects(policy, key, snapshot.workload_policy(key));
        let selected = snapshot.workloads().filter(|w| selected(&w.key));
        let (workloads, local_workloads) =
            selected.fold((0, 0), |(all, local), w| (all + 1, local + usize::from(w.local.is_some())));
        PolicySummary {
            name: policy.key.to_string(),
            scope: policy.reach().to_owned(),
            action: policy.action,
            dry_run: policy.dry_run,
            rules: policy.rules.len(),
            workloads,
            local_workloads,
            status: policy.status(),
        }
    });
    PolicyList { policies: policies.collect() }
}

/// What would become of a connection: one answer per workload that it can reach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanations {
    /// Host name, when the destination is a service's address.
    pub service: Option<String>,
    /// One for a workload's own address, one per endpoint for a service's.
    pub explanations: Vec<Explanation>,
    /// Endpoints beyond [`super::MAX_ENDPOINTS`], which are not explained.
    pub endpoints_left_out: usize,
}

/// What would become of a connection to one workload, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// SPIFFE ID of the peer; absent for plaintext.
    pub from: Option<String>,
    /// Address of the peer.
    pub source: IpAddr,
    /// `namespace/name` of the workload whose address was taken because none was given.
    pub source_of: Option<String>,
    /// The workload's address, and the port that its application listens on.
    pub to: SocketAddr,
    /// `namespace/name` of the workload.
    pub workload: String,
    /// Where it runs: that node's agent decides.
    pub node: String,
    /// The verdict.
    pub allowed: bool,
    /// What decided, in a sentence.
    pub reason: String,
    /// The policy that decided, if one did.
    pub decided_by: Option<DecidedBy>,
    /// Inbound mode on that port, which decides about plaintext only.
    pub mode: EffectiveMode,
    /// What the policies say, modes and exclusions aside.
    pub policy: Opinion,
    /// What they would say if the dry-run policies were enforced; absent without dry-run policies.
    pub dry_run: Option<Opinion>,
    /// Every policy that selects the workload.
    pub considered: Vec<Considered>,
}

/// What policies say of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opinion {
    /// In its favour or not.
    pub allowed: bool,
    /// Why, in a sentence.
    pub reason: String,
    /// The policy, if one decided.
    pub decided_by: Option<DecidedBy>,
}

/// A policy, and its rule when a rule matched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecidedBy {
    /// `namespace/name`.
    pub policy: String,
    /// What it does; absent when it is not known.
    pub action: Option<Action>,
    /// Index into its rules; absent when the policy cannot be evaluated.
    pub rule: Option<usize>,
}

/// A policy that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Considered {
    /// `namespace/name`.
    pub policy: String,
    /// `mesh`, `namespace` or `workload`; absent when the policy is not known.
    pub scope: Option<String>,
    /// What it does; absent when it is not known.
    pub action: Option<Action>,
    /// It only reports.
    pub dry_run: bool,
    /// Does it match the connection? A policy that cannot be evaluated matches everything.
    pub matches: bool,
    /// The rule that matches.
    pub rule: Option<usize>,
    /// Why it matches or not.
    pub because: String,
}

impl From<&Decision> for Opinion {
    fn from(decision: &Decision) -> Self {
        let decided_by = match decision {
            Decision::AllowedByDefault | Decision::NotAllowed => None,
            Decision::Allowed(rule) | Decision::Denied(rule) => Some(DecidedBy {
                policy: rule.policy.key.to_string(),
                action: Some(rule.policy.action),
                rule: Some(rule.rule),
            }),
            Decision::Invalid(policy) => {
                Some(DecidedBy { policy: policy.key.to_string(), action: Some(policy.action), rule: None })
            }
            Decision::Unknown(key) => Some(DecidedBy { policy: key.to_string(), action: None, rule: None }),
        };
        Self { allowed: decision.is_allowed(), reason: decision.to_string(), decided_by }
    }
}
