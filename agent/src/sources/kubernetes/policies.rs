//! Istio's `AuthorizationPolicy`: read by the same code as the policies of a configuration file.

use super::{
    records::{ConfiguredRecord, Key},
    status::Problem,
};
use crate::{
    mesh::{PolicyKey, SnapshotBuilder},
    sources::file::policy_of_spec,
};

/// Fields that attach a policy to a proxy instead of to workloads.
const TARGETS: [&str; 2] = ["targetRef", "targetRefs"];

/// Adds a policy. One that cannot be read denies what it selects, and the problem says why.
pub(super) fn add(
    builder: &mut SnapshotBuilder,
    key: &Key,
    record: &ConfiguredRecord,
    root_namespace: &str,
    problems: &mut Vec<Problem>,
) {
    let object = format!("AuthorizationPolicy {key}");
    let mut spec: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&record.spec).unwrap_or_default();
    if TARGETS.iter().any(|t| spec.get(*t).is_some_and(|v| !v.is_null())) {
        let problem = "targetRefs attach it to a waypoint or gateway, which enforce it; nothing is enforced here. Use spec.selector for workloads";
        problems.push(Problem { object, problem: problem.into() });
        return;
    }
    for target in TARGETS {
        spec.remove(target);
    }
    let policy_key = PolicyKey { namespace: key.namespace.clone(), name: key.name.clone() };
    let policy = policy_of_spec(policy_key, root_namespace, record.dry_run, spec);
    if let Some(reason) = &policy.invalid {
        problems.push(Problem { object: object.clone(), problem: reason.clone() });
    }
    if let Err(e) = builder.policy(policy) {
        problems.push(Problem { object, problem: e.to_string() });
    }
}
