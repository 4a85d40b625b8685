//! Another version, one that does not exist, values that make no sense, and the way back.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::label::{encrypted, settle};
use crate::{
    cluster::Node,
    manifests,
    traffic::{RATE, Traffic, ensure_encrypted, sniff},
    world::{CLIENT, RELEASE, SYSTEM, World, path},
};

/// A new image on both nodes. Kubernetes 1.20 cannot start the new agent beside the old one, so connections fail between the two, and pods stay
/// captured: none is made in plaintext. Connections that were there go on until the drain is over.
pub(crate) fn to_another_image(world: &mut World) -> Result<()> {
    let image = world.underpass("two")?;
    world.cluster.xtask("load", &[path(&image)?])?;
    let [first, _] = world.cluster.pair()?;
    let traffic = Traffic::start(&world.cluster, CLIENT, &world.address("shop/far")?, RATE)?;
    let sniffer = sniff(first)?;
    upgrade(world, &["--set=image.tag=two", "--wait", "--timeout=3m"])?.success()?;
    wait_images(world, "two")?;
    world.notes.push(format!("meanwhile: {}", traffic.stop()?));
    ensure_encrypted(sniffer)?;
    encrypted(world)
}

/// Agents that are not privileged do the same, as this container runtime starts them: for pods that run and for one that starts.
pub(crate) fn without_privileges(world: &mut World) -> Result<()> {
    upgrade(world, &["--set=agent.hardened=true"])?.success()?;
    ask_for_what_there_is(world)?;
    wait_containers(world, "without privileges", |agent| agent["securityContext"]["privileged"] == json!(false))?;
    for node in world.cluster.nodes() {
        let agent = world.agent(node)?;
        let name = agent["metadata"]["name"].as_str().context("a pod has a name")?;
        let namespace = format!("--namespace={SYSTEM}");
        // The exit code says whether the agent can run.
        world.cluster.kubectl(&["exec", name, &namespace, "--", "underpass", "check"])?;
    }
    world.wait_enrolled(true)?;
    settle();
    encrypted(world)?;

    let [first, _] = world.cluster.pair()?;
    let later = manifests::pod("shop", "later", &first.name, &json!({ "app": "later" }), &manifests::echo());
    world.cluster.apply(&later.to_string())?;
    world.wait_ready("shop")?;
    let sniffer = sniff(first)?;
    Traffic::start(&world.cluster, "shop/later", &world.address("shop/far")?, RATE)?.stop()?.all_worked()?;
    ensure_encrypted(sniffer)?;
    world.cluster.kubectl(&["delete", "pod", "later", "--namespace=shop", "--wait", "--timeout=90s"])?;

    upgrade(world, &["--set=agent.hardened=false", "--wait", "--timeout=3m"])?.success()?;
    wait_containers(world, "with privileges", |agent| agent["securityContext"]["privileged"] == json!(true))?;
    encrypted(world)
}

/// A machine for tests may itself lack a capability, and then its container runtime gives it to nobody.
fn ask_for_what_there_is(world: &mut World) -> Result<()> {
    let namespace = format!("--namespace={SYSTEM}");
    let agents = world.cluster.get(&["daemonset", "underpass-agent", &namespace])?;
    let asked = &agents["spec"]["template"]["spec"]["containers"][0]["securityContext"]["capabilities"]["add"];
    let asked: Vec<String> = serde_json::from_value(asked.clone()).context("capabilities of the agent")?;
    let there = caps::read(None, caps::CapSet::Bounding).context("capabilities of this machine")?;
    let there = |name: &String| there.iter().any(|one| one.to_string() == format!("CAP_{name}"));
    let (given, lacking): (Vec<_>, Vec<_>) = asked.into_iter().partition(there);
    if !lacking.is_empty() {
        let path = "/spec/template/spec/containers/0/securityContext/capabilities/add";
        let patch = json!([{ "op": "replace", "path": path, "value": given }]).to_string();
        let patch = ["patch", "daemonset", "underpass-agent", &namespace, "--type=json", "--patch", &patch];
        world.cluster.kubectl(&patch)?;
        world.notes.push(format!("without {}, which this machine does not have", lacking.join(", ")));
    }
    Ok(())
}

/// Values that the chart does not know change nothing. An image that does not exist stops at the first node; going back repairs it.
pub(crate) fn rolled_back(world: &mut World) -> Result<()> {
    let revision = revision(world)?;
    for (value, says) in [("--set=mesh.mode=perhaps", "mesh"), ("--set=agent.drain=1", "drain")] {
        let output = upgrade(world, &[value])?;
        ensure!(!output.status.success(), "{value} was taken: {}", output.stdout);
        ensure!(output.stderr.contains(says), "{value}: {}", output.stderr);
    }
    world.wait_agents()?;
    let output = upgrade(world, &["--set=image.tag=none", "--wait", "--timeout=20s"])?;
    ensure!(!output.status.success(), "an image that does not exist was installed: {}", output.stdout);
    let running = world.cluster.nodes().iter().filter(|node| world.agent(node).is_ok()).count();
    ensure!(
        running == 1,
        "{running} agents are ready after a failed upgrade, and one node after the other is upgraded"
    );
    let back = ["rollback", RELEASE, &revision, "--namespace", SYSTEM, "--wait", "--timeout=3m"];
    world.cluster.helm(&back)?.success()?;
    // Helm is content with all but one of the agents.
    world.wait_agents()?;
    wait_images(world, image(world, world.cluster.pair()?[0])?.rsplit(':').next().unwrap_or_default())?;
    encrypted(world)
}

fn upgrade(world: &World, arguments: &[&str]) -> Result<testbed::Output> {
    let chart = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/underpass");
    let upgrade = ["upgrade", RELEASE, path(&chart)?, "--namespace", SYSTEM, "--reuse-values"];
    world.cluster.helm(&[&upgrade[..], arguments].concat())
}

/// The number of the release as it is.
fn revision(world: &World) -> Result<String> {
    let text =
        world.cluster.helm(&["history", RELEASE, "--namespace", SYSTEM, "--max=1", "--output=json"])?.success()?;
    let history: serde_json::Value = serde_json::from_str(&text).with_context(|| format!("helm history: {text}"))?;
    Ok(history[0]["revision"].to_string())
}

/// Waits until both agents are ready and run this image.
fn wait_images(world: &World, tag: &str) -> Result<()> {
    let tag = format!(":{tag}");
    wait_containers(world, "of another image", |agent| {
        agent["image"].as_str().is_some_and(|image| image.ends_with(&tag))
    })
}

/// Waits until both agents are ready and their containers are `such`.
fn wait_containers(world: &World, what: &str, such: impl Fn(&Value) -> bool) -> Result<()> {
    crate::wait::eventually(&format!("agents {what}"), crate::world::READY, || {
        for node in world.cluster.nodes() {
            let container = container(world, node)?;
            ensure!(such(&container), "{} runs {container}", node.name);
        }
        Ok(())
    })
}

fn image(world: &World, node: &Node) -> Result<String> {
    container(world, node)?["image"].as_str().map(str::to_owned).context("a container has an image")
}

/// The agent's container on a node.
fn container(world: &World, node: &Node) -> Result<Value> {
    Ok(world.agent(node)?["spec"]["containers"][0].take())
}
