//! `policies` and `labels` of the document.

use proptest::prelude::*;

use super::{super::parse, BASE, unmarked};
use crate::mesh::{
    Action, Condition, Operation, Policy, PolicyKey, PolicyStatus, Scope, ServiceAccount, Snapshot, Source,
    StringMatch, Values,
};

fn parsed(policies: &str) -> Snapshot {
    parse("n.yaml", &format!("{BASE}policies:\n{policies}")).unwrap_or_else(|e| panic!("{e}")).snapshot
}

fn policy(policies: &str, name: &str) -> Policy {
    let key = PolicyKey { namespace: "default".into(), name: name.into() };
    Policy::clone(parsed(policies).policy(&key).expect("the policy"))
}

/// `(a policy, the message)`. `@` marks where the message must point.
fn refused(cases: &[(&str, &str)]) {
    for (policy, expected) in cases {
        let (text, place) = unmarked(&format!("{BASE}policies:\n{policy}\n"));
        match parse("n.yaml", &text) {
            Ok(_) => panic!("{policy} must be refused: {expected}"),
            Err(e) => assert_eq!(e.0, format!("{place}{expected}"), "{policy}"),
        }
    }
}

#[test]
fn defaults() {
    let policy = policy("  - { name: p, namespace: default }", "p");
    assert_eq!((policy.action, policy.dry_run, policy.scope), (Action::Allow, false, Scope::Namespace));
    assert!(policy.rules.is_empty() && policy.selector.0.is_empty());
    assert_eq!(policy.status(), PolicyStatus::Active);
}

#[test]
fn the_root_namespace() {
    let scope = |snapshot: &Snapshot, namespace: &str| {
        snapshot.policy(&PolicyKey { namespace: namespace.into(), name: "p".into() }).unwrap().scope
    };
    let both = "  - { name: p, namespace: istio-system }\n  - { name: p, namespace: mesh }\n";
    let snapshot = parsed(both);
    assert_eq!((scope(&snapshot, "istio-system"), scope(&snapshot, "mesh")), (Scope::Mesh, Scope::Namespace));
    let text = format!("{BASE}policies:\n{both}").replace("  mode: strict\n", "  rootNamespace: mesh\n");
    let snapshot = parse("n.yaml", &text).unwrap().snapshot;
    assert_eq!((scope(&snapshot, "istio-system"), scope(&snapshot, "mesh")), (Scope::Namespace, Scope::Mesh));
}

fn any_of<T>(any_of: Vec<T>) -> Values<T> {
    Values { any_of, none_of: Vec::new() }
}

#[test]
fn every_field() {
    let text = r#"
  - name: p
    namespace: default
    action: DENY
    dryRun: true
    selector: { matchLabels: { app: web, app.kubernetes.io/name: "1" } }
    rules:
      - from:
          - source: { principals: [td/ns/a/sa/b, "td/*", "*/sa/b", "*"], notNamespaces: [a, "a*", "*b"] }
          - source: { serviceAccounts: [a/b, c], ipBlocks: [10.0.0.1, 10.1.2.3/16, "::ffff:10.0.0.0/104", "fd00::1/64"] }
        to:
          - operation: { ports: ["80", 81], notPorts: [82] }
        when:
          - { key: source.ip, notValues: [192.0.2.0/24] }
          - { key: destination.port, values: ["80"] }
"#;
    let policy = policy(text, "p");
    assert_eq!((policy.action, policy.dry_run, policy.selector.0.len()), (Action::Deny, true, 2));
    let exact = |s: &str| StringMatch::Exact(s.into());
    let nets = |list: &[&str]| list.iter().map(|n| n.parse().unwrap()).collect::<Vec<ipnet::IpNet>>();
    let accounts = [("a", "b"), ("default", "c")];
    let accounts = accounts.map(|(ns, name)| ServiceAccount { namespace: ns.into(), name: name.into() });
    let [rule] = &policy.rules[..] else { panic!("one rule") };
    assert_eq!(
        rule.from,
        [
            Source {
                principals: any_of(vec![
                    exact("td/ns/a/sa/b"),
                    StringMatch::Prefix("td/".into()),
                    StringMatch::Suffix("/sa/b".into()),
                    StringMatch::Present
                ]),
                namespaces: Values {
                    any_of: Vec::new(),
                    none_of: vec![exact("a"), StringMatch::Prefix("a".into()), StringMatch::Suffix("b".into())]
                },
                ..Source::default()
            },
            Source {
                service_accounts: any_of(accounts.to_vec()),
                ip_blocks: any_of(nets(&["10.0.0.1/32", "10.1.0.0/16", "10.0.0.0/8", "fd00::/64"])),
                ..Source::default()
            },
        ]
    );
    assert_eq!(rule.to, [Operation { ports: Values { any_of: vec![80, 81], none_of: vec![82] } }]);
    assert_eq!(
        rule.when,
        [
            Condition::SourceIp(Values { any_of: Vec::new(), none_of: nets(&["192.0.2.0/24"]) }),
            Condition::DestinationPort(any_of(vec![80])),
        ]
    );
    assert_eq!(policy.status(), PolicyStatus::Active);
}

#[test]
fn what_is_correct_but_cannot_be_honoured_has_a_status() {
    let text = r#"
  - name: http
    namespace: default
    rules:
      - from: [{ source: { requestPrincipals: ["*"] } }]
        to: [{ operation: { paths: [/x], notMethods: [GET], ports: ["80"] } }]
        when: [{ key: "request.headers[x]", values: [y] }, { key: remote.ip, notValues: [10.0.0.1] }]
      - {}
  - { name: audit, namespace: default, action: AUDIT, rules: [{}] }
  - { name: custom, namespace: default, action: CUSTOM, provider: { name: x }, rules: [{}] }
"#;
    let ignored = ["notMethods", "paths", "remote.ip", "request.headers", "requestPrincipals"];
    let http = policy(text, "http");
    assert_eq!(http.status(), PolicyStatus::Partial { ignored: ignored.map(str::to_owned).to_vec() });
    assert_eq!((http.rules[0].unsupported.len(), http.rules[1].unsupported.len()), (5, 0));
    assert_eq!(policy(text, "audit").status(), PolicyStatus::Partial { ignored: vec!["action AUDIT".to_owned()] });
    assert!(matches!(policy(text, "custom").status(), PolicyStatus::Invalid { .. }));
}

#[test]
fn shapes() {
    refused(&[
        (
            "  - { name: p, namespace: a, @actions: DENY }",
            r#"policies[0].actions: unknown field "actions"; known here: name, namespace, dryRun, selector, action, provider, rules"#,
        ),
        (
            "  - { name: p, namespace: a, action: @deny }",
            r#"policies[0].action: "deny" is not accepted; write: ALLOW, DENY, AUDIT, CUSTOM"#,
        ),
        (
            "  - { name: p, namespace: a, rules: [{ from: [{ @principals: [x] }] }] }",
            r#"policies[0].rules[0].from[0].principals: unknown field "principals"; known here: source"#,
        ),
        (
            "  - { name: p, namespace: a, rules: [{ to: [{ operation: { @port: [x] } }] }] }",
            r#"policies[0].rules[0].to[0].operation.port: unknown field "port"; known here: ports, notPorts, hosts, notHosts, methods, notMethods, paths, notPaths"#,
        ),
        (
            "  - { name: p, namespace: a, rules: [{ from: [{ source: { namespaces: @x } }] }] }",
            "policies[0].rules[0].from[0].source.namespaces: a list, like [a, b], is expected here; see docs/configuration.md",
        ),
        (
            "  - { name: p, namespace: a }\n  - { name: @p, namespace: a }",
            "policies[1].name: policy a/p is defined twice; give one of them another name or namespace",
        ),
        (
            "  - { name: @P, namespace: a }",
            r#"policies[0].name: name "P" must be an RFC 1123 name: a-z, 0-9, '-' and '.', starting and ending with a letter or digit"#,
        ),
        (
            "  - { name: p, namespace: a, provider: @{ name: x } }",
            "policies[0].provider: a provider goes with action CUSTOM, and the action is ALLOW; remove it",
        ),
        (
            "  - { name: p, namespace: a, selector: { matchLabels: { app: @web* } } }",
            r#"policies[0].selector.matchLabels."app": "web*" is no label's value; write up to 63 letters, digits, '-', '_' and '.' (no wildcards), starting and ending with a letter or digit"#,
        ),
        (
            "  - { name: p, namespace: a, selector: { matchLabels: { \"a b\": @web } } }",
            r#"policies[0].selector.matchLabels."a b": "a b" is no label; write NAME or PREFIX/NAME with 1 to 63 letters, digits, '-', '_' and '.' in NAME"#,
        ),
    ]);
}

const EMPTY: &str =
    "the list is empty, which would mean that anything matches; list at least one value, or remove the field";

#[test]
fn nothing_that_would_match_anything_by_mistake() {
    for (rule, field) in [
        ("{ from: @[] }", "from"),
        ("{ to: @[] }", "to"),
        ("{ when: @[] }", "when"),
        ("{ from: [{ source: { principals: @[] } }] }", "from[0].source.principals"),
        ("{ from: [{ source: { namespaces: [a], notIpBlocks: @[] } }] }", "from[0].source.notIpBlocks"),
        ("{ to: [{ operation: { methods: @[] } }] }", "to[0].operation.methods"),
        ("{ when: [{ key: source.ip, values: @[] }] }", "when[0].values"),
    ] {
        let policy = format!("  - {{ name: p, namespace: a, rules: [{rule}] }}");
        refused(&[(&policy, &format!("policies[0].rules[0].{field}: {EMPTY}"))]);
    }
    refused(&[
        (
            "  - { name: p, namespace: a, rules: [{ from: [{ source: @{} }] }] }",
            "policies[0].rules[0].from[0].source: the source has no field; give it one, like principals or namespaces, or remove from",
        ),
        (
            "  - { name: p, namespace: a, rules: [{ to: [{ operation: @{} }] }] }",
            "policies[0].rules[0].to[0].operation: the operation has no field; give it ports or notPorts, or remove to",
        ),
        (
            "  - { name: p, namespace: a, rules: [{ when: [{ key: @source.ip }] }] }",
            "policies[0].rules[0].when[0]: the condition has neither values nor notValues; give it one of them",
        ),
        (
            "  - { name: p, namespace: a, rules: [{ from: [{ source: { namespaces: [@\"\"] } }] }] }",
            "policies[0].rules[0].from[0].source.namespaces[0]: the value is empty; write one, or remove it from the list",
        ),
    ]);
}

#[test]
fn nothing_that_would_never_match() {
    let source = |field: &str, value: &str, problem: &str| {
        let policy =
            format!("  - {{ name: p, namespace: a, rules: [{{ from: [{{ source: {{ {field}: [@{value}] }} }}] }}] }}");
        refused(&[(&policy, &format!("policies[0].rules[0].from[0].source.{field}[0]: {problem}"))]);
    };
    source(
        "principals",
        "spiffe://td/ns/a/sa/b",
        r#""spiffe://td/ns/a/sa/b" has spiffe:// before it; write it without"#,
    );
    source(
        "notPrincipals",
        "td/ns/a",
        r#""td/ns/a" is no principal; write TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT, or put * at its beginning or end"#,
    );
    let star = "would never match: only one * is special, at the beginning or at the end; write several values instead";
    source("principals", "td/ns/team-*/sa/*", &format!(r#""td/ns/team-*/sa/*" {star}"#));
    source("principals", "\"*/ns/*\"", &format!(r#""*/ns/*" {star}"#));
    source("namespaces", "\"a*b\"", &format!(r#""a*b" {star}"#));
    let character = "would never match: it has a character that no identity has; correct it";
    source("principals", "\"td/ns/\\u001b*\"", &format!(r#""td/ns/\u{{1b}}*" {character}"#));
    source("principals", "\"td/ns/ä*\"", &format!(r#""td/ns/ä*" {character}"#));
    source("namespaces", "A", &format!(r#""A" {character}"#));
    let long = "a".repeat(64 * 1024);
    source(
        "namespaces",
        &long,
        &format!(
            r#"namespace "{}..." must be an RFC 1123 name: a-z, 0-9, '-' and '.', starting and ending with a letter or digit"#,
            &long[..77]
        ),
    );
    source(
        "serviceAccounts",
        "\"a/*\"",
        r#""a/*" is no service account; write NAMESPACE/NAME, or NAME for one in namespace a, without wildcards"#,
    );
    let block = "is no address and no network; write one like 10.0.0.1, 10.0.0.0/16 or \"fd00::/64\"";
    source("ipBlocks", "10.0.0.0/33", &format!(r#""10.0.0.0/33" {block}"#));
    source("notIpBlocks", "10.0.0", &format!(r#""10.0.0" {block}"#));
    for port in ["0", "65536", "-1", "http", "\"+80\"", "\"80 \""] {
        let policy =
            format!("  - {{ name: p, namespace: a, rules: [{{ to: [{{ operation: {{ ports: [@{port}] }} }}] }}] }}");
        let text = port.trim_matches('"');
        let problem = format!(
            "policies[0].rules[0].to[0].operation.ports[0]: \"{text}\" is no port; write a whole number from 1 to 65535"
        );
        refused(&[(&policy, &problem)]);
    }
    refused(&[(
        "  - { name: p, namespace: a, rules: [{ when: [{ key: @source.labels, values: [x] }] }] }",
        r#"policies[0].rules[0].when[0].key: "source.labels" is no condition; write one of source.ip, source.namespace, source.principal, source.serviceAccount, destination.ip, destination.port"#,
    )]);
}

const POLICY: &str = r#"policies:
  - name: p
    namespace: default
    action: DENY
    selector: { matchLabels: { app: web } }
    rules:
    - from: [{ source: { principals: ["td/ns/a/sa/b", "*"], notIpBlocks: ["10.0.0.0/8"] } }]
      to: [{ operation: { ports: ["80"], paths: [/x] } }]
      when: [{ key: source.namespace, values: ["a*"] }]
"#;

proptest! {
    /// Whatever is typed, the answer is a model or a message; never a panic, never an unbounded message.
    #[test]
    fn one_changed_place_never_panics(at in 0..POLICY.len(), cut in 0_usize..8, put in "[ -~\u{e9}\n\u{0}]{0,8}") {
        let mut text = POLICY.as_bytes()[..at].to_vec();
        text.extend_from_slice(put.as_bytes());
        text.extend_from_slice(&POLICY.as_bytes()[(at + cut).min(POLICY.len())..]);
        let text = format!("{BASE}{}", String::from_utf8_lossy(&text));
        if let Err(e) = parse("n.yaml", &text) {
            prop_assert!(e.0.starts_with("n.yaml"), "{e}");
            prop_assert!(e.0.len() < 2000 && !e.0.chars().any(char::is_control), "{e:?}");
        }
    }
}
