//! All that the chart renders, word by word. `UPDATE_EXPECT=1` writes it anew; look at the difference before you commit it.

use anyhow::Result;
use expect_test::{ExpectFile, expect_file};

use crate::{
    cases,
    helm::{Helm, NEWEST},
};

/// Objects of the Prometheus operator, which is not everywhere.
pub const MONITORING: &str = "
monitoring:
  serviceMonitor: { enabled: true, interval: 15s, labels: { release: prometheus } }
  prometheusRule: { enabled: true, labels: { release: prometheus } }
  dashboard: { enabled: true, labels: { grafana: here } }
";

fn same(values: &str, arguments: &[&str], expected: &ExpectFile) -> Result<()> {
    let rendered = Helm::find()?.template_with(values, arguments)?;
    // Editors and git take blanks at the ends of lines away; YAML does not mean anything by them here.
    let lines: String = rendered.lines().flat_map(|line| [line.trim_end(), "\n"]).collect();
    expected.assert_eq(&lines);
    Ok(())
}

#[test]
fn default() -> Result<()> {
    same(cases::DEFAULT, &[NEWEST], &expect_file!["golden/default.yaml"])
}

#[test]
fn demo() -> Result<()> {
    same(cases::DEMO, &[NEWEST], &expect_file!["golden/demo.yaml"])
}

#[test]
fn hardened() -> Result<()> {
    same(cases::HARDENED, &[NEWEST], &expect_file!["golden/hardened.yaml"])
}

#[test]
fn external_authority() -> Result<()> {
    same(cases::EXTERNAL, &[NEWEST], &expect_file!["golden/external.yaml"])
}

#[test]
fn everything() -> Result<()> {
    same(cases::EVERYTHING, &[NEWEST], &expect_file!["golden/everything.yaml"])
}

/// Without the fields that came later.
#[test]
fn oldest_kubernetes() -> Result<()> {
    let values = format!("{}{}", cases::HARDENED, MONITORING);
    let kinds = ["agent/daemonset.yaml", "ca/deployment.yaml", "monitoring/monitors.yaml", "monitoring/rules.yaml"];
    let only = kinds.map(|file| format!("--show-only=templates/{file}"));
    let mut arguments = vec!["--kube-version=1.20.2"];
    arguments.extend(only.iter().map(String::as_str));
    same(&values, &arguments, &expect_file!["golden/oldest.yaml"])
}
