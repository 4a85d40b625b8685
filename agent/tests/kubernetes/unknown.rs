//! What the API server does not say, or says too late, opens nothing.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testbed::{Agent, AgentOptions, Pod, Process, Sniffer, SnifferOptions, Testbed, pace::patience, underpass_path};

use crate::{
    mesh::{MARKER, SOON, app, assert_encrypted, assert_plaintext, at, in_sync, sandbox, serve},
    scripted::{Answers, Scripted},
    world::eventually,
};

/// How long a client waits whose packets are dropped.
const DROPPED: &str = "3";
const VIP: &str = "10.96.0.1";

struct World {
    agents: Vec<Agent>,
    /// Each node's own, so that one may hear of something before another.
    apis: Vec<Scripted>,
    bed: Testbed,
}

impl World {
    fn new(label: &str, nodes: &[&str]) -> Result<Self> {
        let bed = Testbed::new(label)?;
        let apis = nodes.iter().map(|node| Scripted::start(bed.node(node))).collect::<Result<_>>()?;
        let mut world = Self { agents: Vec::new(), apis, bed };
        world.apply(
            &json!({ "kind": "Namespace", "metadata": { "name": "shop", "labels": { "underpass.io/mode": "enabled" } } }),
        );
        for node in nodes {
            world.apply(&json!({ "kind": "Node", "metadata": { "name": node } }));
        }
        for node in nodes {
            let agent = world.agent(node, &world.apis[world.agents.len()])?;
            agent.wait_status(SOON, in_sync)?;
            world.agents.push(agent);
        }
        Ok(world)
    }

    /// Tells all nodes of an object.
    fn apply(&self, object: &Value) {
        self.apis.iter().for_each(|api| api.apply(object.clone()));
    }

    fn delete(&self, object: &Value) {
        self.apis.iter().for_each(|api| api.delete(object.clone()));
    }

    fn answer(&self, answers: Answers) {
        self.apis.iter().for_each(|api| api.answer(answers));
    }

    fn agent(&self, node: &str, api: &Scripted) -> Result<Agent> {
        let node = self.bed.node(node);
        let document = json!({ "apiVersion": "underpass.io/v1alpha1", "kind": "NodeConfig", "node": node.name(),
            "trustDomain": "cluster.local", "issuer": { "local": { "caDir": self.bed.dir().join("ca") } },
            "kubernetes": { "kubeconfig": api.kubeconfig(node)? } });
        let options = AgentOptions { ready_within: None, ..AgentOptions::default() };
        Agent::start(node, &underpass_path()?, &document.to_string(), options)
    }

    /// A pod, and what stands for its first container. The API does not know it yet.
    fn pod(&self, node: &str, name: &str) -> Result<(Pod, Process)> {
        let pod = self.bed.node(node).pod(name)?;
        let process = sandbox(&pod, &format!("uid-{name}"))?;
        Ok((pod, process))
    }

    fn sniff(&self) -> Result<Sniffer> {
        Sniffer::start(self.bed.node("a").namespace(), &SnifferOptions::markers([MARKER]).on("wire"))
    }
}

fn object(pod: &Pod) -> Value {
    let (name, ip) = (pod.name(), pod.ipv4());
    json!({ "kind": "Pod", "metadata": { "namespace": "shop", "name": name, "uid": format!("uid-{name}"),
            "creationTimestamp": "2026-01-01T00:00:00Z" },
        "spec": { "nodeName": pod.node().name(), "serviceAccountName": name, "containers": [{ "name": "c", "image": "i" }] },
        "status": { "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }] } })
}

fn service() -> Value {
    json!({ "kind": "Service", "metadata": { "namespace": "shop", "name": "web" },
        "spec": { "clusterIP": VIP, "clusterIPs": [VIP], "ports": [{ "name": "http", "port": 80 }] } })
}

/// A slice of the service with the pod's address; `named` says whose that is.
fn slice(pod: &Pod, named: bool) -> Value {
    let mut endpoint = json!({ "addresses": [pod.ipv4()], "conditions": { "ready": true } });
    if named {
        let uid = format!("uid-{}", pod.name());
        endpoint["targetRef"] = json!({ "kind": "Pod", "namespace": "shop", "name": pod.name(), "uid": uid });
    }
    json!({ "kind": "EndpointSlice", "addressType": "IPv4", "ports": [{ "name": "http", "port": 8080 }],
        "metadata": { "namespace": "shop", "name": "web-1", "labels": { "kubernetes.io/service-name": "web" } },
        "endpoints": [endpoint] })
}

fn strict() -> Value {
    json!({ "kind": "PeerAuthentication", "metadata": { "namespace": "istio-system", "name": "default" },
        "spec": { "mtls": { "mode": "STRICT" } } })
}

fn policy() -> Value {
    json!({ "kind": "AuthorizationPolicy", "metadata": { "namespace": "shop", "name": "nobody" },
        "spec": { "selector": { "matchLabels": { "app": "other" } }, "rules": [] } })
}

fn enrolled(agent: &Agent, name: &str) -> Result<()> {
    let workload = format!("shop/{name}");
    let is = |status: &Value| {
        let pods = status["pods"].as_array().context("pods")?;
        Ok(pods.iter().any(|p| p["workload"] == workload.as_str() && p["state"] == "enrolled"))
    };
    agent.wait_status(SOON, is).map(drop)
}

fn kind<'a>(status: &'a Value, kind: &str) -> Result<&'a Value> {
    let kinds = status["cluster"]["kinds"].as_array().context("kinds")?;
    kinds.iter().find(|k| k["kind"] == kind).with_context(|| status.to_string())
}

fn plaintext(outsider: &Pod, to: &str) -> Result<bool> {
    let output = outsider.app(&["request", to, "--timeout", DROPPED, "--line", MARKER])?.output(SOON)?;
    Ok(output.status.success())
}

/// Modes and policies stay in force, whatever the API server answers about their kinds, also for an
/// agent that starts meanwhile.
#[test]
fn kinds_that_are_not_served_any_more_keep_their_objects() -> Result<()> {
    let mut world = World::new("kgone", &["a"])?;
    let (server, _sandbox) = world.pod("a", "server")?;
    let outsider = world.bed.node("a").pod("outsider")?;
    let _serves = serve(&server, 8080)?;
    let to = at(server.ipv4(), 8080);
    world.apply(&object(&server));
    enrolled(&world.agents[0], "server")?;
    // The control: without a mode, plaintext is let in.
    ensure!(plaintext(&outsider, &to)?, "PERMISSIVE lets plaintext in");
    world.apply(&policy());
    world.apply(&strict());
    eventually(SOON, || {
        ensure!(!plaintext(&outsider, &to)?, "STRICT");
        Ok(())
    })?;
    let failing = |status: &Value| {
        let is = |name| Ok::<_, anyhow::Error>(kind(status, name)?["error"].is_string());
        Ok(is("PeerAuthentication")? && is("AuthorizationPolicy")?)
    };
    let kept = |world: &World, answers: Answers| -> Result<()> {
        let status = world.agents[0].wait_status(SOON, failing).with_context(|| format!("{answers:?}"))?;
        for name in ["PeerAuthentication", "AuthorizationPolicy"] {
            ensure!(kind(&status, name)?["objects"] == 1, "{answers:?}: {status}");
        }
        ensure!(!plaintext(&outsider, &to)?, "{answers:?} opened a STRICT pod");
        ensure!(world.agents[0].ask(&["policies"])?["policies"].to_string().contains("nobody"), "{answers:?}");
        Ok(())
    };
    let faults = [Answers::NotFound, Answers::Empty, Answers::Status(410), Answers::Status(403), Answers::Status(503)];
    for (round, answers) in faults.into_iter().enumerate() {
        world.answer(answers);
        kept(&world, answers)?;
        world.answer(Answers::Right);
        // What changes tells that the kind is followed again.
        let again = |mut object: Value| {
            object["metadata"]["annotations"] =
                json!({ "istio.io/dry-run": if round % 2 == 0 { "true" } else { "false" } });
            object
        };
        world.apply(&again(policy()));
        world.apply(&again(strict()));
        let well = |status: &Value| {
            let is = |name| Ok::<_, anyhow::Error>(kind(status, name)?["error"].is_null());
            Ok(is("PeerAuthentication")? && is("AuthorizationPolicy")?)
        };
        world.agents[0]
            .wait_status(patience(Duration::from_mins(2)), well)
            .with_context(|| format!("after {answers:?}"))?;
    }
    // An agent that starts knows no more than its last good copy.
    let copy = world.agents[0].state_dir()?.join("last-good-cluster.json");
    eventually(Duration::from_mins(1), || {
        let text = std::fs::read_to_string(&copy)?;
        ensure!(text.contains("STRICT") && text.contains("nobody"), "not saved yet");
        Ok(())
    })?;
    world.answer(Answers::NotFound);
    world.agents[0].stop()?;
    world.agents[0].restart()?;
    enrolled(&world.agents[0], "server")?;
    kept(&world, Answers::NotFound)?;
    // Only a deletion that is told takes them away.
    world.answer(Answers::Right);
    world.delete(&strict());
    eventually(Duration::from_mins(1), || {
        ensure!(plaintext(&outsider, &to)?, "the mode was deleted");
        Ok(())
    })
}

/// A connection to a service waits until it is known who its endpoint is, and then goes through the
/// tunnel, or is refused.
#[test]
fn a_connection_waits_for_an_endpoint_that_is_not_known() -> Result<()> {
    let world = World::new("kawait", &["a", "b"])?;
    let (client, _first) = world.pod("a", "client")?;
    let (server, _second) = world.pod("b", "server")?;
    let _serves = serve(&server, 8080)?;
    // The control: the sniffer sees plaintext between the two while they are in no mesh.
    let sniffer = world.sniff()?;
    app(&client, &["request", &at(server.ipv4(), 8080), "--line", MARKER])?;
    assert_plaintext(&sniffer.stop()?)?;

    world.apply(&object(&client));
    enrolled(&world.agents[0], "client")?;
    world.apply(&service());
    world.apply(&slice(&server, true));
    let sniffer = world.sniff()?;
    let awaited = |agent: &Agent| {
        eventually(SOON, || {
            let all = agent.ask(&["services"])?;
            ensure!(all["services"][0]["awaited"].to_string().contains("shop/server"), "{all}");
            Ok(())
        })
    };
    awaited(&world.agents[0])?;
    // Nobody gets to know who it is: refused after the limit of a handshake.
    let to = format!("{VIP}:80");
    let output = client.app(&["request", &to, "--line", MARKER])?.output(SOON)?;
    ensure!(!output.status.success(), "{}", output.stdout);
    let refused = world.agents[0].counters()?["agent"]["refused"]["endpoint-unknown"].clone();
    ensure!(refused == 1, "{refused}: {}", world.agents[0].log());
    // Somebody does while a connection waits.
    let captured = || Ok::<_, anyhow::Error>(world.agents[0].counters()?["bpf"]["captured"].as_u64());
    let before = captured()?;
    let waiting = client.app(&["request", &to, "--line", MARKER])?;
    eventually(SOON, || {
        ensure!(captured()? > before, "not captured yet");
        Ok(())
    })?;
    world.apis[1].apply(object(&server));
    enrolled(&world.agents[1], "server")?;
    world.apis[0].apply(object(&server));
    let output = waiting.output(SOON)?;
    ensure!(output.status.success(), "{} {}", output.stderr, world.agents[0].log());
    assert_encrypted(&sniffer.stop()?)
}

/// An endpoint that names no pod is reached through the tunnel when its address is a pod's of the
/// mesh.
#[test]
fn an_endpoint_without_a_reference_is_not_dialled_in_plaintext() -> Result<()> {
    let world = World::new("kbare", &["a", "b"])?;
    let (client, _first) = world.pod("a", "client")?;
    let (server, _second) = world.pod("b", "server")?;
    let (other, _third) = world.pod("b", "other")?;
    let (_serves, _also) = (serve(&server, 8080)?, serve(&other, 8080)?);
    for pod in [&client, &server, &other] {
        world.apply(&object(pod));
    }
    world.apply(&service());
    world.apply(&slice(&other, true));
    // Beside a named endpoint, in a slice of its own.
    let mut bare = slice(&server, false);
    bare["metadata"]["name"] = json!("web-2");
    world.apply(&bare);
    enrolled(&world.agents[0], "client")?;
    enrolled(&world.agents[1], "server")?;
    enrolled(&world.agents[1], "other")?;
    let to = format!("{VIP}:80");
    let sniffer = world.sniff()?;
    eventually(SOON, || app(&client, &["request", &to, "--line", MARKER]).map(drop))?;
    // Both endpoints have been chosen, as good as certainly.
    for _ in 0..20 {
        app(&client, &["request", &to, "--line", MARKER])?;
    }
    // And alone.
    world.delete(&slice(&other, true));
    eventually(SOON, || {
        let all = world.agents[0].ask(&["services"])?;
        ensure!(all["services"][0]["endpoints_total"] == 1, "{all}");
        Ok(())
    })?;
    app(&client, &["request", &to, "--line", MARKER])?;
    assert_encrypted(&sniffer.stop()?)?;
    ensure!(world.agents[0].counters()?["agent"]["passthrough"] == 0, "nothing was passed through");
    Ok(())
}
