//! What a large cluster costs an agent. The API is simulated: lists and watches of 50,000 pods and 5,000 services of the size
//! that real ones have, out of this process. The pods of the agent's own node are real: a process each, in a cgroup and a network
//! namespace of its own.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{LpmTrie, Map, MapData, lpm_trie::Key};
use serde_json::{Value, json};
use testbed::{Agent, AgentOptions, Node, Testbed, underpass_path};

use crate::simulated::{Simulated, Size, address, uid};

const PODS: usize = 50_000;
const SERVICES: usize = 5_000;
/// Of the pods, those of the agent's node.
const LOCAL: usize = 1_000;

/// Seconds of processor time that a process has used.
fn used(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<_> = stat.rsplit_once(") ").context("a stat line")?.1.split(' ').collect();
    let ticks: f64 = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    Ok(ticks / 100.0)
}

fn resident(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).context("VmRSS")?;
    Ok(line.split_whitespace().nth(1).context("a number")?.parse::<u64>()? / 1024)
}

fn find(directory: &Path, name: &str) -> Option<PathBuf> {
    fs::read_dir(directory).ok()?.flatten().find_map(|e| match e.file_type() {
        Ok(kind) if kind.is_dir() => find(&e.path(), name),
        _ => (e.file_name() == name).then(|| e.path()),
    })
}

/// What stands for the pods of the agent's node. Ends with this.
struct LocalPods(Vec<Child>);

impl LocalPods {
    fn start(node: &Node) -> Result<Self> {
        let mut pods = Self(Vec::with_capacity(LOCAL));
        for i in 0..LOCAL {
            let cgroup = node.pods_cgroup().join(format!("pod{}", uid(i)));
            fs::create_dir(&cgroup).with_context(|| cgroup.display().to_string())?;
            let mut command = node.command_in(&cgroup, "unshare");
            command.args(["--net", "sleep", "infinity"]);
            pods.0.push(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?);
        }
        Ok(pods)
    }
}

impl Drop for LocalPods {
    fn drop(&mut self) {
        for pod in &mut self.0 {
            // It may have ended by itself; then there is nothing to kill.
            let _ = pod.kill();
            let _ = pod.wait();
        }
    }
}

/// The configuration of node `a`.
pub fn document(bed: &Testbed, api: &Simulated) -> Result<String> {
    let document = json!({ "apiVersion": "underpass.io/v1alpha1", "kind": "NodeConfig", "node": "a", "trustDomain": "cluster.local",
        "issuer": { "local": { "caDir": bed.dir().join("ca") } }, "kubernetes": { "kubeconfig": api.kubeconfig()? } });
    Ok(document.to_string())
}

/// The map of captured addresses, as the programs see it: a prefix and a word of flags.
pub struct Mesh(LpmTrie<MapData, [u8; 16], u32>);

impl Mesh {
    pub fn open(agent: &Agent) -> Result<Self> {
        let path = find(&agent.pin_root(), "MESH").context("no pinned map MESH")?;
        Ok(Self(LpmTrie::try_from(Map::LpmTrie(MapData::from_pin(path)?))?))
    }

    pub fn has(&self, ip: Ipv4Addr) -> bool {
        self.0.get(&Key::new(128, ip.to_ipv6_mapped().octets()), 0).is_ok()
    }
}

/// Starts an agent and waits until its node's pods are enrolled; says what that took.
fn enrolled(bed: &Testbed, api: &Simulated) -> Result<Agent> {
    let options = AgentOptions { ready_within: None, ..AgentOptions::default() };
    let began = Instant::now();
    let agent = Agent::start(bed.node("a"), &underpass_path()?, &document(bed, api)?, options)?;
    agent.wait_status(Duration::from_mins(2), |s| Ok(s["cluster"]["synced"] == true && s["generation"] != 0))?;
    let pid = agent.process()?.pid();
    println!(
        "in sync after {:.1} s and {:.1} s of processor time; {} MiB resident",
        began.elapsed().as_secs_f64(),
        used(pid)?,
        resident(pid)?
    );
    agent.wait_status(Duration::from_mins(10), |s| {
        let enrolled = |pods: &Vec<Value>| pods.iter().filter(|pod| pod["state"] == "enrolled").count();
        Ok(s["pods"].as_array().map_or(0, enrolled) == LOCAL)
    })?;
    println!(
        "{LOCAL} pods enrolled after {:.1} s and {:.1} s of processor time; {} MiB resident",
        began.elapsed().as_secs_f64(),
        used(pid)?,
        resident(pid)?
    );
    Ok(agent)
}

#[test]
#[ignore = "a measurement, better with UNDERPASS_BIN=target/release/underpass"]
fn a_thousand_namespaces_of_a_small_cluster() -> Result<()> {
    let bed = Testbed::new("kthousd")?;
    let api = Simulated::start(bed.node("a"), Size { pods: LOCAL, local: LOCAL, services: LOCAL / 10 })?;
    let _pods = LocalPods::start(bed.node("a"))?;
    let agent = enrolled(&bed, &api)?;
    let pid = agent.process()?.pid();
    let (cpu, idle) = (used(pid)?, Duration::from_secs(30));
    thread::sleep(idle);
    let share = 100.0 * (used(pid)? - cpu) / idle.as_secs_f64();
    println!("after {idle:?} of nothing: {share:.2} % of a core; {} MiB resident", resident(pid)?);
    Ok(())
}

#[test]
#[ignore = "a measurement of minutes, better with UNDERPASS_BIN=target/release/underpass"]
fn fifty_thousand_endpoints_in_a_simulated_api() -> Result<()> {
    let bed = Testbed::new("kscale")?;
    let node = bed.node("a");
    let api = Simulated::start(node, Size { pods: PODS, local: LOCAL, services: SERVICES })?;
    let _pods = LocalPods::start(node)?;
    let agent = enrolled(&bed, &api)?;
    let pid = agent.process()?.pid();
    let mesh = Mesh::open(&agent)?;
    let known = |ip: Ipv4Addr| move |mesh: &Mesh| mesh.has(ip);
    wait(&mesh, known(address(PODS - 1)), Duration::from_mins(1))?;

    for (name, rounds, pause) in [("one change every 2 s", 60, 2000), ("ten changes a second", 600, 100)] {
        thread::sleep(Duration::from_secs(3));
        let (cpu, start) = (used(pid)?, Instant::now());
        let mut latencies = Vec::new();
        for round in 0..rounds {
            let due = start + Duration::from_millis(pause) * round;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let ip = Ipv4Addr::new(10, 200 + u8::from(pause < 1000), (round / 250) as u8, (1 + round % 250) as u8);
            let sent = Instant::now();
            api.change(LOCAL + round as usize, ip);
            wait(&mesh, known(ip), Duration::from_secs(10))?;
            latencies.push(sent.elapsed());
        }
        let share = 100.0 * (used(pid)? - cpu) / start.elapsed().as_secs_f64();
        latencies.sort();
        println!(
            "{name}: into the BPF map in {:?} (median), {:?} (99 %), {:?} (worst of {}); {share:.1} % of a core; {} MiB resident",
            latencies[latencies.len() / 2],
            latencies[latencies.len() * 99 / 100],
            latencies[latencies.len() - 1],
            latencies.len(),
            resident(pid)?
        );
        ensure!(latencies[latencies.len() - 1] < Duration::from_secs(10));
    }
    Ok(())
}

/// Waits until the map is so.
pub fn wait(mesh: &Mesh, holds: impl Fn(&Mesh) -> bool, within: Duration) -> Result<()> {
    let start = Instant::now();
    while !holds(mesh) {
        ensure!(start.elapsed() < within, "not in the map within {within:?}");
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
