//! The objects are what Kubernetes takes: `helm lint`, and the schemas of several versions.

use anyhow::Result;

use crate::{
    cases,
    helm::{Helm, validate},
};

/// The oldest and the newest that there are schemas of, and where fields that the chart uses came (1.30: AppArmor).
const VERSIONS: [&str; 5] = ["1.25", "1.29", "1.30", "1.33", "1.37"];

#[test]
fn helm_finds_nothing_wrong() -> Result<()> {
    let helm = Helm::find()?;
    let directory = tempfile::tempdir()?;
    let mut cases = cases::all();
    cases.push(("monitoring".into(), cases::MONITORING.into()));
    for (name, values) in cases {
        let file = directory.path().join(format!("{name}.yaml"));
        std::fs::write(&file, values)?;
        helm.lint(&[&format!("--values={}", file.display())])?;
    }
    Ok(())
}

#[test]
fn objects_are_valid_from_1_25_to_1_37() -> Result<()> {
    let helm = Helm::find()?;
    let directory = tempfile::tempdir()?;
    for version in VERSIONS {
        let mut files = Vec::new();
        for (name, values) in cases::all() {
            let file = directory.path().join(format!("{name}-{version}.yaml"));
            std::fs::write(&file, helm.template_with(&values, &[&format!("--kube-version={version}.0")])?)?;
            files.push(file);
        }
        validate(version, &files)?;
    }
    Ok(())
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
