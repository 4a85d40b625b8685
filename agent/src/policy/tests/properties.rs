//! Random policies and connections: the compiled form, the explanation and the reference agree.

use std::net::{IpAddr, SocketAddr};

use proptest::{collection::vec, prelude::*, sample::select as one_of};

use super::{
    super::{Decision, Disposition, NodePolicies, Peer, PolicySet, Query, Request, explain},
    key,
    reference::{Connection, Fields, RawCondition, RawPolicy, RawRule, RawWorkload, allowed, document, selects},
};
use crate::{
    mesh::{Snapshot, SpiffeId},
    sources::file,
};

const DOMAINS: [&str; 2] = ["cluster.local", "td"];
const NAMESPACES: [&str; 4] = ["a", "ab", "b", "istio-system"];
const ACCOUNTS: [&str; 3] = ["x", "xy", "yx"];
const LABELS: [(&str, &str); 3] = [("app", "web"), ("app", "db"), ("tier", "1")];
const PORTS: [u16; 3] = [80, 81, 8080];
const SOURCES: [&str; 8] =
    ["10.0.0.1", "10.0.0.2", "10.0.1.1", "192.0.2.7", "::ffff:10.0.0.1", "fd00::1", "fd00::2", "::a00:1"];
const BLOCKS: [&str; 16] = [
    "10.0.0.1",
    "10.0.0.0/8",
    "10.0.0.77/24",
    "10.0.0.0/30",
    "0.0.0.0/0",
    "192.0.2.0/25",
    "192.0.2.7/32",
    "::/0",
    "fd00::/8",
    "fd00::1",
    "fd00::/127",
    "::ffff:10.0.0.1",
    "::ffff:10.0.0.0/104",
    "::ffff:0.0.0.0/96",
    "::/80",
    "10.1.0.0/16",
];

fn principal() -> impl Strategy<Value = String> {
    (one_of(&DOMAINS[..]), one_of(&NAMESPACES[..]), one_of(&ACCOUNTS[..]))
        .prop_map(|(td, ns, sa)| format!("{td}/ns/{ns}/sa/{sa}"))
}

/// A string that occurs, whole or cut, or any string.
fn pattern(text: impl Strategy<Value = String>) -> impl Strategy<Value = String> {
    (text, 0..6_u8, any::<prop::sample::Index>()).prop_map(|(text, kind, at)| {
        let at = at.index(text.len() + 1);
        match kind {
            0 => "*".to_owned(),
            1 | 2 => format!("{}*", &text[..at]),
            3 | 4 => format!("*{}", &text[at..]),
            _ => text,
        }
    })
}

fn value(property: &'static str) -> BoxedStrategy<String> {
    let namespace = || one_of(&NAMESPACES[..]).prop_map(str::to_owned);
    match property {
        "source.principal" => pattern(principal()).boxed(),
        "source.namespace" => pattern(namespace()).boxed(),
        "source.serviceAccount" => (proptest::option::of(namespace()), one_of(&ACCOUNTS[..]))
            .prop_map(|(ns, sa)| ns.map_or(sa.to_owned(), |ns| format!("{ns}/{sa}")))
            .boxed(),
        "source.ip" | "destination.ip" => one_of(&BLOCKS[..]).prop_map(str::to_owned).boxed(),
        "destination.port" => one_of(&PORTS[..]).prop_map(|p| p.to_string()).boxed(),
        _ => Just("GET".to_owned()).boxed(),
    }
}

fn fields(names: &'static [(&'static str, &'static str)]) -> impl Strategy<Value = Fields> {
    let field = one_of(names).prop_flat_map(|(name, property)| (Just(name), vec(value(property), 1..4)));
    vec(field, 1..4).prop_map(|fields| fields.into_iter().collect())
}

fn source() -> impl Strategy<Value = Fields> {
    fields(&[
        ("principals", "source.principal"),
        ("principals", "source.principal"),
        ("notPrincipals", "source.principal"),
        ("namespaces", "source.namespace"),
        ("notNamespaces", "source.namespace"),
        ("serviceAccounts", "source.serviceAccount"),
        ("notServiceAccounts", "source.serviceAccount"),
        ("ipBlocks", "source.ip"),
        ("ipBlocks", "source.ip"),
        ("notIpBlocks", "source.ip"),
        ("requestPrincipals", "http"),
    ])
}

fn operation() -> impl Strategy<Value = Fields> {
    fields(&[
        ("ports", "destination.port"),
        ("ports", "destination.port"),
        ("notPorts", "destination.port"),
        ("notPorts", "destination.port"),
        ("methods", "http"),
    ])
}

fn condition() -> impl Strategy<Value = RawCondition> {
    let keys: &[&str] = &[
        "source.principal",
        "source.namespace",
        "source.serviceAccount",
        "source.ip",
        "source.ip",
        "destination.ip",
        "destination.ip",
        "destination.port",
        "request.headers[x]",
    ];
    one_of(keys)
        .prop_flat_map(|key| (Just(key), vec(value(key), 0..3), vec(value(key), 0..3)))
        .prop_filter("some values", |(_, values, not_values)| !(values.is_empty() && not_values.is_empty()))
        .prop_map(|(key, values, not_values)| RawCondition { key, values, not_values })
}

fn rule() -> impl Strategy<Value = RawRule> {
    (vec(source(), 0..4), vec(operation(), 0..3), vec(condition(), 0..3)).prop_map(|(from, to, when)| RawRule {
        from,
        to,
        when,
    })
}

fn policy() -> impl Strategy<Value = RawPolicy> {
    let actions = prop_oneof![10 => Just("ALLOW"), 5 => Just("DENY"), 1 => Just("AUDIT"), 1 => Just("CUSTOM")];
    (one_of(&NAMESPACES[..]), actions, any::<bool>(), any::<bool>(), vec(one_of(&LABELS[..]), 0..2), vec(rule(), 0..3))
        .prop_map(|(namespace, action, dry, run, labels, rules)| {
            // Most policies are enforced, and those that deny everything are rare.
            RawPolicy { namespace, action, dry_run: dry && (run || action == "CUSTOM"), labels, rules }
        })
}

fn workload() -> impl Strategy<Value = RawWorkload> {
    (one_of(&NAMESPACES[..]), vec(one_of(&LABELS[1..]), 0..3))
        .prop_map(|(namespace, labels)| RawWorkload { namespace, labels })
}

/// To a workload that is not known yet.
fn connection() -> impl Strategy<Value = (Connection, prop::sample::Index)> {
    let peer = (one_of(&DOMAINS[..]), one_of(&NAMESPACES[..]), one_of(&ACCOUNTS[..]));
    let port = prop_oneof![one_of(&PORTS[..]), Just(9_u16)];
    (proptest::option::weighted(0.8, peer), one_of(&SOURCES[..]), port, 0..3_u8, any::<prop::sample::Index>()).prop_map(
        |(peer, source, port, form, workload)| {
            let destination: IpAddr = ["10.1.0.0", "fd01::", "::ffff:10.1.0.0"][usize::from(form)].parse().unwrap();
            (
                Connection { peer, source: source.parse().unwrap(), destination: SocketAddr::new(destination, port) },
                workload,
            )
        },
    )
}

/// With the workload's own address put in.
fn aimed(mut connection: Connection, workload: usize) -> Connection {
    let last = u8::try_from(workload).expect("few workloads");
    connection.destination.set_ip(match connection.destination.ip() {
        IpAddr::V4(a) => IpAddr::V4((u32::from(a) + u32::from(last)).into()),
        IpAddr::V6(a) => IpAddr::V6((u128::from(a) + u128::from(last)).into()),
    });
    connection
}

fn agree(policies: &[RawPolicy], workloads: &[RawWorkload], connections: &[(Connection, prop::sample::Index)]) {
    let snapshot = file::parse("p.yaml", &document(policies, workloads)).expect("a valid document").snapshot;
    let compiled = NodePolicies::compile(&snapshot);
    for (connection, index) in connections {
        let at = index.index(workloads.len());
        let connection = aimed(connection.clone(), at);
        let peer: Option<SpiffeId> =
            connection.peer.map(|(td, ns, sa)| SpiffeId::new(td.parse().unwrap(), ns, sa).unwrap());
        let set = compiled.of(&key(&format!("{}/w{at}", workloads[at].namespace))).expect("this node's");
        let request = Request { peer: peer.as_ref(), source: connection.source, destination: connection.destination };
        let verdict = set.evaluate(&request);
        assert_eq!(
            verdict.is_allowed(),
            allowed(policies, &workloads[at], &connection, false),
            "{connection:?}: {}",
            verdict.decision
        );
        let with_dry_run = verdict.dry_run.as_ref().unwrap_or(&verdict.decision);
        assert_eq!(with_dry_run.is_allowed(), allowed(policies, &workloads[at], &connection, true), "{connection:?}");
        let selected = policies.iter().filter(|p| selects(p, &workloads[at])).count();
        assert_eq!(set.selection().policies.len(), selected);
        disposition_agrees(set, policies, &workloads[at], &connection);
        explanation_agrees(&snapshot, &connection, peer, &verdict.decision);
    }
}

/// What the destination alone decides is decided so for every source.
fn disposition_agrees(set: &PolicySet, policies: &[RawPolicy], workload: &RawWorkload, connection: &Connection) {
    let disposition = set.plaintext_disposition(connection.destination);
    let from = |source: &&str| {
        let plaintext = Connection { peer: None, source: source.parse().unwrap(), ..connection.clone() };
        allowed(policies, workload, &plaintext, false)
    };
    match disposition {
        Disposition::Allow => assert!(SOURCES.iter().all(from), "{connection:?}"),
        Disposition::Deny => assert!(!SOURCES.iter().any(from), "{connection:?}"),
        Disposition::Evaluate => {
            let mentions = |name: &str| format!("{policies:?}").contains(name);
            assert!(
                ["ipBlocks", "notIpBlocks", "source.ip"].iter().any(|n| mentions(n)),
                "nothing depends on a source"
            );
        }
    }
}

/// The rules read literally lead to the same decision, by the same rule.
fn explanation_agrees(snapshot: &Snapshot, connection: &Connection, peer: Option<SpiffeId>, decision: &Decision) {
    let peer = match peer {
        Some(identity) => Peer::Mesh { identity, source: Some(connection.source) },
        None => Peer::Plaintext(connection.source),
    };
    let answer = explain(snapshot, &Query { peer, to: connection.destination }).expect("a known destination");
    let [explanation] = &answer.explanations[..] else { panic!("one workload") };
    assert_eq!(explanation.policy.allowed, decision.is_allowed());
    let enforced = || explanation.considered.iter().filter(|c| !c.dry_run);
    let first = |action: &str| {
        enforced().find(|c| c.matches && c.action.is_some_and(|a| a.to_string() == action)).map(|c| (&c.policy, c.rule))
    };
    let rule = |r: &super::super::RuleRef| (r.policy.key.to_string(), Some(r.rule));
    let named = |found: Option<(&String, Option<usize>)>| found.map(|(policy, rule)| (policy.clone(), rule));
    match decision {
        Decision::Invalid(policy) => assert_eq!(named(first("CUSTOM")), Some((policy.key.to_string(), None))),
        Decision::Denied(r) => assert_eq!(named(first("DENY")), Some(rule(r))),
        Decision::Allowed(r) => {
            assert_eq!((named(first("DENY")), named(first("ALLOW"))), (None, Some(rule(r))));
        }
        Decision::NotAllowed => assert_eq!((first("CUSTOM"), first("DENY"), first("ALLOW")), (None, None, None)),
        Decision::AllowedByDefault => {
            assert!(enforced().all(|c| c.action.is_none_or(|a| a.to_string() != "ALLOW")));
        }
        Decision::Unknown(key) => panic!("nothing names {key}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn few_policies(
        policies in vec(policy(), 0..6),
        workloads in vec(workload(), 1..3),
        connections in vec(connection(), 1..12),
    ) {
        agree(&policies, &workloads, &connections);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Enough rows for several words of bits and for both forms of a posting. Without policies that deny everything.
    #[test]
    fn many_policies(
        policies in vec(policy().prop_filter("decides", |p| p.action != "CUSTOM" || p.dry_run), 100..300),
        connections in vec(connection(), 20..60),
    ) {
        let mut policies = policies;
        for policy in &mut policies {
            policy.namespace = "a";
            policy.labels.clear();
            // Rules without a source match so much that nothing else would be looked at.
            policy.rules.retain(|r| !r.from.is_empty());
        }
        agree(&policies, &[RawWorkload { namespace: "a", labels: vec![] }], &connections);
        // What denies hides what allows.
        policies.retain(|p| p.action != "DENY");
        agree(&policies, &[RawWorkload { namespace: "a", labels: vec![] }], &connections);
    }
}
