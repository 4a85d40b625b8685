//! Which policies select a workload.

use std::{collections::BTreeMap, sync::Arc};

use crate::mesh::{Policy, PolicyKey, Scope, Snapshot, WorkloadKey, WorkloadPolicy};

/// The policies that a workload is subject to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Ordered by key.
    pub policies: Vec<Arc<Policy>>,
    /// Named by the workload, and not known.
    pub unknown: Vec<PolicyKey>,
}

/// The policies of `snapshot` that select `workload`.
pub fn select(snapshot: &Snapshot, workload: &WorkloadKey) -> Selection {
    let facts = snapshot.workload_policy(workload);
    let mut selected: BTreeMap<&PolicyKey, &Arc<Policy>> =
        snapshot.policies().filter(|p| selects(p, workload, facts)).map(|p| (&p.key, p)).collect();
    let mut unknown = Vec::new();
    for key in &facts.policies {
        match snapshot.policy(key) {
            Some(policy) => drop(selected.insert(&policy.key, policy)),
            None => unknown.push(key.clone()),
        }
    }
    unknown.sort();
    unknown.dedup();
    Selection { policies: selected.into_values().cloned().collect(), unknown }
}

/// Does `policy` select the workload?
pub(super) fn selects(policy: &Policy, workload: &WorkloadKey, facts: &WorkloadPolicy) -> bool {
    let within = match policy.scope {
        Scope::Mesh => true,
        Scope::Namespace => policy.key.namespace == workload.namespace,
        Scope::Named => return facts.policies.contains(&policy.key),
    };
    within && facts.labels.satisfy(&policy.selector)
}
