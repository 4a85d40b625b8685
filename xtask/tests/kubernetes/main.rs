//! The Helm chart on a real API server: taken by an old one, upgraded, taken away and brought back. There is no kubelet, so nothing of it
//! runs; `cargo xtask test` makes the programs that this needs.

#[path = "../chart/cases.rs"]
mod cases;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testbed::{
    Output, Process, Testbed,
    kube::{ControlPlane, ControlPlaneOptions, Parts, User},
};

const NAMESPACE: &str = "underpass-system";
/// How long Helm may take: it does not wait for pods.
const WITHIN: Duration = Duration::from_mins(2);

/// A control plane, and Helm as its administrator. Fields drop in order.
struct Cluster {
    plane: ControlPlane,
    helm: PathBuf,
    config: PathBuf,
    home: tempfile::TempDir,
    _bed: Testbed,
}

impl Cluster {
    fn new(label: &str) -> Result<Self> {
        let bed = Testbed::new(label)?;
        let parts = Parts::find()?;
        let helm = parts.program("helm").context("get it with `cargo xtask cluster parts --chart`")?;
        let plane = ControlPlane::start(&bed, parts, ControlPlaneOptions::default())?;
        plane.kubectl(&["create", "namespace", NAMESPACE])?;
        let config = plane.kubeconfig_here(&User::admin())?;
        Ok(Self { plane, helm, config, home: tempfile::tempdir()?, _bed: bed })
    }

    fn helm(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.helm);
        // Its own caches, and the client library's of what the server knows.
        for variable in ["HOME", "HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(variable, self.home.path());
        }
        let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/underpass");
        command.env("KUBECONFIG", &self.config).current_dir(chart);
        Process::spawn(command.arg("--namespace").arg(NAMESPACE).args(arguments))?.output(WITHIN)
    }

    fn object(&self, kind: &str, name: &str) -> Result<Value> {
        self.plane.get(&[kind, name, "--namespace", NAMESPACE])
    }

    /// Writes as `underpass ca` does, with its rights.
    fn write_as_authority(&self, secret: &str, root: &str) -> Result<()> {
        let mut object = self.object("secret", "underpass-ca")?;
        object["data"] = json!({ "ca.key": secret });
        let user = User::new("system:serviceaccount:underpass-system:underpass-ca");
        self.plane.kubectl_as(&user, &["replace", "--filename=-"], &object.to_string())?.success()?;
        let patch = json!({ "data": { "ca.crt": root } }).to_string();
        let arguments =
            ["--namespace", NAMESPACE, "patch", "configmap", "underpass-ca-root", "--type=merge", "--patch"];
        self.plane.kubectl_as(&user, &[&arguments[..], &[&patch]].concat(), "")?.success().map(drop)
    }

    /// What was written is there.
    fn has(&self, secret: &str, root: &str) -> Result<()> {
        let (key, crt) = (self.object("secret", "underpass-ca")?, self.object("configmap", "underpass-ca-root")?);
        ensure!(key["data"] == json!({ "ca.key": secret }), "{}", key["data"]);
        ensure!(crt["data"] == json!({ "ca.crt": root }), "{}", crt["data"]);
        Ok(())
    }

    fn mode(&self) -> Result<String> {
        let config = self.object("configmap", "underpass-config")?;
        let text = config["data"]["config.yaml"].as_str().context("no config.yaml")?;
        let line = text.lines().find_map(|line| line.trim().strip_prefix("mode: "));
        line.map(str::to_owned).context("no mode")
    }
}

#[test]
fn what_the_authority_wrote_outlives_upgrades_rollbacks_and_the_release() -> Result<()> {
    // base64 of "key".
    const KEY: &str = "a2V5";
    let cluster = Cluster::new("chart")?;
    let said = cluster.helm(&["install", "underpass", "."])?.success()?;
    ensure!(said.contains("kubectl label namespace NAME underpass.io/mode=enabled"), "{said}");
    ensure!(!said.contains("WARNING"), "{said}");
    cluster.write_as_authority(KEY, "root")?;

    cluster.helm(&["upgrade", "underpass", ".", "--set=mesh.mode=strict"])?.success()?;
    ensure!(cluster.mode()? == "strict");
    cluster.has(KEY, "root")?;
    cluster.helm(&["rollback", "underpass", "1"])?.success()?;
    ensure!(cluster.mode()? == "permissive");
    cluster.has(KEY, "root")?;
    // There is nobody who would run the Job.
    cluster.helm(&["uninstall", "underpass", "--no-hooks"])?.success()?;
    ensure!(cluster.object("secret", "underpass-ca")?["data"] == json!({ "ca.key": KEY }));
    for (kind, name) in [("configmap", "underpass-ca-root"), ("daemonset", "underpass-agent")] {
        let gone = cluster.object(kind, name).expect_err("it is still there").to_string();
        ensure!(gone.contains("NotFound"), "{gone}");
    }

    let refused = cluster.helm(&["install", "another", "."])?;
    ensure!(!refused.status.success() && refused.stderr.contains("underpass-ca"), "{refused:?}");
    cluster.helm(&["install", "underpass", "."])?.success()?;
    ensure!(cluster.object("secret", "underpass-ca")?["data"] == json!({ "ca.key": KEY }), "a new root");
    Ok(())
}

#[test]
fn an_unfinished_removal_is_said() -> Result<()> {
    let cluster = Cluster::new("chgone")?;
    cluster.helm(&["install", "underpass", "."])?.success()?;
    let patch = ["patch", "configmap", "underpass-uninstall", "--namespace", NAMESPACE, "--type=merge", "--patch"];
    cluster.plane.kubectl(&[&patch[..], &[r#"{"data":{"uninstall":"now"}}"#]].concat())?;
    let said = cluster.helm(&["upgrade", "underpass", "."])?.success()?;
    ensure!(said.contains("WARNING: an earlier `helm uninstall` was not finished"), "{said}");
    // It prints the way back, which is as good as it works.
    let remove = ["patch", "configmap", "underpass-uninstall", "--namespace", NAMESPACE, "--type=json", "--patch"];
    cluster.plane.kubectl(&[&remove[..], &[r#"[{"op":"remove","path":"/data/uninstall"}]"#]].concat())?;
    let said = cluster.helm(&["upgrade", "underpass", "."])?.success()?;
    ensure!(!said.contains("WARNING"), "{said}");
    Ok(())
}

/// Rights as the API server sees them, of what the chart adds to the files that the agent's tests prove.
#[test]
fn accounts_may_do_what_they_need_and_no_more() -> Result<()> {
    const AGENT: &str = "underpass-agent";
    const REMOVER: &str = "underpass-uninstall";
    let cluster = Cluster::new("chrights")?;
    cluster.helm(&["install", "underpass", "."])?.success()?;
    let manifest = cluster.helm(&["get", "hooks", "underpass"])?.success()?;
    // Helm would make it before the Job.
    cluster.plane.kubectl_as(&User::admin(), &["apply", "--filename=-"], &manifest)?.success()?;
    let may = |account: &str, what: &[&str]| -> Result<bool> {
        let user = format!("--as=system:serviceaccount:{NAMESPACE}:{account}");
        let arguments = [&["auth", "can-i", "--quiet", "--namespace", NAMESPACE, &user], what].concat();
        Ok(cluster.plane.kubectl_as(&User::admin(), &arguments, "")?.status.success())
    };
    for (account, what) in [
        (AGENT, &["list", "pods", "--all-namespaces"][..]),
        (AGENT, &["watch", "configmaps/underpass-uninstall"]),
        (REMOVER, &["patch", "configmaps/underpass-uninstall"]),
        (REMOVER, &["get", "daemonsets.apps/underpass-agent"]),
        (REMOVER, &["list", "pods"]),
    ] {
        ensure!(may(account, what)?, "{account} may not {what:?}");
    }
    for (account, what) in [
        (AGENT, &["patch", "configmaps/underpass-uninstall"][..]),
        (AGENT, &["get", "configmaps/underpass-config"]),
        (AGENT, &["get", "secrets/underpass-ca"]),
        (AGENT, &["patch", "nodes"]),
        (AGENT, &["delete", "nodes"]),
        (AGENT, &["patch", "pods"]),
        (REMOVER, &["patch", "configmaps/underpass-config"]),
        (REMOVER, &["delete", "daemonsets.apps/underpass-agent"]),
        (REMOVER, &["list", "pods", "--all-namespaces"]),
        (REMOVER, &["get", "secrets/underpass-ca"]),
    ] {
        ensure!(!may(account, what)?, "{account} may {what:?}");
    }
    Ok(())
}

/// There are no schemas of versions before 1.25; the server itself has them.
#[test]
fn an_old_api_server_takes_everything() -> Result<()> {
    let cluster = Cluster::new("chold")?;
    // kubectl asks five times a second, and most objects are the same in every case.
    let mut different = BTreeSet::new();
    for (_, values) in cases::all() {
        let file = cluster.home.path().join("values.yaml");
        std::fs::write(&file, values)?;
        let template = ["template", "underpass", ".", "--kube-version=1.20.2", "--values"];
        let rendered = cluster.helm(&[&template[..], &[&file.display().to_string()]].concat())?.success()?;
        different.extend(rendered.split("\n---\n").map(str::to_owned));
    }
    ensure!(different.len() > 50, "only {} objects", different.len());
    let all = different.into_iter().collect::<Vec<_>>().join("\n---\n");
    let create = ["create", "--dry-run=server", "--validate=true", "--filename=-"];
    cluster.plane.kubectl_as(&User::admin(), &create, &all)?.success().map(drop)
}
