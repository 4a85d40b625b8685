//! Where values come from: profile, platform, and whoever installs.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::{
    cases,
    objects::{Objects, container},
};

#[test]
fn what_the_user_says_wins_also_when_it_is_nothing() -> Result<()> {
    let values = "
profile: demo
platform: kind
agent: { drainSeconds: 0, cgroup: '' }
probes: { cgroups: [] }
cni: { enabled: false }
certificates: { lifetime: 24h }
";
    let objects = Objects::of(values)?;
    let arguments = objects.arguments("DaemonSet", "underpass-agent")?;
    ensure!(arguments.contains(&"--drain-timeout=0s".to_owned()), "{arguments:?}");
    ensure!(!arguments.iter().any(|argument| argument.starts_with("--c") && !argument.starts_with("--config")));
    ensure!(objects.config()?["probes"]["cgroups"] == json!([]));
    ensure!(objects.config()?["issuer"]["istio"]["lifetime"] == "24h");
    // And the profile holds where nothing was said.
    ensure!(objects.get("Deployment", "underpass-ca")?["spec"]["replicas"] == 1);
    Ok(())
}

#[test]
fn a_platform_is_stronger_than_a_profile() -> Result<()> {
    let objects = Objects::of("{ profile: demo, platform: k3s }")?;
    let arguments = objects.arguments("DaemonSet", "underpass-agent")?;
    for wanted in ["--cni-bin-dir=/var/lib/rancher/k3s/data/cni", "--drain-timeout=5s"] {
        ensure!(arguments.iter().any(|argument| argument == wanted), "{wanted} is not in {arguments:?}");
    }
    let daemon = objects.get("DaemonSet", "underpass-agent")?;
    let mounts = container(daemon)["volumeMounts"].as_array().context("mounts")?;
    ensure!(mounts.iter().any(|m| m["mountPath"] == "/var/lib/rancher/k3s/data/cni"), "{mounts:?}");
    let cgroups = &objects.config()?["probes"]["cgroups"];
    ensure!(*cgroups == json!(["/system.slice/k3s.service", "/system.slice/k3s-agent.service"]), "{cgroups}");
    Ok(())
}

#[test]
fn every_profile_and_platform_has_its_file() -> Result<()> {
    let names = |folder: &str| -> Result<Vec<String>> {
        let mut names: Vec<_> = std::fs::read_dir(crate::helm::chart().join("files").join(folder))?
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().trim_end_matches(".yaml").to_owned())
            .collect();
        names.sort();
        Ok(names)
    };
    ensure!(names("platforms")? == cases::PLATFORMS);
    ensure!(names("profiles")? == ["demo", "kubernetes"]);
    Ok(())
}

/// Agents read their file when it changes, and say "restart needed" of some fields.
#[test]
fn agents_roll_when_their_configuration_needs_it_and_not_otherwise() -> Result<()> {
    let template = |values: &str| -> Result<_> {
        let objects = Objects::of(values)?;
        Ok(objects.get("DaemonSet", "underpass-agent")?["spec"]["template"].clone())
    };
    let first = template("")?;
    for live in ["mesh: { mode: strict }", "probes: { cgroups: [/k] }", "accessLog: { enabled: false }"] {
        ensure!(template(live)? == first, "{live} restarts agents");
    }
    for fixed in
        ["trustDomain: example.org", "clusterDomain: example.org", "certificates: { lifetime: 1h }", cases::EXTERNAL]
    {
        let annotations = |template: &serde_json::Value| template["metadata"]["annotations"].clone();
        ensure!(annotations(&template(fixed)?) != annotations(&first), "{fixed} does not restart agents");
    }
    Ok(())
}
