//! Identities, policies and addresses that somebody chose to do harm.

use proptest::prelude::*;

use super::*;
use crate::mesh::{
    Action, Labels, MeshSettings, Policy, PolicyKey, Rule, Scope, SnapshotBuilder, Source, StringMatch, Values,
    Workload,
};

/// Past the file source's checks, as another source might bring it.
fn with_principals(action: Action, principals: Values<StringMatch>) -> Snapshot {
    let snapshot = mesh("  []");
    let workload = Workload::clone(snapshot.workload(&key("foo/httpbin")).unwrap());
    let mut builder = SnapshotBuilder::new("node-a", snapshot.trust_domain, MeshSettings::default());
    builder.workload(workload).unwrap();
    let source = Source { principals: principals.clone(), ..Source::default() };
    let namespaces = Source { namespaces: principals, ..Source::default() };
    let policy = Policy {
        key: PolicyKey { namespace: "foo".into(), name: "p".into() },
        scope: Scope::Mesh,
        selector: Labels::default(),
        action,
        dry_run: false,
        rules: vec![Rule { from: vec![source, namespaces], ..Rule::default() }],
        invalid: None,
    };
    builder.policy(policy).unwrap();
    builder.build()
}

fn strings() -> Vec<String> {
    let mut strings: Vec<String> = [
        "",
        "\0",
        "cluster.local/ns/default/sa/sleep\0",
        "cluster.local/ns/default/sa/sleep\n",
        "CLUSTER.LOCAL/ns/default/sa/sleep",
        "cluster.local/ns/default/sa/ѕleep",
        "cluster.local/ns/default/sa/sleep/",
        "spiffe://cluster.local/ns/default/sa/sleep",
        "//cluster.local/ns/default/sa/sleep",
        "cluster.local/ns/default/sa/sl**p",
        "**",
        "default*sleep*",
        "\u{202e}peels",
        "e\u{301}",
        "deƒault",
        "*default*",
    ]
    .map(str::to_owned)
    .into();
    strings.push("a".repeat(64 * 1024));
    strings.push(format!("{}*", "cluster.local/".repeat(5000)));
    strings.push(format!("*{}", "é".repeat(32 * 1024)));
    strings
}

#[test]
fn strings_that_look_like_an_identity_match_none() {
    let peer = id("default", "sleep");
    for text in strings() {
        let only = |matches: Vec<StringMatch>| Values { any_of: matches, none_of: Vec::new() };
        let pattern = StringMatch::parse(&text);
        let short: String = text.chars().take(40).collect();
        let allow = with_principals(Action::Allow, only(vec![pattern.clone()]));
        assert!(!verdict(&allow, "foo/httpbin", Some(&peer), 80).is_allowed(), "{short:?}");
        assert!(!verdict(&allow, "foo/httpbin", None, 80).is_allowed(), "{short:?}");
        let deny_others = with_principals(Action::Deny, Values { any_of: Vec::new(), none_of: vec![pattern] });
        assert!(!verdict(&deny_others, "foo/httpbin", Some(&peer), 80).is_allowed(), "{short:?}");
        assert!(!verdict(&deny_others, "foo/httpbin", None, 80).is_allowed(), "{short:?}");
    }
}

/// Empty prefixes and suffixes come from control planes only: they match any identity, and no plaintext.
#[test]
fn an_absent_identity_matches_no_string() {
    for pattern in [
        StringMatch::Exact("".into()),
        StringMatch::Prefix("".into()),
        StringMatch::Suffix("".into()),
        StringMatch::Present,
    ] {
        let exact = matches!(pattern, StringMatch::Exact(_));
        let snapshot = with_principals(Action::Allow, Values { any_of: vec![pattern], none_of: Vec::new() });
        assert!(!verdict(&snapshot, "foo/httpbin", None, 80).is_allowed());
        assert_eq!(verdict(&snapshot, "foo/httpbin", Some(&id("default", "sleep")), 80).is_allowed(), !exact);
    }
}

#[test]
fn both_spellings_of_an_address_are_one() {
    let snapshot = mesh(
        r#"
  - { name: v4, namespace: foo, rules: [{ from: [{ source: { ipBlocks: ["10.9.9.0/24"] } }], to: [{ operation: { ports: ["4"] } }] }] }
  - { name: mapped, namespace: foo, rules: [{ from: [{ source: { ipBlocks: ["::ffff:10.9.9.0/120"] } }], to: [{ operation: { ports: ["5"] } }] }] }
  - { name: v6, namespace: foo, rules: [{ from: [{ source: { ipBlocks: ["::/0"] } }], to: [{ operation: { ports: ["6"] } }] }] }
  - { name: all4, namespace: foo, rules: [{ from: [{ source: { ipBlocks: ["0.0.0.0/0"] } }], to: [{ operation: { ports: ["7"] } }] }] }
  - { name: to, namespace: foo, rules: [{ when: [{ key: destination.ip, values: ["::ffff:10.0.0.1"] }, { key: destination.port, values: ["8"] }] }] }"#,
    );
    let node = NodePolicies::compile(&snapshot);
    let set = node.of(&key("foo/httpbin")).unwrap();
    let allowed = |source: &str, destination: &str| {
        set.evaluate(&Request { peer: None, source: ip(source), destination: destination.parse().unwrap() })
            .is_allowed()
    };
    for (source, port, expected) in [
        ("10.9.9.1", 4, true),
        ("::ffff:10.9.9.1", 4, true),
        ("::10.9.9.1", 4, false),
        ("10.9.9.1", 5, true),
        ("::ffff:10.9.9.1", 5, true),
        ("10.9.8.1", 5, false),
        ("10.9.9.1", 6, false),
        ("::ffff:10.9.9.1", 6, false),
        ("2001:db8::1", 6, true),
        ("::10.9.9.1", 6, true),
        ("::ffff:10.9.9.1", 7, true),
        ("2001:db8::1", 7, false),
        ("2001:db8::1", 8, true),
    ] {
        assert_eq!(allowed(source, &format!("10.0.0.1:{port}")), expected, "{source} port {port}");
        assert_eq!(allowed(source, &format!("[::ffff:10.0.0.1]:{port}")), expected, "{source} port {port}, mapped");
    }
    assert!(!allowed("2001:db8::1", "[fd00::1]:8"));
}

/// A thousand prefixes of one another, and a thousand networks around one another, are all found.
#[test]
fn deep_nesting() {
    let base = format!("cluster.local/ns/{}", "a".repeat(253));
    let prefixes = (1..=base.len()).map(|n| StringMatch::Prefix(base[..n].into())).collect();
    let snapshot = with_principals(Action::Allow, Values { any_of: prefixes, none_of: Vec::new() });
    assert!(verdict(&snapshot, "foo/httpbin", Some(&id(&"a".repeat(253), "x")), 80).is_allowed());
    let other = SpiffeId::new("other".parse().unwrap(), "b", "x").unwrap();
    assert!(!verdict(&snapshot, "foo/httpbin", Some(&other), 80).is_allowed());
}

proptest! {
    /// No string in a policy makes evaluation panic, and the table agrees with the rule read literally.
    #[test]
    fn any_string(texts in prop::collection::vec("\\PC{0,30}|[a-z/*.]{0,12}", 1..20), wanted: bool) {
        let patterns: Vec<_> = texts.iter().map(|t| StringMatch::parse(t)).collect();
        let peer = id("default", "sleep");
        let literally = patterns.iter().any(|p| p.matches("cluster.local/ns/default/sa/sleep"))
            || patterns.iter().any(|p| p.matches("default"));
        let both_excluded = patterns.iter().any(|p| p.matches("cluster.local/ns/default/sa/sleep"))
            && patterns.iter().any(|p| p.matches("default"));
        let values = if wanted {
            Values { any_of: patterns, none_of: Vec::new() }
        } else {
            Values { any_of: Vec::new(), none_of: patterns }
        };
        let allowed = verdict(&with_principals(Action::Allow, values), "foo/httpbin", Some(&peer), 80).is_allowed();
        prop_assert_eq!(allowed, if wanted { literally } else { !both_excluded });
    }
}
