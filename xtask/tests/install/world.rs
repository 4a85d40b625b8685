//! The cluster with the pods that scenarios use.
//!
//! ```text
//!   shop/client ─ node-a ── wire ── node-b ─ shop/far          plain/outsider, plain/plain-far: never in the mesh
//!   shop/near ──┘
//! ```

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    cluster::{Cluster, Node},
    manifests::{self, PORT},
    wait::eventually,
};

/// Namespace of the release, and its name.
pub(crate) const SYSTEM: &str = "underpass-system";
pub(crate) const RELEASE: &str = "underpass";
/// The pod whose traffic is watched.
pub(crate) const CLIENT: &str = "shop/client";
/// How long pods may take to be ready, on a machine that is busy.
pub(crate) const READY: Duration = Duration::from_secs(90);

/// What scenarios work with.
pub(crate) struct World {
    pub(crate) cluster: Cluster,
    /// Measurements that are printed below the scenario's line.
    pub(crate) notes: Vec<String>,
}

impl World {
    /// A cluster with images and pods, without Underpass.
    pub(crate) fn start() -> Result<Self> {
        let cluster = Cluster::up()?;
        let world = Self { cluster, notes: Vec::new() };
        let app = world.image(&["--program", path(&testbed::app_path()?)?, "--name", manifests::APP], "app.tar")?;
        world.cluster.xtask("load", &[path(&app)?])?;
        let [first, second] = world.node_names()?;
        let mut objects = vec![manifests::namespace("shop"), manifests::namespace("plain")];
        for (namespace, name, node) in [
            ("shop", "client", &first),
            ("shop", "near", &first),
            ("shop", "far", &second),
            ("plain", "outsider", &first),
            ("plain", "plain-far", &second),
        ] {
            objects.push(manifests::pod(namespace, name, node, &json!({ "app": name }), &manifests::echo()));
        }
        world.cluster.apply(&manifests::list(&objects))?;
        for namespace in ["shop", "plain"] {
            world.wait_ready(namespace)?;
        }
        Ok(world)
    }

    /// Makes an image of Underpass with this tag; its file.
    pub(crate) fn underpass(&self, tag: &str) -> Result<PathBuf> {
        let name = format!("localhost/underpass:{tag}");
        self.image(&["--agent", path(&testbed::underpass_path()?)?, "--name", &name], &format!("underpass-{tag}.tar"))
    }

    fn image(&self, arguments: &[&str], file: &str) -> Result<PathBuf> {
        let output = self.cluster.directory()?.join(file);
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_xtask"));
        command.arg("image").args(arguments).arg("--output").arg(&output).env("CI", "1");
        testbed::Process::spawn(&mut command)?.output(Duration::from_mins(1))?.success()?;
        Ok(output)
    }

    /// Names of both nodes.
    pub(crate) fn node_names(&self) -> Result<[String; 2]> {
        Ok(self.cluster.pair()?.map(|node| node.name.clone()))
    }

    /// Waits until every pod of a namespace is ready.
    pub(crate) fn wait_ready(&self, namespace: &str) -> Result<()> {
        let timeout = format!("--timeout={}s", READY.as_secs());
        let namespace = format!("--namespace={namespace}");
        self.cluster.kubectl(&["wait", "--for=condition=Ready", &timeout, "pod", "--all", &namespace]).map(drop)
    }

    /// A pod's object.
    pub(crate) fn pod(&self, pod: &str) -> Result<Value> {
        let (namespace, name) = pod.split_once('/').context("a pod is called NAMESPACE/NAME here")?;
        self.cluster.get(&["pod", name, &format!("--namespace={namespace}")])
    }

    /// Where an echo server is.
    pub(crate) fn address(&self, pod: &str) -> Result<String> {
        let object = self.pod(pod)?;
        let address = object["status"]["podIP"].as_str().with_context(|| format!("{pod} has no address"))?;
        Ok(format!("{address}:{PORT}"))
    }

    /// The agent's pod on a node, which has to be ready.
    pub(crate) fn agent(&self, node: &Node) -> Result<Value> {
        let namespace = format!("--namespace={SYSTEM}");
        let selector = format!("--field-selector=spec.nodeName={}", node.name);
        let label = "--selector=app.kubernetes.io/component=agent";
        let mut pods = self.cluster.get(&["pods", &namespace, &selector, label])?;
        let all = pods["items"].as_array_mut().context("a list has items")?;
        ensure!(all.len() == 1, "{} agents are on {}", all.len(), node.name);
        ensure!(is_ready(&all[0]), "the agent of {} is not ready", node.name);
        Ok(all.remove(0))
    }

    /// Waits until both agents are ready.
    pub(crate) fn wait_agents(&self) -> Result<()> {
        eventually("agents", READY, || self.cluster.nodes().iter().try_for_each(|node| self.agent(node).map(drop)))
    }

    /// Runs a command of the agent of a node, and reads what it prints as JSON.
    pub(crate) fn ask(&self, node: &Node, question: &[&str]) -> Result<Value> {
        let agent = self.agent(node)?;
        let name = agent["metadata"]["name"].as_str().context("a pod has a name")?.to_owned();
        let namespace = format!("--namespace={SYSTEM}");
        let exec = ["exec", &namespace, &name, "--", "underpass"];
        let text = self.cluster.kubectl(&[&exec[..], question, &["--output=json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("the agent of {} printed: {text}", node.name))
    }

    /// Waits until the agents have enrolled, or not, all pods of the namespace `shop` that run.
    pub(crate) fn wait_enrolled(&self, enrolled: bool) -> Result<()> {
        let pods = self.cluster.get(&["pods", "--namespace=shop", "--field-selector=status.phase=Running"])?;
        let names: Vec<String> = pods["items"]
            .as_array()
            .context("a list has items")?
            .iter()
            .filter_map(|pod| Some(format!("shop/{}", pod["metadata"]["name"].as_str()?)))
            .collect();
        ensure!(!names.is_empty(), "no pod runs in shop");
        eventually("enrolment of the pods of shop", READY, || {
            let mut found = Vec::new();
            for node in self.cluster.nodes() {
                let status = self.ask(node, &["status"])?;
                let pods = status["pods"].as_array().context("the status has pods")?;
                let here = pods.iter().filter(|pod| pod["state"] == "enrolled");
                found.extend(here.filter_map(|pod| pod["workload"].as_str().map(str::to_owned)));
            }
            let right = names.iter().all(|name| found.contains(name) == enrolled);
            ensure!(right, "of {names:?} are enrolled: {found:?}");
            Ok(())
        })
    }

    /// What helps to see why something has failed.
    pub(crate) fn explain(&self) -> String {
        let questions = [
            &["get", "pods", "--all-namespaces", "--output=wide"][..],
            &["get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"],
            &[
                "logs",
                "--namespace=underpass-system",
                "--selector=app.kubernetes.io/name=underpass",
                "--tail=40",
                "--prefix",
                "--ignore-errors",
            ],
        ];
        let answers = questions.map(|arguments| {
            let said = self.cluster.try_kubectl(arguments);
            let said = said.map_or_else(|error| format!("{error:#}"), |output| output.stdout + &output.stderr);
            format!("--- kubectl {}\n{said}\n", arguments.join(" "))
        });
        answers.concat() + &self.cluster.logs()
    }
}

/// Whether a pod is ready.
pub(crate) fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    let ready = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
    conditions.is_some_and(|all| all.iter().any(ready)) && pod["metadata"]["deletionTimestamp"].is_null()
}

/// A path as text.
pub(crate) fn path(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is no UTF-8", path.display()))
}
