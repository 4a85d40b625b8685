//! Agents that learn the mesh from the control plane, and pods that are objects there and programs here.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testbed::{Agent, AgentOptions, Capture, Pod, Process, Sniffer, SnifferOptions, kube::User, underpass_path};

use crate::world::{World, eventually};

/// Text that only occurs in plaintext.
pub const MARKER: &str = "plaintext-marker-4c1b";
/// How long anything may take.
pub const SOON: Duration = Duration::from_secs(30);
/// Whom the agents are to the API server.
pub const AGENT: &str = "underpass-agent";
/// What the chart lets the agent do.
pub const RULES: &str = include_str!("../../../charts/underpass/files/rbac/agent.yaml");

/// Two agents over a control plane. Fields drop in order.
pub struct Mesh {
    pub a: Agent,
    pub b: Agent,
    pub world: World,
}

/// A pod with its object. Its processes end with it.
pub struct KubePod {
    pub pod: Pod,
    pub namespace: String,
    _sandbox: Process,
}

impl Mesh {
    /// With Istio's CRDs, a namespace `shop` without labels, and no pods.
    pub fn new(label: &str) -> Result<Self> {
        Self::over(World::new(label)?)
    }

    pub fn over(world: World) -> Result<Self> {
        let issuer = json!({ "local": { "caDir": world.bed.dir().join("ca") } });
        Self::with_issuer(world, |_| Ok(issuer.clone()))
    }

    /// With the `issuer` of each node.
    pub fn with_issuer(world: World, issuer: impl Fn(&str) -> Result<Value>) -> Result<Self> {
        Self::with(world, issuer, |_| Ok(Vec::new()))
    }

    /// With further arguments of each node's agent, too.
    pub fn with(
        world: World,
        issuer: impl Fn(&str) -> Result<Value>,
        arguments: impl Fn(&str) -> Result<Vec<String>>,
    ) -> Result<Self> {
        world.plane.install_crds()?;
        world.plane.apply(RULES)?;
        let user = format!("--user={AGENT}");
        world.plane.kubectl(&["create", "clusterrolebinding", AGENT, "--clusterrole=underpass-agent", &user])?;
        world.plane.kubectl(&["create", "namespace", "shop"])?;
        for node in ["a", "b"] {
            world.plane.register(world.bed.node(node))?;
        }
        let a = start_agent(&world, "a", &issuer("a")?, arguments("a")?)?;
        let b = start_agent(&world, "b", &issuer("b")?, arguments("b")?)?;
        for agent in [&a, &b] {
            agent.wait_status(SOON, in_sync)?;
        }
        Ok(Self { a, b, world })
    }

    /// Runs a pod on a node: its object, bound and running, and a process that holds its namespace as a pause container does.
    pub fn run(&self, node: &str, name: &str, labels: &Value) -> Result<KubePod> {
        self.run_object(node, name, &json!({ "labels": labels }), "default")
    }

    /// Runs a pod with a service account of its own.
    pub fn run_as(&self, node: &str, name: &str, account: &str) -> Result<KubePod> {
        self.run_object(node, name, &json!({}), account)
    }

    fn run_object(&self, node: &str, name: &str, metadata: &Value, account: &str) -> Result<KubePod> {
        let plane = &self.world.plane;
        let pod = self.world.bed.node(node).pod(name)?;
        let mut object = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": metadata,
            "spec": { "nodeName": node, "serviceAccountName": account, "automountServiceAccountToken": false,
                "containers": [{ "name": "main", "image": "none" }] },
        });
        object["metadata"]["name"] = json!(name);
        object["metadata"]["namespace"] = json!("shop");
        plane.apply(&object.to_string())?;
        let uid = plane.get(&["pod", name, "--namespace=shop"])?["metadata"]["uid"].clone();
        let sandbox = sandbox(&pod, uid.as_str().context("a uid")?)?;
        plane.set_pod_running("shop", name, node, &[pod.ipv4().into(), pod.ipv6().into()])?;
        Ok(KubePod { pod, namespace: "shop".into(), _sandbox: sandbox })
    }

    /// Deletes the object, at once and for good.
    pub fn delete(&self, pod: &KubePod) -> Result<()> {
        let namespace = format!("--namespace={}", pod.namespace);
        let arguments = ["delete", "pod", pod.pod.name(), &namespace, "--grace-period=0", "--force", "--wait=false"];
        self.world.plane.kubectl(&arguments).map(drop)
    }

    pub fn agent(&self, node: &str) -> &Agent {
        if node == "a" { &self.a } else { &self.b }
    }

    /// Waits until the pod's node has it enrolled, or not.
    pub fn wait_enrolled(&self, pod: &KubePod, expected: bool) -> Result<()> {
        let workload = format!("{}/{}", pod.namespace, pod.pod.name());
        let enrolled = |status: &Value| {
            let pods = status["pods"].as_array().context("pods")?;
            let found = pods.iter().any(|p| p["workload"] == workload.as_str() && p["state"] == "enrolled");
            Ok(found == expected)
        };
        self.agent(pod.pod.node().name()).wait_status(SOON, enrolled).map(drop)
    }

    /// Waits until both agents say so of the workload: whether it is one that is reached by the tunnel.
    pub fn wait_in_mesh(&self, pod: &KubePod, expected: bool) -> Result<()> {
        for agent in [&self.a, &self.b] {
            eventually(SOON, || {
                let all = agent.ask(&["workloads"])?;
                let workload = format!("{}/{}", pod.namespace, pod.pod.name());
                let list = all["workloads"].as_array().context("workloads")?;
                let is = |w: &&Value| w["workload"] == workload.as_str() && w["state"] != "kept";
                let found = list.iter().filter(is).any(|w| w["protocol"] == "underpass");
                ensure!(found == expected, "{workload}: {all}");
                Ok(())
            })?;
        }
        Ok(())
    }

    pub fn label(&self, what: &[&str]) -> Result<()> {
        self.world.plane.kubectl(&[&["label", "--overwrite"], what].concat()).map(drop)
    }

    pub fn sniff(&self) -> Result<Sniffer> {
        let options = SnifferOptions::markers([MARKER]).on("wire");
        Sniffer::start(self.world.bed.node("a").namespace(), &options)
    }
}

/// Starts the agent of a node. It need not be ready.
fn start_agent(world: &World, node: &str, issuer: &Value, arguments: Vec<String>) -> Result<Agent> {
    let options = AgentOptions { ready_within: None, arguments, ..AgentOptions::default() };
    let agent = Agent::start(world.bed.node(node), &underpass_path()?, &document(world, node, issuer)?, options)?;
    agent.wait_status(SOON, |_| Ok(true))?;
    Ok(agent)
}

/// What the chart mounts, for one node.
fn document(world: &World, node: &str, issuer: &Value) -> Result<String> {
    let kubeconfig = world.plane.kubeconfig(&User::new(AGENT))?;
    let document = json!({
        "apiVersion": "underpass.io/v1alpha1", "kind": "NodeConfig", "node": node, "trustDomain": "cluster.local",
        "issuer": issuer,
        "kubernetes": { "kubeconfig": kubeconfig },
    });
    Ok(document.to_string())
}

/// Every kind has been listed, and what came of it is in force.
pub fn in_sync(status: &Value) -> Result<bool> {
    Ok(status["cluster"]["synced"] == true && status["generation"].as_u64().context("generation")? > 0)
}

/// A process in the pod's cgroup as the kubelet names it.
pub fn sandbox(pod: &Pod, uid: &str) -> Result<Process> {
    let cgroup = pod.cgroup().join(format!("pod{uid}"));
    std::fs::create_dir(&cgroup).with_context(|| format!("creating {}", cgroup.display()))?;
    let script = format!("echo $$ > {}/cgroup.procs && echo there && exec sleep infinity", cgroup.display());
    let process = pod.spawn(&["sh", "-c", &script])?;
    process.wait_line("there", SOON)?;
    Ok(process)
}

pub fn at(ip: impl Into<IpAddr>, port: u16) -> String {
    SocketAddr::new(ip.into(), port).to_string()
}

/// Runs `testbed-app` and requires success.
pub fn app(pod: &Pod, arguments: &[&str]) -> Result<Value> {
    let output = pod.app(arguments)?.output(SOON)?;
    let value = output.last_json();
    ensure!(output.status.success(), "testbed-app {arguments:?} in {}: {value:?} {}", pod.name(), output.stderr);
    value
}

/// Starts `testbed-app serve` and waits until it listens.
pub fn serve(pod: &Pod, port: u16) -> Result<Process> {
    let process = pod.app(&["serve", &format!("[::]:{port}")])?;
    process.wait_json("listening", SOON)?;
    Ok(process)
}

/// The capture shows a tunnel and nothing else.
pub fn assert_encrypted(capture: &Capture) -> Result<()> {
    ensure!(capture.dropped_by_kernel == 0, "the sniffer missed packets: {capture:?}");
    ensure!(capture.tls_application_records > 0, "no TLS records on the tunnel's port: {capture:?}");
    ensure!(capture.marker_hits == 0, "plaintext on the wire: {capture:?}");
    Ok(())
}

/// The sniffer sees plaintext when there is some.
pub fn assert_plaintext(capture: &Capture) -> Result<()> {
    ensure!(capture.marker_hits > 0, "no plaintext was seen: {capture:?}");
    ensure!(capture.tcp_15008_payload == 0, "a tunnel? {capture:?}");
    Ok(())
}
