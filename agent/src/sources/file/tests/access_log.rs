//! What the access log says.

use super::{super::parse, BASE, unmarked};
use crate::mesh::{AccessLogRule, AccessLogSettings};

/// The base with a section `accessLog`, before the workloads.
fn with(section: &str) -> String {
    BASE.replace("workloads:\n", &format!("accessLog: {section}\nworkloads:\n"))
}

fn settings(text: &str) -> AccessLogSettings {
    parse("n.yaml", text).unwrap().snapshot.settings.access_log
}

/// `@` marks where the message must point.
fn refused(section: &str, expected: &str) {
    let (text, place) = unmarked(&with(section));
    assert_eq!(parse("n.yaml", &text).expect_err("must be refused").0, format!("{place}{expected}"), "{section}");
}

#[test]
fn nothing_is_said_by_default() {
    assert_eq!(settings(BASE), AccessLogSettings::default());
    assert_eq!(AccessLogSettings::default().of("default"), AccessLogRule { enabled: None, sample_ppm: None });
}

#[test]
fn a_namespace_has_its_own_rule_and_the_default_for_what_it_leaves_out() {
    let all = settings(&with(
        "{ enabled: true, sample: 0.1, namespaces: [{ name: noisy, enabled: false }, { name: busy, sample: 0.001 }] }",
    ));
    let rule = |enabled, ppm| AccessLogRule { enabled: Some(enabled), sample_ppm: Some(ppm) };
    assert_eq!(all.of("default"), rule(true, 100_000));
    assert_eq!(all.of("noisy"), rule(false, 100_000));
    assert_eq!(all.of("busy"), rule(true, 1_000));
    for (text, ppm) in [("0", 0), ("1", 1_000_000), ("1.0", 1_000_000)] {
        assert_eq!(settings(&with(&format!("{{ sample: {text} }}"))).of("a").sample_ppm, Some(ppm), "{text}");
    }
}

#[test]
fn what_is_no_share_is_refused() {
    let remedy = "is no share of the connections; write a number from 0 (none) to 1 (all)";
    refused("{ sample: @1.5 }", &format!("accessLog.sample: 1.5 {remedy}"));
    refused("{ sample: @-0.1 }", &format!("accessLog.sample: -0.1 {remedy}"));
    refused("{ sample: @.nan }", &format!("accessLog.sample: NaN {remedy}"));
    refused("{ namespaces: [{ name: a, sample: @2 }] }", &format!("accessLog.namespaces[0].sample: 2 {remedy}"));
    refused(
        "{ namespaces: [{ name: a }, { name: @a }] }",
        "accessLog.namespaces[1].name: namespace a is listed twice; remove one",
    );
}
