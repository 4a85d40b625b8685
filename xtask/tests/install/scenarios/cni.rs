//! The plugin holds pods back that nobody would protect, and is there whatever others do.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::{CONFLIST, chained};
use crate::{
    cluster::Node,
    manifests,
    traffic::{RATE, Traffic, ensure_encrypted, sniff},
    wait::{eventually, throughout},
    world::{READY, SYSTEM, World, is_ready},
};

/// Long enough for a pod to start several times over.
const HELD: Duration = Duration::from_secs(6);
/// How long the agent may take to put its entry back.
const REPAIR: Duration = Duration::from_secs(15);

/// Without its agent, a node starts no pod of the mesh, and says why; with it, it does, by itself. Other namespaces' pods start.
pub(crate) fn pods_wait_for_their_agent(world: &mut World) -> Result<()> {
    let [_, second] = world.cluster.pair()?;
    let set = take_agent_away(world, second)?;
    let labels = json!({ "app": "held" });
    world.cluster.apply(&manifests::list(&[
        manifests::pod("shop", "held", &second.name, &labels, &manifests::echo()),
        manifests::pod("plain", "free", &second.name, &labels, &manifests::echo()),
    ]))?;
    eventually("a pod that is in no mesh", READY, || ready(world, "plain/free"))?;
    let event = eventually("an event of the pod that is held", READY, || {
        event(world, "shop", "held", "FailedCreatePodSandBox")
    })?;
    ensure!(event.contains("underpass"), "the event does not say who holds the pod: {event}");
    world.notes.push(format!("the event: {event}"));
    throughout("a pod without an agent", HELD, || {
        let status = world.pod("shop/held")?["status"].take();
        let state = &status["containerStatuses"][0]["state"]["waiting"]["reason"];
        ensure!(state == "ContainerCreating", "{status}");
        Ok(())
    })?;
    world.cluster.apply(&set)?;
    world.wait_agents()?;
    eventually("the pod that was held", READY, || ready(world, "shop/held"))?;
    let sniffers = world.cluster.nodes().iter().map(sniff).collect::<Result<Vec<_>>>()?;
    Traffic::start(&world.cluster, "shop/client", &world.address("shop/held")?, RATE)?.stop()?;
    sniffers.into_iter().try_for_each(|sniffer| ensure_encrypted(sniffer).map(drop))?;
    for pod in ["shop/held", "plain/free"] {
        delete(world, pod)?;
    }
    Ok(())
}

/// Pods that are made and removed while the agent is killed again and again start in the end, and leave nothing.
pub(crate) fn agent_killed_while_pods_come_and_go(world: &mut World) -> Result<()> {
    let [_, second] = world.cluster.pair()?;
    let before = leases(world, second)?;
    let names: Vec<String> = (0..8).map(|number| format!("restless-{number}")).collect();
    let pods: Vec<_> = names
        .iter()
        .map(|name| manifests::pod("shop", name, &second.name, &json!({ "app": "restless" }), &manifests::echo()))
        .collect();
    world.cluster.apply(&manifests::list(&pods))?;
    // Once while they are made, once more as soon as it is back, while the kubelet tries again.
    for _ in 0..2 {
        eventually("an agent to kill", READY, || kill_agent(world, second))?;
    }
    for name in &names {
        eventually("pods that were made meanwhile", READY, || ready(world, &format!("shop/{name}")))?;
    }
    let mut arguments = vec!["delete", "pod", "--namespace=shop", "--wait=false"];
    arguments.extend(names.iter().map(String::as_str));
    world.cluster.kubectl(&arguments)?;
    kill_agent(world, second)?;
    let wait = ["wait", "--for=delete", "--namespace=shop", "--selector=app=restless", "--timeout=90s", "pod"];
    world.cluster.try_kubectl(&wait)?;
    world.wait_agents()?;
    eventually("addresses that are given back", READY, || {
        let now = leases(world, second)?;
        ensure!(now == before, "before: {before:?}, now: {now:?}");
        Ok(())
    })?;
    deleted_twice(world, second)
}

/// DEL without a namespace, for a container that nobody knows, and once more: container runtimes do that, and insist on success.
fn deleted_twice(world: &World, node: &Node) -> Result<()> {
    let entry = entry(world, node)?;
    let mut config = entry.clone();
    config["cniVersion"] = json!("0.4.0");
    config["name"] = json!("playground");
    for namespace in ["", "/run/netns/gone"] {
        for _ in 0..2 {
            let script = format!(
                "echo '{config}' | CNI_COMMAND=DEL CNI_CONTAINERID=deadbeef CNI_IFNAME=eth0 CNI_NETNS={namespace} \
                 CNI_PATH=/opt/cni/bin CNI_ARGS='IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=gone' /opt/cni/bin/underpass-cni"
            );
            world.cluster.on(node, &script).with_context(|| format!("DEL with namespace {namespace:?}"))?;
        }
    }
    Ok(())
}

/// Another plugin writes the configuration anew: the entry is put back, and what the other one wanted stays.
pub(crate) fn put_back_when_others_write(world: &mut World) -> Result<()> {
    let [first, _] = world.cluster.pair()?;
    let text = world.cluster.on(first, &format!("cat {CONFLIST}"))?;
    let mut list: Value = serde_json::from_str(&text).with_context(|| format!("{CONFLIST} is: {text}"))?;
    let plugins = list["plugins"].as_array_mut().context("plugins")?;
    plugins.retain(|plugin| plugin["type"] != "underpass-cni");
    plugins[0]["mtu"] = json!(1400);
    let replace = format!("echo '{list}' > /etc/cni/net.d/.new && mv /etc/cni/net.d/.new {CONFLIST}");
    for how in [replace, format!("echo '{list}' > {CONFLIST}")] {
        world.cluster.on(first, &how)?;
        eventually("the plugin's entry", REPAIR, || {
            ensure!(chained(world, first)?, "it is not there");
            Ok(())
        })?;
    }
    let text = world.cluster.on(first, &format!("cat {CONFLIST}"))?;
    let now: Value = serde_json::from_str(&text).with_context(|| format!("{CONFLIST} is: {text}"))?;
    ensure!(now["plugins"][0]["mtu"] == 1400, "what the other plugin wrote is gone: {now}");
    // And so is the program itself.
    world.cluster.on(first, "rm /opt/cni/bin/underpass-cni")?;
    eventually("the plugin", REPAIR, || world.cluster.on(first, "test -x /opt/cni/bin/underpass-cni"))?;
    // As it was, for those that follow.
    let back = list.to_string().replace(r#""mtu":1400,"#, "").replace(r#","mtu":1400"#, "");
    world.cluster.on(first, &format!("echo '{back}' > {CONFLIST}"))?;
    eventually("the plugin's entry", REPAIR, || {
        ensure!(chained(world, first)?, "it is not there");
        Ok(())
    })
}

/// Ends the agent of a node for good; what brings it back.
fn take_agent_away(world: &World, node: &Node) -> Result<String> {
    let namespace = format!("--namespace={SYSTEM}");
    let mut set = world.cluster.get(&["daemonset", "underpass-agent", &namespace])?;
    for field in ["uid", "resourceVersion", "creationTimestamp", "generation", "managedFields"] {
        if let Some(metadata) = set["metadata"].as_object_mut() {
            metadata.remove(field);
        }
    }
    set["status"] = Value::Null;
    let agent = world.agent(node)?;
    let name = agent["metadata"]["name"].as_str().context("a pod has a name")?;
    world.cluster.kubectl(&["delete", "daemonset", "underpass-agent", &namespace, "--cascade=orphan"])?;
    world.cluster.kubectl(&["delete", "pod", name, &namespace, "--timeout=180s"])?;
    Ok(set.to_string())
}

/// Kills the agent of a node, as a lack of memory would; the kubelet starts it again.
fn kill_agent(world: &World, node: &Node) -> Result<()> {
    let agent = eventually("the agent", READY, || world.agent(node))?;
    let uid = agent["metadata"]["uid"].as_str().context("a pod has a uid")?;
    let mut killed = 0;
    for process in node.processes(uid)? {
        let name = std::fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
        if name.trim() == "underpass" {
            kill(Pid::from_raw(process), Signal::SIGKILL).context("killing the agent")?;
            killed += 1;
        }
    }
    ensure!(killed > 0, "no process of the agent of {} was found", node.name);
    Ok(())
}

/// The plugin's entry in a node's configuration.
fn entry(world: &World, node: &Node) -> Result<Value> {
    let text = world.cluster.on(node, &format!("cat {CONFLIST}"))?;
    let list: Value = serde_json::from_str(&text).with_context(|| format!("{CONFLIST} is: {text}"))?;
    let ours = list["plugins"].as_array().and_then(|all| all.iter().find(|plugin| plugin["type"] == "underpass-cni"));
    ours.cloned().with_context(|| format!("no entry in {list}"))
}

/// Addresses that a node has given to pods.
fn leases(world: &World, node: &Node) -> Result<Vec<String>> {
    let text = world.cluster.on(node, "cd /var/lib/cni/networks/playground && ls | grep -v -e last -e lock")?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// Waits until a pod is gone.
pub(crate) fn delete(world: &World, pod: &str) -> Result<()> {
    let (namespace, name) = pod.split_once('/').context("a pod is called NAMESPACE/NAME here")?;
    // A kubelet of this age says that a pod is gone after its next round of cleaning up, or the one after that.
    world.cluster.kubectl(&["delete", "pod", name, &format!("--namespace={namespace}"), "--timeout=180s"]).map(drop)
}

/// An error while a pod is not ready.
pub(crate) fn ready(world: &World, pod: &str) -> Result<()> {
    let object = world.pod(pod)?;
    ensure!(is_ready(&object), "{pod} is not ready: {}", object["status"]);
    Ok(())
}

/// What an event of a pod says.
fn event(world: &World, namespace: &str, pod: &str, reason: &str) -> Result<String> {
    let selector = format!("--field-selector=involvedObject.name={pod},reason={reason}");
    let events = world.cluster.get(&["events", &format!("--namespace={namespace}"), &selector])?;
    let message = events["items"][0]["message"].as_str();
    message.map(str::to_owned).with_context(|| format!("no event {reason} of {pod}"))
}
