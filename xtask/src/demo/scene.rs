//! The pods, their programs, and what is observed of them. The same calls for both halves of the demo.

use std::{fs::File, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use testbed::{
    Agent, AgentOptions, Capture, Iperf, MeshConfig, Mode, Nginx, Pod, Redis, Sniffer, SnifferOptions, Testbed, pace,
};

use crate::ui::Step;

/// What nginx serves; the sniffer looks for it.
const PAGE: &str = "account-balance-4711-confidential";
/// What redis holds; the sniffer looks for it.
const VALUE: &str = "session-token-0815-confidential";
/// Requests of curl in each half.
const REQUESTS: usize = 5;
/// A file that takes longer to fetch than anybody waits.
const ENDLESS: u64 = 1 << 30;
const HTTP: u16 = 8080;
const REDIS: u16 = 6379;
const IPERF: u16 = 5201;

/// Two nodes and their pods.
pub(super) struct Scene {
    testbed: Testbed,
    client: Pod,
    /// Not in the mesh.
    outside: Pod,
    web: Pod,
    cache: Pod,
    bulk: Pod,
    nginx: Nginx,
    redis: Redis,
    iperf: Iperf,
    /// Lines of nginx's log already looked at.
    logged: usize,
}

/// What was seen in one half.
#[derive(Debug, Serialize)]
pub(super) struct Observation {
    /// On the wire between the nodes, while curl and redis-cli talked.
    pub(super) wire: Capture,
    /// Client addresses in nginx's log.
    pub(super) sources: Vec<String>,
    /// The client's own address.
    pub(super) client: String,
    /// Whether a pod outside the mesh got the page.
    pub(super) outside_served: bool,
    /// iperf3, gigabits per second.
    pub(super) gigabits: f64,
    /// redis-benchmark, GET requests per second.
    pub(super) requests: f64,
}

/// A live connection as the agents on both sides know it.
#[derive(Debug, Serialize)]
pub(super) struct Tunnel {
    /// At the client's agent.
    pub(super) outbound: Value,
    /// At the server's agent.
    pub(super) inbound: Value,
    /// Tunnels that the server's agent has accepted after mutual authentication.
    pub(super) accepted: u64,
    /// What the kernel says of it in the client's pod and in the server's.
    pub(super) kernel: [KernelView; 2],
}

/// What the kernel itself says of a pod's tunnels.
#[derive(Debug, Serialize)]
pub(super) struct KernelView {
    /// `/proc/net/tls_stat`: sockets that send with kernel TLS now.
    pub(super) sending: u64,
    /// The same for receiving.
    pub(super) receiving: u64,
    /// `/proc/net/tls_stat`: records that could not be opened.
    pub(super) decrypt_errors: u64,
    /// Sockets of the tunnel that `ss -tie` shows with kernel TLS both ways.
    pub(super) sockets: usize,
}

impl KernelView {
    fn of(pod: &Pod) -> Result<Self> {
        let stat = pod.tls_stat()?;
        let number = |name: &str| stat.get(name).copied().unwrap_or(0);
        Ok(Self {
            sending: number("TlsCurrTxSw"),
            receiving: number("TlsCurrRxSw"),
            decrypt_errors: number("TlsDecryptError"),
            sockets: pod.ktls_sockets()?,
        })
    }
}

impl Scene {
    /// Starts the programs.
    pub(super) fn set() -> Result<Self> {
        let testbed = Testbed::new("demo")?;
        let (a, b) = (testbed.node("a"), testbed.node("b"));
        let (client, outside) = (a.pod("client")?, a.pod("outside")?);
        let (web, cache, bulk) = (b.pod("web")?, b.pod("cache")?, b.pod("bulk")?);
        let nginx = Nginx::start(&web, HTTP, &format!("{PAGE}\n"))?;
        File::create(nginx.root().join("endless"))
            .and_then(|file| file.set_len(ENDLESS))
            .context("making a large file")?;
        let (redis, iperf) = (Redis::start(&cache, REDIS)?, Iperf::start(&bulk, IPERF)?);
        Ok(Self { testbed, client, outside, web, cache, bulk, nginx, redis, iperf, logged: 0 })
    }

    /// Lets the programs talk and watches.
    pub(super) fn observe(&mut self, step: &Step, seconds: u32) -> Result<Observation> {
        step.now("curl and redis-cli, with a sniffer between the nodes");
        let options = SnifferOptions::markers([PAGE, VALUE]).on("wire");
        let sniffer = Sniffer::start(self.testbed.node("a").namespace(), &options)?;
        for _ in 0..REQUESTS {
            let page = self.client.check(&["curl", "-sS", "--max-time", "15", &self.page()])?;
            ensure!(page.trim() == PAGE, "curl got {page:?}");
        }
        let cache = self.cache.ipv4().to_string();
        self.client.check(&["redis-cli", "-h", &cache, "SET", "session", VALUE])?;
        let value = self.client.check(&["redis-cli", "-h", &cache, "GET", "session"])?;
        ensure!(value.trim() == VALUE, "redis-cli got {value:?}");
        let wire = sniffer.stop()?;

        step.now("a client outside the mesh");
        let outside = self.outside.run(&["curl", "-sS", "--max-time", "4", &self.page()], Duration::from_secs(20))?;
        let outside_served = outside.status.success();
        // Whatever nginx logged until now is from the requests above, in order.
        let expected = REQUESTS + usize::from(outside_served);
        let lines = self.nginx.access_log(self.logged + expected)?.split_off(self.logged);
        self.logged += expected;
        let address = |line: &String| line.split(' ').next().unwrap_or_default().to_owned();
        let sources = lines.iter().take(REQUESTS).map(address).collect();

        step.now("iperf3");
        let gigabits = Iperf::measure(&self.client, &self.bulk.ipv4().to_string(), IPERF, seconds)?;
        step.now("redis-benchmark");
        let requests = self.request_rate(&cache)?;
        Ok(Observation { wire, sources, client: self.client.ipv4().to_string(), outside_served, gigabits, requests })
    }

    /// Starts an agent on each node; every pod but `outside` is enrolled, and refuses plaintext.
    pub(super) fn start_agents(&self, binary: &Path) -> Result<[Agent; 2]> {
        let mut mesh = MeshConfig::new(self.testbed.dir().join("ca"));
        mesh.mode = Mode::Strict;
        for pod in [&self.client, &self.web, &self.cache, &self.bulk] {
            mesh.enroll(pod);
        }
        mesh.plain(&self.outside);
        let start = |name: &str| {
            let node = self.testbed.node(name);
            Agent::start(node, binary, &mesh.document(node), AgentOptions::default())
        };
        Ok([start("a")?, start("b")?])
    }

    /// Holds a connection open and asks both agents about it.
    pub(super) fn look_at_tunnel(&self, agents: &[Agent; 2]) -> Result<Tunnel> {
        const WITHIN: Duration = Duration::from_secs(15);
        let url = format!("{}endless", self.page());
        let _slow = self.client.spawn(&["curl", "-sS", "--limit-rate", "100k", "-o", "/dev/null", &url])?;
        let destination = format!("{}:{HTTP}", self.web.ipv4());
        let find = |agent: &Agent, direction: &str| {
            let is_it = |c: &&Value| c["direction"] == direction && c["original_destination"] == *destination;
            let connections = agent.wait_connections(WITHIN, |all| all.iter().any(|c| is_it(&c)))?;
            let found = connections.iter().find(is_it).cloned();
            found.with_context(|| format!("no {direction} connection to {destination}"))
        };
        let (outbound, inbound) = (find(&agents[0], "outbound")?, find(&agents[1], "inbound")?);
        let counters = agents[1].counters()?;
        let accepted = counters["agent"]["tunnels_in"].as_u64();
        let accepted = accepted.with_context(|| format!("no tunnels_in in {counters}"))?;
        let kernel = [KernelView::of(&self.client)?, KernelView::of(&self.web)?];
        Ok(Tunnel { outbound, inbound, accepted, kernel })
    }

    /// Whether the servers are still the processes that were started before the agents.
    pub(super) fn programs_unchanged(&self) -> bool {
        [&self.nginx.process, &self.redis.process, &self.iperf.process].iter().all(|process| process.status().is_none())
    }

    /// Ends everything; the testbed's id, to look for leftovers.
    pub(super) fn end(self) -> String {
        self.testbed.id().to_owned()
    }

    fn page(&self) -> String {
        format!("http://{}:{HTTP}/", self.web.ipv4())
    }

    /// GET requests per second of redis-benchmark over 16 connections.
    fn request_rate(&self, cache: &str) -> Result<f64> {
        let requests = pace::scaled(20_000).to_string();
        let text = self.client.run(
            &["redis-benchmark", "-h", cache, "-t", "get", "-n", &requests, "-c", "16", "--csv"],
            pace::patience(Duration::from_secs(90)),
        )?;
        let text = text.success()?;
        let rate = text.lines().find_map(|line| line.strip_prefix("\"GET\",\"")?.split('"').next()?.parse().ok());
        rate.with_context(|| format!("redis-benchmark printed no rate: {text}"))
    }
}
