//! Two nodes with an agent each, a pod on each, and processes in them that are the ends of connections.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use testbed::{
    Agent, AgentOptions, BadWire, Impairment, MeshConfig, Mode, Pod, Process, Testbed, pace::patience, torture::Report,
};

use super::memory::Pressure;
use crate::places;

/// Where servers listen; a second one is for servers that are killed.
pub(super) const PORT: u16 = 9000;
/// How long all ends of connections may take until they have reported, beyond the time for which connections are made.
const REPORT: Duration = Duration::from_mins(5);
/// How long the agents may take to forget connections that are over.
const FORGET: Duration = Duration::from_secs(40);
/// What a connection has of descriptors.
const OF_CONNECTIONS: [&str; 2] = ["socket", "pipe"];
/// How many of these an agent may have more after a scenario than before: 64 sockets for the next connections to other agents, as many for
/// those to applications, 16 pipes for each of two threads, clients of its socket.
const KEPT_DESCRIPTORS: usize = 200;

/// What a scenario wants of the scene.
#[derive(Default)]
pub(super) struct Setup {
    /// Arguments of both agents.
    pub(super) arguments: Vec<String>,
    /// Kernel parameters in both pods.
    pub(super) sysctls: &'static [(&'static str, &'static str)],
    /// Packets on `lo` in both pods are as small as on other interfaces.
    pub(super) small_packets: bool,
    /// The wire is bad.
    pub(super) impairment: Option<Impairment>,
    /// The agents' sockets get little memory.
    pub(super) memory: bool,
}

/// See the module. Fields are dropped in this order.
pub(super) struct Scene {
    agents: Vec<Agent>,
    wire: Option<BadWire>,
    pressure: Option<Pressure>,
    client: Pod,
    server: Pod,
    bed: Testbed,
    /// Descriptors of each agent at the start.
    descriptors: Vec<Descriptors>,
}

/// How many descriptors there are of each kind.
type Descriptors = BTreeMap<String, usize>;

impl Scene {
    /// Starts the agents, if there is one to start. `machine` belongs to nobody else.
    pub(super) fn start(agent: Option<&Path>, setup: &Setup, seed: u64, machine: bool) -> Result<Self> {
        let bed = Testbed::new("torture")?;
        let (client, server) = (bed.node("a").pod("client")?, bed.node("b").pod("server")?);
        for pod in [&client, &server] {
            pod.namespace().sysctl(setup.sysctls)?;
            if setup.small_packets {
                pod.namespace().ip("link set lo mtu 1500\n")?;
            }
        }
        let wire = setup.impairment.map(|impairment| bed.impair(impairment, seed)).transpose()?;
        let mut mesh = MeshConfig::new(bed.dir().join("ca"));
        mesh.mode = Mode::Strict;
        mesh.enroll(&client);
        mesh.enroll(&server);
        let mut scene = Self { agents: Vec::new(), wire, pressure: None, client, server, bed, descriptors: Vec::new() };
        if let Some(binary) = agent {
            for name in ["a", "b"] {
                let node = scene.bed.node(name);
                let options = AgentOptions { arguments: setup.arguments.clone(), ..AgentOptions::default() };
                scene.agents.push(Agent::start(node, binary, &mesh.document(node), options)?);
            }
        }
        scene.descriptors = scene.agents.iter().map(descriptors).collect::<Result<_>>()?;
        if setup.memory {
            let pids = scene.agents.iter().map(|agent| Ok(agent.process()?.pid())).collect::<Result<Vec<_>>>()?;
            scene.pressure = Some(Pressure::start(scene.bed.id(), &pids, machine)?);
        }
        Ok(scene)
    }

    /// What is special about it, for people.
    pub(super) fn remarks(&self) -> Vec<String> {
        let wire = self.wire.as_ref().map(|wire| wire.how().to_owned());
        wire.into_iter().chain(self.pressure.as_ref().map(Pressure::how)).collect()
    }

    /// A file that ends of connections in both pods can write.
    pub(super) fn file(&self, name: &str) -> String {
        self.bed.dir().join(name).display().to_string()
    }

    /// Starts a server and waits until it listens.
    pub(super) fn serve(&self, port: u16, arguments: &[String]) -> Result<Process> {
        let listen = format!("[::]:{port}");
        let mut words = vec!["torture", "serve", &listen];
        words.extend(arguments.iter().map(String::as_str));
        let server = self.server.app(&words)?;
        server.wait_json("listening", Duration::from_secs(20))?;
        Ok(server)
    }

    /// Starts a client.
    pub(super) fn drive(&self, port: u16, arguments: &[String]) -> Result<Process> {
        let address = format!("{}:{port}", self.server.ipv4());
        let mut words = vec!["torture", "drive", &address];
        words.extend(arguments.iter().map(String::as_str));
        self.client.app(&words)
    }

    /// Waits for the report of an end that makes or takes connections for `time`.
    pub(super) fn report(&self, process: Process, time: Duration) -> Result<Report> {
        let output = process.output(time + REPORT);
        let text = output.and_then(testbed::Output::success).with_context(|| self.logs())?;
        let line = text.lines().last().unwrap_or_default();
        serde_json::from_str(line).with_context(|| format!("reading a report: {text}"))
    }

    /// The agents still run, complained of no defect, and have forgotten every connection.
    pub(super) fn settle(&self) -> Result<()> {
        for (agent, before) in self.agents.iter().zip(&self.descriptors) {
            agent
                .wait_connections(FORGET, <[Value]>::is_empty)
                .context("connections that are over stay in the table")?;
            let log = agent.log();
            if let Some(line) = log.lines().find(|line| line.contains("panicked")) {
                bail!("an agent panicked: {line}");
            }
            let now = descriptors(agent)?;
            ensure!(
                total(&now) < total(before) + KEPT_DESCRIPTORS,
                "an agent had {} sockets and pipes at its start and has {} now: {before:?}, {now:?}",
                total(before),
                total(&now)
            );
        }
        Ok(())
    }

    /// Whether the agents leave records to the kernel, and whether it can replace keys.
    pub(super) fn kernel_tls(&self) -> Result<Option<bool>> {
        let Some(agent) = self.agents.first() else { return Ok(None) };
        let status = agent.status()?;
        Ok((status["data_path"] == "ktls").then(|| status["ktls"]["rekey"] == true))
    }

    /// How many tunnels the kernel protected and how many the agents, both agents together.
    pub(super) fn tunnels(&self) -> Result<(u64, u64)> {
        self.agents.iter().try_fold((0, 0), |(kernel, user), agent| {
            let counters = agent.counters()?;
            let fallbacks = counters["agent"]["ktls_fallback"].as_object();
            let more: u64 = fallbacks.into_iter().flat_map(|all| all.values()).filter_map(Value::as_u64).sum();
            Ok((kernel + counters["agent"]["ktls"].as_u64().unwrap_or(0), user + more))
        })
    }

    /// Keeps the agents' logs, and tells where and what they say of connections that ended badly.
    pub(super) fn logs(&self) -> String {
        /// Lines of each.
        const LINES: usize = 6;
        let directory = places::target().join("torture");
        let mut text = String::new();
        for (agent, name) in self.agents.iter().zip(["a", "b"]) {
            let (path, log) = (directory.join(format!("agent-{name}.log")), agent.log());
            let kept = fs::create_dir_all(&directory).and_then(|()| fs::write(&path, &log));
            let place = kept.map_or_else(|error| format!("not kept: {error}"), |()| path.display().to_string());
            let lines: Vec<_> = log.lines().filter(|line| !line.contains("reason=\"finished\"")).collect();
            let last = lines[lines.len().saturating_sub(LINES)..].join("\n    ");
            let _ = write!(text, "\n  log of node {name}'s agent ({place}), without clean ends:\n    {last}");
        }
        text
    }
}

/// Open descriptors of an agent.
fn descriptors(agent: &Agent) -> Result<Descriptors> {
    let path = format!("/proc/{}/fd", agent.process()?.pid());
    let mut all = Descriptors::new();
    for entry in fs::read_dir(&path).with_context(|| format!("listing {path}"))? {
        // Some are closed meanwhile.
        let Ok(target) = fs::read_link(entry.with_context(|| format!("listing {path}"))?.path()) else { continue };
        // `socket:[4711]`, `anon_inode:[eventpoll]`, a path.
        let target = target.to_string_lossy();
        let kind = target.trim_end_matches(|c: char| c.is_ascii_digit() || "[]:".contains(c));
        *all.entry(kind.to_owned()).or_default() += 1;
    }
    Ok(all)
}

fn total(descriptors: &Descriptors) -> usize {
    OF_CONNECTIONS.iter().filter_map(|kind| descriptors.get(*kind)).sum()
}

/// As long as it takes here, for programs that measure time by themselves.
pub(super) fn millis(time: Duration) -> String {
    patience(time).as_millis().to_string()
}
