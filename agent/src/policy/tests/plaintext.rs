//! Dispositions: never more than the policies say of a single connection.

use std::net::SocketAddr;

use super::{
    super::{Disposition, PolicySet, Query, explain, plaintext_rules, select},
    *,
};
use crate::policy::Peer;

fn rules_of(policies: &str) -> crate::policy::PlaintextRules {
    let snapshot = mesh(policies);
    let workload = snapshot.workload(&key("foo/httpbin")).unwrap();
    plaintext_rules(&snapshot, workload, &PolicySet::new(select(&snapshot, &workload.key)))
}

#[test]
fn what_the_destination_alone_decides() {
    use Disposition::{Allow, Deny, Evaluate};
    for (policies, default, ports) in [
        ("  []", Allow, vec![]),
        ("  - { name: n, namespace: foo }", Deny, vec![]),
        ("  - { name: n, namespace: foo, dryRun: true }", Allow, vec![]),
        ("  - { name: n, namespace: foo, action: CUSTOM }", Deny, vec![]),
        (
            "  - { name: n, namespace: foo, action: DENY, rules: [{ from: [{ source: { notPrincipals: [\"*\"] } }] }] }",
            Deny,
            vec![],
        ),
        ("  - { name: n, namespace: foo, rules: [{ from: [{ source: { principals: [\"*\"] } }] }] }", Deny, vec![]),
        (
            "  - { name: n, namespace: foo, rules: [{ to: [{ operation: { ports: [\"80\"] } }] }] }",
            Deny,
            vec![(80, Allow)],
        ),
        (
            "  - { name: n, namespace: foo, action: DENY, rules: [{ to: [{ operation: { notPorts: [\"80\"] } }] }] }",
            Deny,
            vec![(80, Allow)],
        ),
        (
            "  - { name: n, namespace: foo, rules: [{ from: [{ source: { ipBlocks: [10.0.0.0/8] } }], to: [{ operation: { ports: [\"80\"] } }] }] }",
            Deny,
            vec![(80, Evaluate)],
        ),
        (
            "  - { name: n, namespace: foo, action: DENY, rules: [{ when: [{ key: source.ip, notValues: [10.0.0.0/8] }] }] }",
            Evaluate,
            vec![],
        ),
        // The pod has an address of each family, and a rule that tells them apart.
        (
            "  - { name: n, namespace: foo, rules: [{ when: [{ key: destination.ip, values: [10.0.0.0/8] }] }] }",
            Evaluate,
            vec![],
        ),
    ] {
        let rules = rules_of(policies);
        assert_eq!((rules.default, rules.ports.into_iter().collect::<Vec<_>>()), (default, ports), "{policies}");
    }
}

/// Exclusions before modes before policies.
#[test]
fn exclusions_and_modes_come_first() {
    let text = r#"
apiVersion: underpass.io/v1alpha1
kind: NodeConfig
node: node-a
trustDomain: cluster.local
issuer: { local: { caDir: /ca } }
mesh: { exclude: { inboundPorts: [9100] } }
namespaces: [{ name: foo, mode: strict }]
workloads:
  - name: httpbin
    namespace: foo
    addresses: [10.0.0.1]
    ports: [{ port: 80, mode: permissive }, { port: 81, mode: permissive }]
    enroll: { netns: /n/1, exclude: { inboundPorts: [9200] } }
policies:
  - { name: n, namespace: foo, rules: [{ to: [{ operation: { ports: ["80", "443"] } }] }] }
"#;
    let snapshot = file::parse("n.yaml", text).unwrap().snapshot;
    let workload = snapshot.workload(&key("foo/httpbin")).unwrap();
    let rules = plaintext_rules(&snapshot, workload, NodePolicies::compile(&snapshot).of(&workload.key).unwrap());
    let expected = [(80, true), (81, false), (443, false), (9100, true), (9200, true), (5, false)];
    for (port, allowed) in expected {
        assert_eq!(rules.of(port) == Disposition::Allow, allowed, "{port}");
        let query = Query { peer: Peer::Plaintext(ip("192.0.2.1")), to: SocketAddr::new(ip("10.0.0.1"), port) };
        let answer = explain(&snapshot, &query).unwrap();
        assert_eq!(answer.explanations[0].allowed, allowed, "{port}: {}", answer.explanations[0].reason);
    }
    assert_eq!(rules.default, Disposition::Deny);
}
