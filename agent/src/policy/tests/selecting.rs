//! Which policies are compiled for which workload, and what happens with those that cannot be evaluated.

use std::sync::Arc;

use super::{
    super::{Decision, PolicySet, select, summaries},
    *,
};
use crate::mesh::{
    Action, MeshSettings, Policy, PolicyKey, PolicyStatus, Scope, SnapshotBuilder, Workload, WorkloadPolicy,
};

fn named(name: &str, scope: Scope, action: Action) -> Policy {
    Policy {
        key: PolicyKey { namespace: "foo".into(), name: name.into() },
        scope,
        selector: crate::mesh::Labels::default(),
        action,
        dry_run: false,
        rules: vec![crate::mesh::Rule::default()],
        invalid: None,
    }
}

/// As a control plane would: one workload that names its policies.
fn controlled(policies: Vec<Policy>, names: &[&str]) -> (Snapshot, Workload) {
    let snapshot = mesh("  []");
    let workload = Workload::clone(snapshot.workload(&key("foo/httpbin")).unwrap());
    let mut builder = SnapshotBuilder::new("node-a", snapshot.trust_domain, MeshSettings::default());
    builder.workload(workload.clone()).unwrap();
    let key = |name: &&str| PolicyKey { namespace: "foo".into(), name: (*name).into() };
    let facts = WorkloadPolicy { policies: names.iter().map(key).collect(), ..WorkloadPolicy::default() };
    builder.workload_policy(&workload.key, facts);
    for policy in policies {
        builder.policy(policy).unwrap();
    }
    (builder.build(), workload)
}

#[test]
fn a_named_policy_that_is_unknown_denies() {
    let peer = id("default", "sleep");
    let policies = || vec![named("known", Scope::Named, Action::Allow), named("others", Scope::Named, Action::Deny)];
    let (snapshot, _) = controlled(policies(), &["known"]);
    assert!(
        verdict(&snapshot, "foo/httpbin", Some(&peer), 80).is_allowed(),
        "a policy it does not name is not its own"
    );

    let (snapshot, workload) = controlled(policies(), &["known", "missing", "missing"]);
    let selection = select(&snapshot, &workload.key);
    assert_eq!((selection.policies.len(), selection.unknown.len()), (1, 1));
    let verdict = verdict(&snapshot, "foo/httpbin", Some(&peer), 80);
    assert_eq!(verdict.decision.to_string(), "policy foo/missing is named by the workload but not known, so it denies");
    assert!(!verdict.is_allowed());
}

#[test]
fn an_invalid_policy_denies_for_its_workloads_only() {
    let broken = || Policy {
        invalid: Some("principal \"\\u{0}\" is none; correct it".into()),
        ..named("broken", Scope::Namespace, Action::Allow)
    };
    let (snapshot, _) = controlled(vec![broken()], &[]);
    let answer = verdict(&snapshot, "foo/httpbin", Some(&id("default", "sleep")), 80);
    assert!(matches!(&answer.decision, Decision::Invalid(p) if &*p.key.name == "broken"), "{answer:?}");
    let list = summaries(&snapshot);
    assert!(matches!(&list.policies[0].status, PolicyStatus::Invalid { reason } if reason.contains("correct it")));
    assert_eq!((list.policies[0].workloads, list.policies[0].local_workloads), (1, 1));

    let elsewhere = Policy { key: PolicyKey { namespace: "bar".into(), name: "broken".into() }, ..broken() };
    let (snapshot, _) = controlled(vec![elsewhere], &[]);
    assert!(verdict(&snapshot, "foo/httpbin", None, 80).is_allowed());
}

#[test]
fn workloads_share_what_is_compiled() {
    let snapshot =
        mesh("  - { name: all, namespace: istio-system, rules: [{}] }\n  - { name: own, namespace: bar, rules: [{}] }");
    let node = NodePolicies::compile(&snapshot);
    let of = |name| node.of(&key(name)).unwrap();
    assert!(
        Arc::ptr_eq(of("foo/httpbin"), of("foo/sleep")) && Arc::ptr_eq(of("foo/sleep"), of("istio-system/gateway"))
    );
    assert!(Arc::ptr_eq(of("bar/httpbin"), of("bar/bare")) && !Arc::ptr_eq(of("bar/bare"), of("foo/sleep")));
    assert!(node.of(&key("foo/nobody")).is_none());
    assert!(!of("bar/bare").is_empty() && PolicySet::new(select(&mesh("  []"), &key("foo/sleep"))).is_empty());
}

#[test]
fn summaries_count_and_say_what_is_lost() {
    let snapshot = mesh(
        r#"
  - { name: b, namespace: foo, action: DENY, dryRun: true, rules: [{ to: [{ operation: { paths: [/x], ports: ["80"] } }] }, {}] }
  - { name: a, namespace: istio-system, selector: { matchLabels: { app: httpbin } } }
  - { name: c, namespace: istio-system, action: AUDIT, rules: [{}] }
  - { name: d, namespace: nobody, action: CUSTOM }"#,
    );
    let rows: Vec<_> = summaries(&snapshot)
        .policies
        .into_iter()
        .map(|p| {
            format!("{} {} {} {} {} {} {:?}", p.name, p.scope, p.action, p.dry_run, p.rules, p.workloads, p.status)
        })
        .collect();
    assert_eq!(
        rows,
        [
            "foo/b namespace DENY true 2 2 Partial { ignored: [\"paths\"] }",
            "istio-system/a workload ALLOW false 0 2 Active",
            "istio-system/c mesh AUDIT false 1 5 Partial { ignored: [\"action AUDIT\"] }",
            "nobody/d namespace CUSTOM false 0 0 Invalid { reason: \"action CUSTOM asks an external authorizer, which does not exist here; use ALLOW or DENY\" }",
        ]
    );
}

#[test]
fn a_workload_keeps_its_policies_while_nothing_about_them_changes() {
    let policies = || {
        let mut selecting = named("selecting", Scope::Namespace, Action::Deny);
        selecting.selector.0.insert("app".into(), "a".into());
        vec![selecting]
    };
    let labelled = |app: &str| {
        let mut facts = WorkloadPolicy::default();
        facts.labels.0.insert("app".into(), app.into());
        facts
    };
    let (snapshot, workload) = controlled(policies(), &[]);
    let first = NodePolicies::compile(&snapshot);
    let set = |node: &NodePolicies| Arc::clone(node.of(&workload.key).unwrap());
    assert!(set(&first).is_empty());

    let unrelated = SnapshotBuilder::amend(snapshot.clone()).build();
    assert!(unrelated.shares_local_workloads(&snapshot) && unrelated.shares_policies(&snapshot));
    let second = NodePolicies::compile_after(&unrelated, &snapshot, &first);
    assert!(Arc::ptr_eq(&set(&first), &set(&second)));

    let mut builder = SnapshotBuilder::amend(snapshot.clone());
    builder.workload_policy(&workload.key, labelled("a"));
    let relabelled = builder.build();
    assert!(!relabelled.shares_local_workloads(&snapshot), "its labels count too");
    let third = NodePolicies::compile_after(&relabelled, &snapshot, &first);
    assert_eq!(set(&third).selection(), &select(&relabelled, &workload.key));
    assert!(!set(&third).is_empty());

    let mut builder = SnapshotBuilder::amend(relabelled.clone());
    builder.clear_policies();
    let without = builder.build();
    assert!(!without.shares_policies(&relabelled));
    let mut builder = SnapshotBuilder::amend(without.clone());
    for policy in policies() {
        builder.policy(policy).unwrap();
    }
    let again = NodePolicies::compile_after(&builder.build(), &relabelled, &third);
    assert!(Arc::ptr_eq(&set(&third), &set(&again)), "policies that say the same");
    assert!(set(&NodePolicies::compile_after(&without, &relabelled, &third)).is_empty());
}
