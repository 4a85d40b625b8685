//! `explain`: destinations, assumed sources, and what is said.

use super::{
    super::{Explanation, Explanations, Peer, Query, QueryError, explain},
    *,
};

fn ask(snapshot: &Snapshot, peer: Peer, to: &str) -> Result<Explanations, QueryError> {
    explain(snapshot, &Query { peer, to: to.parse().unwrap() })
}

fn one(snapshot: &Snapshot, peer: Peer, to: &str) -> Explanation {
    let mut answer = ask(snapshot, peer, to).unwrap();
    assert_eq!(answer.explanations.len(), 1);
    answer.explanations.remove(0)
}

fn peer(namespace: &str, account: &str) -> Peer {
    Peer::Mesh { identity: id(namespace, account), source: None }
}

const POLICIES: &str = r#"
  - name: clients
    namespace: foo
    selector: { matchLabels: { app: httpbin } }
    rules:
    - from: [{ source: { principals: [cluster.local/ns/foo/sa/sleep] } }, { source: { namespaces: [dev] } }]
      to: [{ operation: { ports: ["80"] } }]
    - to: [{ operation: { methods: [GET] } }]
  - name: lockdown
    namespace: istio-system
    action: DENY
    dryRun: true
    rules: [{ from: [{ source: { ipBlocks: [10.0.0.2] } }] }]"#;

#[test]
fn verdict_policy_rule_and_what_was_considered() {
    let snapshot = mesh(POLICIES);
    let e = one(&snapshot, peer("foo", "sleep"), "10.0.0.1:80");
    assert!(e.allowed);
    assert_eq!(e.reason, "ALLOW policy foo/clients, rules[0]");
    assert_eq!(e.decided_by.as_ref().map(|d| (d.policy.as_str(), d.rule)), Some(("foo/clients", Some(0))));
    assert_eq!((e.source, e.source_of.as_deref()), (ip("10.0.0.2"), Some("foo/sleep")));
    let would = e.dry_run.unwrap();
    assert!(!would.allowed);
    assert_eq!(would.reason, "DENY policy istio-system/lockdown, rules[0]");
    let considered: Vec<_> = e.considered.iter().map(|c| (c.policy.as_str(), c.matches, c.because.as_str())).collect();
    assert_eq!(
        considered,
        [
            ("foo/clients", true, "rules[0]: from[0] matches, to[0] matches"),
            ("istio-system/lockdown", true, "rules[0]: from[0] matches"),
        ]
    );

    let e = one(&snapshot, peer("foo", "sleep"), "10.0.0.1:81");
    assert!(!e.allowed && e.decided_by.is_none());
    assert_eq!(e.reason, "ALLOW policies select the workload and none of them matches");
    assert_eq!(
        e.considered[0].because,
        "rules[0]: to[0].operation.ports does not match; rules[1]: methods cannot be known of a TCP connection, so it never allows"
    );
    let e = one(&snapshot, Peer::Plaintext(ip("192.0.2.1")), "10.0.0.1:80");
    assert!(
        e.considered[0]
            .because
            .starts_with("rules[0]: from[0].source.principals, from[1].source.namespaces do not match; rules[1]")
    );
    assert_eq!(
        one(&snapshot, peer("foo", "sleep"), "10.0.0.3:81").reason,
        "no DENY policy matches and no ALLOW policy selects the workload"
    );
}

#[test]
fn sources_are_assumed_or_asked_for() {
    let snapshot = mesh(POLICIES);
    // Of the destination's family if the workload has such an address.
    assert_eq!(one(&snapshot, peer("foo", "default"), "[fd00::1]:80").source, ip("fd00::1"));
    assert_eq!(one(&snapshot, peer("foo", "sleep"), "[fd00::1]:80").source, ip("10.0.0.2"));
    let error = ask(&snapshot, peer("nowhere", "x"), "10.0.0.1:80").unwrap_err();
    assert!(error.to_string().contains("give the address with --source-ip"), "{error}");
    let given = Peer::Mesh { identity: id("dev", "x"), source: Some(ip("::ffff:10.0.0.2")) };
    let e = one(&snapshot, given, "10.0.0.1:80");
    assert_eq!((e.source, e.source_of, e.dry_run.unwrap().allowed), (ip("10.0.0.2"), None, false));
    // Where no policy looks at it, it does not matter.
    assert_eq!(one(&mesh("  []"), peer("nowhere", "x"), "10.0.0.1:80").source, ip("0.0.0.0"));
}

#[test]
fn what_decides_before_policies() {
    let text = r#"
apiVersion: underpass.io/v1alpha1
kind: NodeConfig
node: node-a
trustDomain: cluster.local
issuer: { local: { caDir: /ca } }
namespaces: [{ name: foo, mode: strict }]
workloads:
  - { name: a, namespace: foo, addresses: [10.0.0.1] }
  - { name: b, namespace: foo, addresses: [10.0.0.2, "fd00::2"], mode: permissive }
  - { name: old, namespace: foo, addresses: [10.0.0.3], protocol: plain }
services:
  - name: web
    namespace: foo
    vips: [10.96.0.1]
    ports: [{ port: 80, targetPort: 8080 }]
    endpoints: [{ workload: foo/a }, { workload: foo/b, ports: [{ port: 80, targetPort: 9090 }] }]
  - { name: empty, namespace: foo, vips: [10.96.0.2], ports: [{ port: 80 }] }
policies:
  - { name: nothing, namespace: foo, action: DENY, rules: [{ to: [{ operation: { ports: ["9090"] } }] }] }
"#;
    let snapshot = file::parse("n.yaml", text).unwrap().snapshot;
    let stranger = || Peer::Plaintext(ip("192.0.2.1"));
    let reason = |peer, to| {
        let e = one(&snapshot, peer, to);
        (e.allowed, e.reason)
    };
    assert_eq!(
        reason(stranger(), "10.0.0.1:80"),
        (false, "mode strict (set for the namespace) refuses plaintext".into())
    );
    assert!(reason(stranger(), "10.0.0.2:80").0 && reason(peer("foo", "default"), "10.0.0.1:80").0);
    assert!(reason(stranger(), "10.0.0.3:9090").1.contains("foo/old is not in the mesh (protocol: plain)"));
    let foreign = SpiffeId::new("other".parse().unwrap(), "foo", "default").unwrap();
    let foreign = Peer::Mesh { identity: foreign, source: Some(ip("10.0.0.9")) };
    assert_eq!(
        reason(foreign, "10.0.0.1:80"),
        (false, "the handshake refuses trust domain other: only cluster.local is accepted".into())
    );

    // A service's address stands for its endpoints, each with its own port and verdict.
    let answer = ask(&snapshot, peer("foo", "default"), "10.96.0.1:80").unwrap();
    assert_eq!(answer.service.as_deref(), Some("web.foo.svc.cluster.local"));
    let verdicts: Vec<_> = answer.explanations.iter().map(|e| (e.to.to_string(), e.allowed)).collect();
    assert_eq!(verdicts, [("10.0.0.1:8080".to_owned(), true), ("10.0.0.2:9090".to_owned(), false)]);

    for (to, expected) in [
        ("10.96.0.1:81", "service foo/web has no port 81"),
        ("10.96.0.2:80", "service foo/empty has no endpoint"),
        ("10.0.0.9:80", "10.0.0.9 is the address of no workload"),
    ] {
        let error = ask(&snapshot, stranger(), to).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
