//! What holds for everything that is printed.

use std::{
    fmt::Debug,
    time::{Duration, SystemTime},
};

use serde_json::Value;

use super::samples::{HOSTILE, a_report, a_status, connections, explanations, policies, services, workloads};
use crate::{
    admin::{
        api::{Closed, Connections},
        inventory::{Services, Workloads},
    },
    cli::{
        certificates,
        output::{Columns, Format, OutputArgs, Style, View, age, bytes, shown},
    },
    policy::{Explanations, PolicyList},
    relay::ConnectionId,
    telemetry::logging::hidden,
};

/// Every view with `name` wherever a name of somebody else goes.
fn all(name: &str) -> Vec<Box<dyn Rendered>> {
    vec![
        Box::new(a_status(name)),
        Box::new(workloads(name)),
        Box::new(services(name)),
        Box::new(policies(name)),
        Box::new(explanations(name)),
        Box::new(a_report(name)),
        Box::new(connections(name)),
    ]
}

/// [`View`] as an object.
trait Rendered {
    fn rendered(&self, format: Format) -> String;
}

impl<V: View> Rendered for V {
    fn rendered(&self, output: Format) -> String {
        OutputArgs { output, no_headers: false }.render(self, false).unwrap()
    }
}

#[test]
fn nothing_is_said_in_words() {
    assert_eq!(Connections { total: 0, connections: vec![] }.table(Style::TABLE), "no connections");
    assert!(PolicyList { policies: vec![] }.table(Style::TABLE).starts_with("no policies: "));
    assert!(Workloads { total: 0, workloads: vec![] }.table(Style::TABLE).starts_with("no workloads: "));
    assert!(Services { total: 0, services: vec![] }.table(Style::TABLE).starts_with("no services: "));
    assert_eq!(Closed { closed: ConnectionId(7) }.table(Style::TABLE), "connection 7 is being reset");
}

#[test]
fn problems_name_what_is_wrong_and_only_that() {
    fn check(problems: &[String], expected: &[&str]) {
        assert_eq!(problems.len(), expected.len(), "{problems:#?}");
        for (problem, part) in problems.iter().zip(expected) {
            assert!(problem.contains(part), "{part:?} in {problem:?}");
        }
    }
    let name = "shop/other";
    check(
        &a_status(name).problems(),
        &[
            "not accepted",
            "shop/other is not enrolled: port 15008",
            "pods are in it",
            "whoever uses 10.0.0.1, fd00::1, NodePort clients among them",
            "shop/web has plaintext connections that its mode forbids; ending them failed 3 times: no descriptors",
        ],
    );
    check(&workloads(name).problems(), &["shop/other is not enrolled: the namespace", "shop/web is not enrolled yet"]);
    check(&services(name).problems(), &["shop/gone has no endpoint"]);
    check(&policies(name).problems(), &["a/two lets in less", "a/three refuses everything"]);
    check(&a_report(name).problems(), &["/sa/client has no valid certificate"]);
    let soon = certificates::Report { expires_within: Duration::from_hours(2), ..a_report(name) };
    check(&soon.problems(), &["/sa/web ends at", "/sa/client"]);
    let late = SystemTime::UNIX_EPOCH + Duration::from_hours(500_003);
    check(&certificates::Report { now: late, ..a_report(name) }.problems(), &["/sa/web ends at", "/sa/client"]);
    assert!(connections(name).problems().is_empty());
}

fn safe(what: &impl Debug, text: &str) {
    assert!(!text.chars().any(|c| c != '\n' && hidden(c)), "{what:?}: {text:?}");
}

#[test]
fn hostile_names_move_no_cursor_and_forge_no_line() {
    for (view, harmless) in all(HOSTILE).into_iter().zip(all("x")) {
        for format in [Format::Table, Format::Wide, Format::Json, Format::Yaml] {
            safe(&format, &view.rendered(format));
        }
        for format in [Format::Table, Format::Wide] {
            let lines = |text: String| text.lines().count();
            assert_eq!(lines(view.rendered(format)), lines(harmless.rendered(format)), "{}", view.rendered(format));
        }
        // Scripts get the name as it is.
        let json: Value = serde_json::from_str(&view.rendered(Format::Json)).unwrap();
        let yaml: Value = serde_saphyr::from_str(&view.rendered(Format::Yaml)).unwrap();
        assert!(contains(&json, HOSTILE), "{json}");
        assert!(contains(&yaml, HOSTILE), "{yaml}");
    }
}

fn contains(value: &Value, text: &str) -> bool {
    match value {
        Value::String(s) => s.contains(text),
        Value::Array(all) => all.iter().any(|v| contains(v, text)),
        Value::Object(all) => all.values().any(|v| contains(v, text)),
        _ => false,
    }
}

#[test]
fn very_long_names_are_cut_in_tables_only() {
    for name in ["x".repeat(64 * 1024), HOSTILE.repeat(2048), "\u{1f512}".repeat(64 * 1024)] {
        for view in all(&name) {
            for format in [Format::Table, Format::Wide] {
                let text = view.rendered(format);
                safe(&format, &text);
                // A few long cells in a line, of four bytes for a character.
                assert!(text.len() < 200_000, "{} bytes", text.len());
                assert!(text.contains('…'), "{text:.200}");
            }
            let json: Value = serde_json::from_str(&view.rendered(Format::Json)).unwrap();
            assert!(contains(&json, &name));
        }
    }
    assert_eq!(shown("harmless"), "harmless");
    assert_eq!(shown(&"\u{1b}".repeat(600)).chars().count(), 512);
}

/// YAML that would need escapes is written as JSON, which is YAML, too.
#[test]
fn yaml_is_readable_where_it_can_be() {
    let plain = policies("x").rendered(Format::Yaml);
    assert!(plain.starts_with("policies:\n"), "{plain}");
}

#[test]
fn series_can_be_told_apart() {
    let args = |output| OutputArgs { output, no_headers: true };
    let json = args(Format::Json).render(&services("x"), true).unwrap();
    assert_eq!(json.lines().count(), 1, "{json}");
    let yaml = args(Format::Yaml).render(&services("x"), true).unwrap();
    assert!(yaml.starts_with("---\ntotal: 2\nservices:\n"), "{yaml}");
    let table = args(Format::Table).render(&services("x"), true).unwrap();
    assert!(table.starts_with("shop/web"), "no headings: {table}");
}

#[test]
fn numbers_are_readable() {
    for (n, expected) in [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (u64::MAX, "16.0 EiB"),
    ] {
        assert_eq!(bytes(n), expected);
    }
    for (seconds, expected) in [(0.4, "0s"), (59.9, "59s"), (3725.0, "1h 2m"), (-1.0, "0s"), (f64::NAN, "0s")] {
        assert_eq!(age(seconds), expected);
    }
}

#[test]
fn columns_line_up_and_wide_ones_are_left_out() {
    let mut columns = Columns::new(Style::TABLE, &["A", "B"], &["C"]);
    columns.row([HOSTILE, "x", "wide"]);
    columns.row(["y", "", "wide"]);
    let text = columns.text();
    assert_eq!(text.lines().count(), 3, "{text}");
    assert!(text.starts_with('A') && !text.contains("wide") && !text.contains('C'), "{text:?}");
    assert!(text.lines().all(|l| l == l.trim_end()), "{text:?}");
}

#[test]
fn reports_as_documents() {
    let report = a_status(HOSTILE);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!((&json["data_path"], &json["pods"][1]["state"]), (&"user".into(), &"refused".into()));
    assert_eq!(json["counters"]["agent"]["refused"]["not-tls"], 3);
    let certificates = serde_json::to_value(a_report("x")).unwrap();
    assert_eq!(certificates["certificates"][0]["certificate"]["serial"], "4a2f");
    assert!(certificates.get("now").is_none(), "{certificates}");
    let json: Explanations = serde_json::from_str(&explanations("x").rendered(Format::Json)).unwrap();
    assert_eq!(json, explanations("x"));
}
