//! One system with everything that it needs, in two nodes of its own, so that systems do not meet.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use testbed::{Agent, AgentOptions, MeshConfig, Mode, Node, Pod, Process, Testbed};

use super::{
    case::{Case, Way},
    certificates::Certificates,
    proxies::{End, Side},
    system::{Kind, System},
    wireguard,
};

/// Where the application listens, on every address.
const APPLICATION: u16 = 7000;
/// Where the proxy beside the server listens, on the pod's address.
const TUNNEL: u16 = 7443;
/// Where proxies beside the client listen, on the loopback interface; one for each way.
const ENTRANCES: [u16; 2] = [7100, 7101];
/// Kernel parameters of every pod and node, the same for all systems: new connections must not run out of ports, nor begin with what earlier ones
/// learnt about the network. Ports of the agent, of the proxies and of the application are below the range.
pub(super) const SYSCTLS: [(&str, &str); 3] = [
    ("net.ipv4.ip_local_port_range", "16384 65535"),
    ("net.ipv4.tcp_tw_reuse", "1"),
    ("net.ipv4.tcp_no_metrics_save", "1"),
];
const START: Duration = Duration::from_secs(20);

/// Programs and numbers that all lanes share.
pub(super) struct Tools {
    pub(super) load: PathBuf,
    pub(super) agent: PathBuf,
    /// The agent of `--against`.
    pub(super) against: Option<PathBuf>,
    /// Processors of the machine.
    pub(super) processors: usize,
    /// Descriptors of a process.
    pub(super) descriptors: u64,
}

/// A system, ready to be measured. Fields are dropped in this order.
pub(super) struct Lane {
    pub(super) system: System,
    pub(super) cold: bool,
    proxies: Vec<Process>,
    agents: Vec<Agent>,
    /// Behind them the applications, one per way.
    _servers: Vec<Process>,
    client: Pod,
    servers: [Pod; 2],
    load: PathBuf,
    testbed: Testbed,
}

impl Lane {
    /// Starts the applications and the system between them.
    pub(super) fn start(system: &System, cold: bool, tools: &Tools) -> Result<Self> {
        let testbed = Testbed::new("bench")?;
        let (a, b) = (testbed.node("a").clone(), testbed.node("b").clone());
        let client = a.pod("client")?;
        let servers = [b.pod("far")?, a.pod("near")?];
        let namespaces =
            [client.namespace(), servers[0].namespace(), servers[1].namespace(), a.namespace(), b.namespace()];
        namespaces.iter().try_for_each(|namespace| namespace.sysctl(&SYSCTLS))?;
        let applications = servers.iter().map(|pod| application(pod, system, tools)).collect::<Result<Vec<_>>>()?;
        let mut lane = Self {
            system: system.clone(),
            cold,
            proxies: Vec::new(),
            agents: Vec::new(),
            _servers: applications,
            client,
            servers,
            load: tools.load.clone(),
            testbed,
        };
        lane.start_system(tools).with_context(|| format!("starting {}", system.name))?;
        Ok(lane)
    }

    #[expect(clippy::redundant_closure_for_method_calls, reason = "the method's path has one lifetime only")]
    fn start_system(&mut self, tools: &Tools) -> Result<()> {
        let kind = self.system.kind.clone();
        match kind {
            Kind::Plain | Kind::OwnKtls => Ok(()),
            Kind::WireGuard => wireguard::join(self.testbed.node("a"), self.testbed.node("b"), self.testbed.dir()),
            Kind::Nginx => self.pairs(|end| end.nginx(tools.processors, tools.descriptors)),
            Kind::Stunnel => self.pairs(|end| end.stunnel()),
            Kind::Peer(peer) => self.pairs(|end| end.peer(&peer)),
            Kind::Underpass { ktls, against } => {
                let binary =
                    if against { tools.against.as_ref().context("no agent to compare with")? } else { &tools.agent };
                let mut mesh = MeshConfig::new(self.testbed.dir().join("ca"));
                mesh.mode = Mode::Strict;
                for pod in [&self.client, &self.servers[0], &self.servers[1]] {
                    mesh.enroll(pod);
                }
                let mut arguments = vec!["--ktls".to_owned(), if ktls { "auto" } else { "off" }.to_owned()];
                if self.cold {
                    arguments.extend(["--resumption".to_owned(), "off".to_owned()]);
                }
                for name in ["a", "b"] {
                    let node = self.testbed.node(name);
                    let options = AgentOptions { arguments: arguments.clone(), ..AgentOptions::default() };
                    self.agents.push(Agent::start(node, binary, &mesh.document(node), options)?);
                }
                Ok(())
            }
        }
    }

    /// Starts a pair of proxies for each way.
    fn pairs(&mut self, start: impl Fn(&End<'_>) -> Result<Process>) -> Result<()> {
        let certificates = Certificates::make(self.testbed.dir().join("certificates"))?;
        for (server, entrance) in self.servers.iter().zip(ENTRANCES) {
            let tunnel = SocketAddr::from((server.ipv4(), TUNNEL));
            let loopback = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            let ends = [
                (Side::Server, server, tunnel, loopback(APPLICATION)),
                (Side::Client, &self.client, loopback(entrance), tunnel),
            ];
            for (side, pod, listen, target) in ends {
                let directory = pod.dir(&format!("{}-{}", side.name(), server.name()))?;
                let certificates = &certificates;
                let end = End { pod, side, listen, target, cold: self.cold, certificates, directory };
                self.proxies.push(start(&end)?);
            }
        }
        Ok(())
    }

    /// A load generator in the client's pod, with the address to talk to.
    pub(super) fn load(&self, command: &str, way: Way) -> Command {
        let index = usize::from(way == Way::SameNode);
        let target: SocketAddr = match self.system.kind {
            Kind::Nginx | Kind::Stunnel | Kind::Peer(_) => (Ipv4Addr::LOCALHOST, ENTRANCES[index]).into(),
            _ => (self.servers[index].ipv4(), APPLICATION).into(),
        };
        let mut load = self.client.command(&self.load);
        load.arg(command).arg(target.to_string());
        if self.system.kind == Kind::OwnKtls {
            load.arg("--ktls");
        }
        load
    }

    /// cgroups, by whose programs are in them: the applications, and what carries their connections.
    pub(super) fn groups(&self) -> Vec<(&'static str, PathBuf)> {
        self.nodes().flat_map(|node| [("applications", node.pods_cgroup()), ("proxies", node.own_cgroup())]).collect()
    }

    /// Processes that carry the connections, on both sides.
    pub(super) fn carriers(&self) -> Result<Vec<u32>> {
        let mut all = Vec::new();
        for node in self.nodes() {
            let file = node.own_cgroup().join("cgroup.procs");
            let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
            all.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
        }
        Ok(all)
    }

    /// Makes sure that the connections went the way whose cost is told.
    pub(super) fn verify(&self) -> Result<()> {
        let Kind::Underpass { ktls, .. } = self.system.kind else { return Ok(()) };
        for agent in &self.agents {
            let status = agent.status()?;
            let path = &status["data_path"];
            let expected = if ktls { "ktls" } else { "user" };
            ensure!(
                path.as_str() == Some(expected),
                "an agent's data path is {path}, not {expected}: {}",
                status["ktls"]
            );
        }
        let carried: u64 = self.agents.iter().map(tunnels).sum::<Result<u64>>()?;
        ensure!(carried > 0, "the agents carried no connection");
        Ok(())
    }

    fn nodes(&self) -> impl Iterator<Item = &Node> {
        ["a", "b"].into_iter().map(|name| self.testbed.node(name))
    }

    /// Whether it is what a case has to be measured on.
    pub(super) fn is_for(&self, case: &Case) -> bool {
        self.cold == case.cold && self.system.has(case)
    }
}

fn application(pod: &Pod, system: &System, tools: &Tools) -> Result<Process> {
    let mut serve = pod.command(&tools.load);
    serve.args(["serve", &format!("0.0.0.0:{APPLICATION}"), "--threads", &tools.processors.to_string()]);
    if system.kind == Kind::OwnKtls {
        serve.arg("--ktls");
    }
    let process = Process::spawn(&mut serve)?;
    process.wait_json("listening", START)?;
    Ok(process)
}

/// Connections that an agent has accepted from another.
fn tunnels(agent: &Agent) -> Result<u64> {
    let counters = agent.counters()?;
    counters["agent"]["tunnels_in"].as_u64().with_context(|| format!("no tunnels_in in {counters}"))
}
