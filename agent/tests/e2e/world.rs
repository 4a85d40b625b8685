//! The usual stage: a client on node a, a server on node b, an agent on each.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use testbed::{
    Agent, AgentOptions, Capture, MeshConfig, Node, Pod, Process, Sniffer, SnifferOptions, Testbed, pace::patience,
    underpass_path,
};

/// Text that only occurs in plaintext; every test's payload carries it.
pub const MARKER: &str = "plaintext-marker-7d1f";

/// Two agents, a client pod, a server pod, and a VIP (number 1, port 80 to 8080) in front of the server. Fields drop in order.
pub struct World {
    pub a: Agent,
    pub b: Agent,
    pub client: Pod,
    pub server: Pod,
    pub mesh: MeshConfig,
    pub bed: Testbed,
}

/// A world whose agents do not run yet.
pub struct Stage {
    pub client: Pod,
    pub server: Pod,
    pub mesh: MeshConfig,
    pub bed: Testbed,
}

impl Stage {
    pub fn new(label: &str) -> Result<Self> {
        let bed = Testbed::new(label)?;
        let client = bed.node("a").pod("client")?;
        let server = bed.node("b").pod("server")?;
        let mut mesh = MeshConfig::new(bed.dir().join("ca"));
        mesh.enroll(&client);
        mesh.enroll(&server);
        mesh.service("web", 1, &[(80, 8080)], &[&server]);
        Ok(Self { client, server, mesh, bed })
    }

    pub fn start(self) -> Result<World> {
        self.start_with(&[])
    }

    pub fn start_with(self, arguments: &[&str]) -> Result<World> {
        let a = start_agent(&self.mesh, self.bed.node("a"), arguments)?;
        let b = start_agent(&self.mesh, self.bed.node("b"), arguments)?;
        Ok(World { a, b, client: self.client, server: self.server, mesh: self.mesh, bed: self.bed })
    }
}

pub fn start_agent(mesh: &MeshConfig, node: &Node, arguments: &[&str]) -> Result<Agent> {
    let options =
        AgentOptions { arguments: arguments.iter().map(|s| (*s).to_owned()).collect(), ..AgentOptions::default() };
    Agent::start(node, &underpass_path()?, &mesh.document(node), options)
}

impl World {
    pub fn new(label: &str) -> Result<Self> {
        Stage::new(label)?.start()
    }

    /// Writes the mesh as it is now to both agents and waits until both have taken it.
    pub fn reload(&self) -> Result<()> {
        for (agent, node) in [(&self.a, "a"), (&self.b, "b")] {
            let before = generation(&agent.status()?)?;
            agent.write_config(&self.mesh.document(self.bed.node(node)))?;
            agent.wait_status(Duration::from_secs(20), |s| Ok(generation(s)? > before))?;
        }
        Ok(())
    }

    /// Sniffs both nodes' traffic on the wire for [`MARKER`].
    pub fn sniff(&self) -> Result<Sniffer> {
        sniff(&self.bed)
    }
}

pub fn generation(status: &Value) -> Result<u64> {
    status["generation"].as_u64().with_context(|| format!("no generation in {status}"))
}

/// Starts `testbed-app serve` and waits until it listens.
pub fn serve(pod: &Pod, port: u16, arguments: &[&str]) -> Result<Process> {
    let listen = format!("[::]:{port}");
    let mut all = vec!["serve", listen.as_str()];
    all.extend_from_slice(arguments);
    let process = pod.app(&all)?;
    process.wait_json("listening", Duration::from_secs(20))?;
    Ok(process)
}

pub fn sniff(bed: &Testbed) -> Result<Sniffer> {
    Sniffer::start(bed.node("a").namespace(), &SnifferOptions::markers([MARKER]).on("wire"))
}

/// The capture shows a tunnel and nothing else: no marker, no TCP payload on another port, nothing missed.
pub fn assert_encrypted(capture: &Capture) -> Result<()> {
    ensure!(capture.dropped_by_kernel == 0, "the sniffer missed packets: {capture:?}");
    ensure!(capture.tls_application_records > 0, "no TLS records on the tunnel's port: {capture:?}");
    ensure!(capture.marker_hits == 0, "plaintext on the wire: {capture:?}");
    ensure!(capture.plaintext_payload == 0, "TCP payload outside the tunnel: {capture:?}");
    Ok(())
}

/// The sniffer can see plaintext when there is some: the positive control.
pub fn assert_plaintext_seen(capture: &Capture) -> Result<()> {
    ensure!(capture.marker_hits > 0, "the control saw no plaintext: {capture:?}");
    ensure!(capture.tcp_15008_payload == 0, "a tunnel without agents? {capture:?}");
    Ok(())
}

pub fn at(ip: impl Into<IpAddr>, port: u16) -> String {
    SocketAddr::new(ip.into(), port).to_string()
}

/// Runs `testbed-app` and requires success.
pub fn app(pod: &Pod, arguments: &[&str]) -> Result<Value> {
    let output = pod.app(arguments)?.output(Duration::from_secs(90))?;
    let value = output.last_json();
    ensure!(output.status.success(), "testbed-app {arguments:?} in {}: {value:?} {}", pod.name(), output.stderr);
    value
}

/// Runs `testbed-app`, which has to fail, and returns the name of the error.
pub fn app_error(pod: &Pod, arguments: &[&str]) -> Result<String> {
    let output = pod.app(arguments)?.output(Duration::from_secs(90))?;
    let value = output.last_json()?;
    ensure!(!output.status.success(), "testbed-app {arguments:?} in {} succeeded: {value}", pod.name());
    value["error"].as_str().map(ToOwned::to_owned).with_context(|| format!("no error in {value}"))
}

/// One of the agent's counters; refusals as `refused.<reason>`, BPF counters as `bpf.<name>`.
pub fn counter(agent: &Agent, path: &str) -> Result<u64> {
    let all = agent.counters()?;
    let root = if path.starts_with("bpf.") { &all } else { &all["agent"] };
    let found = path.split('.').try_fold(root, |v, key| v.get(key));
    Ok(found.and_then(Value::as_u64).unwrap_or(0))
}

/// Waits until `check` succeeds; what it waits for happens in another process that announces nothing.
pub fn eventually(within: Duration, mut check: impl FnMut() -> Result<()>) -> Result<()> {
    let within = patience(within);
    let deadline = Instant::now() + within;
    loop {
        match check() {
            Ok(()) => return Ok(()),
            Err(e) if Instant::now() > deadline => return Err(e.context(format!("not within {within:?}"))),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Waits until a counter is at least `least`.
pub fn wait_counter(agent: &Agent, path: &str, least: u64) -> Result<()> {
    eventually(Duration::from_secs(10), || {
        let now = counter(agent, path)?;
        ensure!(now >= least, "{path} is {now}, not {least}; log:\n{}", agent.log());
        Ok(())
    })
}

/// What the agent says that tunnels use: `ktls`, or `user` with a reason. Where the tests are told to expect kernel TLS, it has to be.
pub fn data_path(agent: &Agent) -> Result<String> {
    let status = agent.status()?;
    let path = status["data_path"].as_str().with_context(|| format!("no data path in {status}"))?.to_owned();
    let expected = std::env::var_os("UNDERPASS_TEST_KTLS").is_some();
    ensure!(path == "ktls" || !expected, "kernel TLS is expected here: {}", status["ktls"]);
    ensure!(path == "ktls" || status["ktls"]["reason"].is_string(), "no reason: {}", status["ktls"]);
    Ok(path)
}

/// Number of live connections in an agent's table.
pub fn live(agent: &Agent) -> Result<u64> {
    let all = agent.connections()?;
    all["total"].as_u64().with_context(|| format!("no total in {all}"))
}
