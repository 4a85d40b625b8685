//! Helm over the chart in this repository.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use testbed::{Process, kube::Parts};

/// How long Helm or the validator may take: seconds, but other tests want the processors, too.
const WITHIN: Duration = Duration::from_mins(3);
/// The newest version whose objects the golden files show.
pub const NEWEST: &str = "--kube-version=1.33.0";

/// Helm with directories of its own. They are removed when it goes out of scope.
pub struct Helm {
    program: PathBuf,
    home: tempfile::TempDir,
}

impl Helm {
    pub fn find() -> Result<Self> {
        let program = Parts::unchecked()?.program("helm").context("get it with `cargo xtask cluster parts --chart`")?;
        Ok(Self { program, home: tempfile::tempdir()? })
    }

    /// The objects of release `underpass` in namespace `underpass-system`, as YAML.
    pub fn template(&self, arguments: &[&str]) -> Result<String> {
        self.run(&[&["template", "underpass", ".", "--namespace=underpass-system"], arguments].concat())?.success()
    }

    /// The same with values in a file.
    pub fn template_with(&self, values: &str, arguments: &[&str]) -> Result<String> {
        let file = self.home.path().join("values.yaml");
        std::fs::write(&file, values)?;
        let values = format!("--values={}", file.display());
        self.template(&[&[values.as_str()], arguments].concat())
    }

    /// What Helm says of values that it has to refuse.
    pub fn refusal(&self, arguments: &[&str]) -> Result<String> {
        let output = self.run(&[&["template", "underpass", "."], arguments].concat())?;
        ensure!(!output.status.success(), "{arguments:?} is not refused");
        Ok(output.stderr)
    }

    pub fn lint(&self, arguments: &[&str]) -> Result<String> {
        self.run(&[&["lint", "--strict", "."], arguments].concat())?.success()
    }

    fn run(&self, arguments: &[&str]) -> Result<testbed::Output> {
        let mut command = Command::new(&self.program);
        for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(variable, self.home.path());
        }
        // No cluster that the user has: templates look nothing up.
        command.env("KUBECONFIG", "/dev/null").current_dir(chart()).args(arguments);
        Process::spawn(&mut command)?.output(WITHIN)
    }
}

/// Checks files with objects against the schemas of a version such as `1.33`.
pub fn validate(version: &str, files: &[PathBuf]) -> Result<()> {
    let packages = Parts::unchecked()?.validator()?;
    let mut command = Command::new("python3");
    command
        .args(["-m", "kubernetes_validate", "--strict", "--no-warn", "--quiet", "--kubernetes-version", version])
        .args(files);
    let output = Process::spawn(command.env("PYTHONPATH", &packages))?.output(WITHIN)?;
    let said = format!("{}{}", output.stdout, output.stderr);
    ensure!(
        !said.contains("ImportError") && !said.contains("ModuleNotFoundError"),
        "Python has changed since {} was made; remove it, and get it anew with `cargo xtask cluster parts --chart`: {said}",
        packages.display()
    );
    ensure!(output.status.success(), "Kubernetes {version}: {said}");
    Ok(())
}

/// The directory of the chart.
pub fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/underpass")
}
