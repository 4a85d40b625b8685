//! The objects are what Kubernetes takes: `helm lint`, and the schemas of several versions.

use anyhow::Result;

use crate::{
    cases,
    golden::MONITORING,
    helm::{Helm, validate},
};

#[test]
fn helm_finds_nothing_wrong() -> Result<()> {
    let helm = Helm::find()?;
    let directory = tempfile::tempdir()?;
    let mut cases = cases::all();
    cases.push(("monitoring".into(), MONITORING.into()));
    for (name, values) in cases {
        let file = directory.path().join(format!("{name}.yaml"));
        std::fs::write(&file, values)?;
        helm.lint(&[&format!("--values={}", file.display())])?;
    }
    Ok(())
}

/// Objects of all cases, as a version gets them.
fn valid_in(version: &str) -> Result<()> {
    let helm = Helm::find()?;
    let directory = tempfile::tempdir()?;
    let mut files = Vec::new();
    for (name, values) in cases::all() {
        let file = directory.path().join(format!("{name}.yaml"));
        std::fs::write(&file, helm.template_with(&values, &[&format!("--kube-version={version}.0")])?)?;
        files.push(file);
    }
    validate(version, &files)
}

/// The oldest that there are schemas of; a real API server takes objects of an older one (`tests/kubernetes`).
#[test]
fn objects_are_valid_in_1_25() -> Result<()> {
    valid_in("1.25")
}

#[test]
fn objects_are_valid_in_1_29() -> Result<()> {
    valid_in("1.29")
}

/// With the field for `AppArmor`, which came here.
#[test]
fn objects_are_valid_in_1_30() -> Result<()> {
    valid_in("1.30")
}

#[test]
fn objects_are_valid_in_1_37() -> Result<()> {
    valid_in("1.37")
}

/// The validator says no when it should.
#[test]
fn an_unknown_field_is_found() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("wrong.yaml");
    let rendered = Helm::find()?.template(&["--kube-version=1.33.0"])?;
    std::fs::write(&file, rendered.replacen("hostPID: true", "hostPIDS: true", 1))?;
    let error = validate("1.33", &[file]).expect_err("it is wrong").to_string();
    assert!(error.contains("hostPIDS"), "{error}");
    Ok(())
}
