//! Pods that vanish from the API, or whose address somebody else claims, with a simulated API
//! server.

use std::{fs, process::Stdio, time::Duration};

use anyhow::{Result, ensure};
use serde_json::Value;
use testbed::{Agent, AgentOptions, Pod, Process, Testbed, underpass_path};

use crate::{
    mesh::SOON,
    scale::document,
    simulated::{Simulated, Size, uid},
};

/// Number 0 is this node's.
const SIZE: Size = Size { pods: 3, local: 1, services: 1 };

fn start(bed: &Testbed, api: &Simulated) -> Result<Agent> {
    let options = AgentOptions { cleanup_on_exit: false, ready_within: None, ..AgentOptions::default() };
    Agent::start(bed.node("a"), &underpass_path()?, &document(bed, api)?, options)
}

fn wait(agent: &Agent, wanted: &str) -> Result<()> {
    let is = |status: &Value| {
        let states = status["pods"].as_array().map_or(&[][..], Vec::as_slice).iter().map(|pod| &pod["state"]);
        states.filter_map(Value::as_str).collect::<Vec<_>>().join(" ") == wanted
    };
    agent.wait_status(SOON, |status| Ok(is(status))).map(drop)
}

/// An echo server as a process of pod 0, in the cgroup that the kubelet would make.
fn victim(pod: &Pod) -> Result<Process> {
    let cgroup = pod.node().pods_cgroup().join(format!("pod{}", uid(0)));
    fs::create_dir_all(&cgroup)?;
    let mut holder = pod.node().command_in(&cgroup, "nsenter");
    holder.arg(format!("--net={}", pod.namespace().path().display())).args(["sleep", "infinity"]);
    Process::spawn(holder.stdin(Stdio::null()))
}

fn plaintext(from: &Pod, to: &Pod) -> Result<bool> {
    let to = format!("{}:8080", to.ipv4());
    Ok(from.app(&["request", &to, "--timeout", "2"])?.output(Duration::from_secs(30))?.status.success())
}

#[test]
fn only_a_label_takes_a_pod_out_of_the_mesh() -> Result<()> {
    let bed = Testbed::new("kabsent")?;
    let node = bed.node("a");
    let (pod, outsider) = (node.pod("victim")?, node.pod("outsider")?);
    let _echo = pod.app(&["serve", "[::]:8080"])?;
    let _process = victim(&pod)?;
    let mut api = Simulated::start(node, SIZE)?;
    api.change(0, pod.ipv4());
    let mut agent = start(&bed, &api)?;
    wait(&agent, "enrolled")?;
    ensure!(plaintext(&outsider, &pod)?, "PERMISSIVE");

    // Another node's kubelet claims its address.
    api.change(1, pod.ipv4());
    agent.wait_status(SOON, |s| Ok(s["cluster"]["disputed_addresses"] == 1))?;
    wait(&agent, "enrolled")?;
    api.remove(1);
    agent.wait_status(SOON, |s| Ok(s["cluster"]["disputed_addresses"] == 0))?;

    // A force delete while the process runs.
    api.remove(0);
    wait(&agent, "kept")?;
    ensure!(!plaintext(&outsider, &pod)?, "a deletion opened the pod");
    api.change(0, pod.ipv4());
    wait(&agent, "enrolled")?;

    // The copy on disk is older than the pod, and the API server is away.
    api.remove(0);
    wait(&agent, "kept")?;
    agent.kill()?;
    fs::remove_file(agent.state_dir()?.join("last-good-cluster.json"))?;
    agent.restart()?;
    agent.wait_status(SOON, |s| Ok(s["cluster"]["synced"] == true))?;
    let copy = agent.state_dir()?.join("last-good-cluster.json");
    crate::world::eventually(SOON, || {
        ensure!(copy.exists(), "no copy yet");
        Ok(())
    })?;
    wait(&agent, "kept")?;
    api.change(0, pod.ipv4());
    wait(&agent, "enrolled")?;
    api.go_away();
    agent.kill()?;
    agent.restart()?;
    wait(&agent, "kept")?;
    ensure!(!plaintext(&outsider, &pod)?, "a restart opened the pod");
    api.come_back()?;
    wait(&agent, "enrolled")?;
    ensure!(plaintext(&outsider, &pod)?, "PERMISSIVE again");

    // Said by a label, which no agent saw come.
    agent.kill()?;
    api.opt_out(0, pod.ipv4());
    agent.restart()?;
    agent.wait_status(SOON, |s| Ok(s["cluster"]["synced"] == true && s["generation"] != 0))?;
    wait(&agent, "")?;
    crate::world::eventually(SOON, || {
        ensure!(plaintext(&outsider, &pod)?, "still closed");
        Ok(())
    })?;
    drop(agent);
    Ok(())
}
