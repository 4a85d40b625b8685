//! What Istio's documentation says of its own examples, as far as it is about TCP.

use super::*;

/// Name, policies, and `(workload, namespace and account of the peer, port, allowed)`.
type Example<'a> = (&'a str, &'a str, &'a [(&'a str, Option<(&'a str, &'a str)>, u16, bool)]);

const SLEEP: Option<(&str, &str)> = Some(("default", "sleep"));
const TEST: Option<(&str, &str)> = Some(("test", "any"));
const DEV: Option<(&str, &str)> = Some(("dev", "any"));
const NOBODY: Option<(&str, &str)> = None;

const EXAMPLES: &[Example<'_>] = &[
    ("no policy", "  []", &[("foo/httpbin", SLEEP, 80, true), ("foo/httpbin", NOBODY, 80, true)]),
    (
        "allow nothing in a namespace",
        "  - { name: allow-nothing, namespace: foo }",
        &[("foo/httpbin", SLEEP, 80, false), ("foo/sleep", NOBODY, 80, false), ("bar/httpbin", SLEEP, 80, true)],
    ),
    (
        "allow all in a namespace",
        "  - { name: allow-nothing, namespace: foo }\n  - { name: allow-all, namespace: foo, rules: [{}] }",
        &[("foo/httpbin", SLEEP, 80, true), ("foo/httpbin", NOBODY, 80, true)],
    ),
    (
        "allow nothing to labelled workloads",
        "  - { name: allow-nothing, namespace: bar, selector: { matchLabels: { app: httpbin } } }",
        &[("bar/httpbin", SLEEP, 80, false), ("bar/bare", SLEEP, 80, true), ("foo/httpbin", SLEEP, 80, true)],
    ),
    (
        "the root namespace reaches every namespace, with a selector too",
        "  - { name: allow-nothing, namespace: istio-system, selector: { matchLabels: { version: v1 } } }",
        &[
            ("foo/httpbin", SLEEP, 80, false),
            ("bar/httpbin", SLEEP, 80, true),
            ("istio-system/gateway", SLEEP, 80, true),
        ],
    ),
    (
        "DENY without rules never matches",
        "  - { name: deny-nothing, namespace: foo, action: DENY }",
        &[("foo/httpbin", SLEEP, 80, true)],
    ),
    (
        "DENY with an empty rule matches everything",
        "  - { name: deny-all, namespace: foo, action: DENY, rules: [{}] }\n  - { name: allow-all, namespace: foo, rules: [{}] }",
        &[("foo/httpbin", SLEEP, 80, false)],
    ),
    (
        "principals and namespaces are alternatives across sources",
        r#"
  - name: httpbin
    namespace: foo
    action: ALLOW
    rules:
    - from:
      - source: { principals: ["cluster.local/ns/default/sa/sleep"] }
      - source: { namespaces: ["test"] }"#,
        &[
            ("foo/httpbin", SLEEP, 80, true),
            ("foo/httpbin", TEST, 80, true),
            ("foo/httpbin", DEV, 80, false),
            ("foo/httpbin", NOBODY, 80, false),
        ],
    ),
    (
        "a rule that needs HTTP never allows",
        r#"
  - name: httpbin
    namespace: foo
    rules:
    - from:
      - source: { principals: ["cluster.local/ns/default/sa/sleep"] }
      to:
      - operation: { methods: ["GET"], paths: ["/info*"] }
      when:
      - { key: "request.auth.claims[iss]", values: ["https://accounts.google.com"] }"#,
        &[("foo/httpbin", SLEEP, 80, false), ("foo/httpbin", TEST, 80, false)],
    ),
    (
        "DENY of a method denies the namespace, whatever the method",
        r#"
  - name: httpbin
    namespace: foo
    action: DENY
    rules:
    - from: [{ source: { namespaces: ["dev"] } }]
      to: [{ operation: { methods: ["POST"] } }]"#,
        &[("foo/httpbin", DEV, 80, false), ("foo/httpbin", TEST, 80, true), ("foo/httpbin", NOBODY, 80, true)],
    ),
    (
        "DENY of a method on a port denies the port",
        r#"
  - name: httpbin
    namespace: foo
    action: DENY
    rules: [{ to: [{ operation: { methods: ["POST"], ports: ["8080"] } }] }]"#,
        &[("foo/httpbin", SLEEP, 8080, false), ("foo/httpbin", SLEEP, 80, true)],
    ),
    (
        "DENY of a method alone denies all TCP",
        r#"
  - { name: httpbin, namespace: foo, action: DENY, rules: [{ to: [{ operation: { methods: ["POST"] } }] }] }"#,
        &[("foo/httpbin", SLEEP, 8080, false), ("foo/httpbin", SLEEP, 80, false)],
    ),
    (
        "TCP ports",
        r#"
  - name: tcp-policy
    namespace: foo
    selector: { matchLabels: { app: httpbin } }
    action: ALLOW
    rules: [{ to: [{ operation: { ports: ["9000", "9001"] } }] }]"#,
        &[
            ("foo/httpbin", SLEEP, 9000, true),
            ("foo/httpbin", NOBODY, 9001, true),
            ("foo/httpbin", SLEEP, 9002, false),
            ("foo/sleep", SLEEP, 9002, true),
        ],
    ),
    (
        "DENY comes before ALLOW",
        r#"
  - { name: allow, namespace: foo, rules: [{ to: [{ operation: { ports: ["9000"] } }] }] }
  - { name: deny, namespace: istio-system, action: DENY, rules: [{ from: [{ source: { namespaces: [dev] } }] }] }"#,
        &[("foo/httpbin", DEV, 9000, false), ("foo/httpbin", TEST, 9000, true), ("foo/httpbin", TEST, 9001, false)],
    ),
    (
        "any one ALLOW policy suffices",
        r"
  - { name: one, namespace: foo, rules: [{ from: [{ source: { namespaces: [test] } }] }] }
  - { name: two, namespace: foo, rules: [{ from: [{ source: { namespaces: [dev] } }] }] }",
        &[("foo/httpbin", DEV, 80, true), ("foo/httpbin", TEST, 80, true), ("foo/httpbin", SLEEP, 80, false)],
    ),
    (
        "plaintext has no principal: only mutual TLS",
        r#"
  - { name: mtls, namespace: foo, action: DENY, rules: [{ from: [{ source: { notPrincipals: ["*"] } }] }] }"#,
        &[("foo/httpbin", SLEEP, 80, true), ("foo/httpbin", NOBODY, 80, false)],
    ),
    (
        "fields of one source hold together",
        r#"
  - name: source
    namespace: foo
    rules: [{ from: [{ source: { namespaces: [prod, test], notIpBlocks: ["203.0.113.4"] } }] },
            { from: [{ source: { namespaces: [dev], notIpBlocks: ["10.9.9.0/24"] } }] }]"#,
        &[("foo/httpbin", TEST, 80, true), ("foo/httpbin", DEV, 80, false), ("foo/httpbin", NOBODY, 80, false)],
    ),
    (
        "exact, prefix, suffix and presence",
        r#"
  - name: strings
    namespace: foo
    rules:
    - { from: [{ source: { principals: ["cluster.local/ns/te*"] } }], to: [{ operation: { ports: ["1"] } }] }
    - { from: [{ source: { principals: ["*/sa/sleep"] } }], to: [{ operation: { ports: ["2"] } }] }
    - { from: [{ source: { principals: ["*"] } }], to: [{ operation: { ports: ["3"] } }] }
    - { from: [{ source: { namespaces: ["d*"] } }], to: [{ operation: { ports: ["4"] } }] }
    - { from: [{ source: { namespaces: ["*v"] } }], to: [{ operation: { ports: ["5"] } }] }"#,
        &[
            ("foo/httpbin", TEST, 1, true),
            ("foo/httpbin", SLEEP, 1, false),
            ("foo/httpbin", SLEEP, 2, true),
            ("foo/httpbin", TEST, 2, false),
            ("foo/httpbin", DEV, 3, true),
            ("foo/httpbin", NOBODY, 3, false),
            ("foo/httpbin", DEV, 4, true),
            ("foo/httpbin", SLEEP, 4, true),
            ("foo/httpbin", TEST, 4, false),
            ("foo/httpbin", DEV, 5, true),
            ("foo/httpbin", SLEEP, 5, false),
        ],
    ),
    (
        "service accounts: of the policy's namespace, or of the one that is named, in any trust domain",
        r#"
  - name: accounts
    namespace: foo
    rules: [{ from: [{ source: { serviceAccounts: ["sleep", "test/any"] } }] }]"#,
        &[
            ("foo/httpbin", Some(("foo", "sleep")), 80, true),
            ("foo/httpbin", TEST, 80, true),
            ("foo/httpbin", SLEEP, 80, false),
            ("foo/httpbin", DEV, 80, false),
        ],
    ),
    (
        "every condition must hold",
        r#"
  - name: conditions
    namespace: foo
    rules:
    - when:
      - { key: source.namespace, values: [dev, test], notValues: [dev] }
      - { key: destination.port, values: ["80", "81"] }
      - { key: destination.ip, values: ["10.0.0.0/24"] }
      - { key: source.ip, notValues: ["192.0.2.0/24"] }
      - { key: source.serviceAccount, values: [test/any] }
      - { key: source.principal, values: ["cluster.local/*"] }"#,
        &[("foo/httpbin", TEST, 80, true), ("foo/httpbin", DEV, 80, false), ("foo/httpbin", TEST, 82, false)],
    ),
    (
        "an external authorizer cannot be asked",
        "  - { name: ext, namespace: foo, action: CUSTOM, provider: { name: x }, rules: [{ to: [{ operation: { paths: [/admin] } }] }] }",
        &[("foo/httpbin", SLEEP, 80, false), ("bar/httpbin", SLEEP, 80, true)],
    ),
    (
        "AUDIT changes nothing",
        "  - { name: audit, namespace: foo, action: AUDIT, rules: [{}] }",
        &[("foo/httpbin", SLEEP, 80, true)],
    ),
];

#[test]
fn documented_examples() {
    for (name, policies, connections) in EXAMPLES {
        let snapshot = mesh(policies);
        for (workload, peer, port, expected) in *connections {
            let peer = peer.map(|(namespace, account)| id(namespace, account));
            let verdict = verdict(&snapshot, workload, peer.as_ref(), *port);
            assert_eq!(verdict.is_allowed(), *expected, "{name}: {peer:?} to {workload}:{port}: {}", verdict.decision);
            assert!(verdict.dry_run.is_none());
        }
    }
}

#[test]
fn dry_run_policies_only_report() {
    let snapshot = mesh(
        r"
  - { name: trial, namespace: foo, dryRun: true, action: DENY, rules: [{ from: [{ source: { namespaces: [dev] } }] }] }
  - { name: trial-allow, namespace: foo, dryRun: true, rules: [{ from: [{ source: { namespaces: [dev, test] } }] }] }
  - { name: trial-custom, namespace: bar, dryRun: true, action: CUSTOM }",
    );
    for (workload, peer, would) in [
        ("foo/httpbin", id("dev", "a"), "DENY policy foo/trial, rules[0]"),
        ("foo/httpbin", id("test", "a"), "ALLOW policy foo/trial-allow, rules[0]"),
        ("foo/httpbin", id("prod", "a"), "ALLOW policies select the workload and none of them matches"),
        ("bar/bare", id("prod", "a"), "policy bar/trial-custom cannot be evaluated, so it denies"),
    ] {
        let verdict = verdict(&snapshot, workload, Some(&peer), 80);
        assert!(verdict.is_allowed(), "{workload} {peer}");
        assert_eq!(verdict.dry_run.unwrap().to_string(), would);
    }
}
