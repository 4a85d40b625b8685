//! `underpass run`.

use std::{net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, ValueEnum};
use procfs::Current as _;
use underpass_abi::capacity;

use super::{DEFAULT_PIN_ROOT, DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, exit::EXIT_CODES};
use crate::{capture::TcMode, telemetry::Traffic};

/// Arguments of `underpass run`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES}

The agent runs until SIGTERM or SIGINT. The pods' traffic stays captured afterwards:
without an agent it is refused, not sent in plaintext, and the next agent takes over.
Use --cleanup-on-exit, or `underpass cleanup` later, to end that.

Examples:
  underpass run --config /etc/underpass/node.yaml
  underpass run --config node.yaml --cgroup /sys/fs/cgroup/pods --log debug"))]
#[expect(clippy::struct_excessive_bools, reason = "each is an option of its own")]
pub struct RunArgs {
    /// The node's configuration (YAML, see docs/configuration.md). Watched for changes.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// This node's name, instead of the one in the configuration: many nodes can then share it.
    #[arg(long, value_name = "NAME", env = "UNDERPASS_NODE")]
    pub node: Option<String>,
    /// cgroup v2 directory above the pods' cgroups, where the hooks attach [default: kubepods* in the cgroup v2 mount].
    #[arg(long, value_name = "PATH", env = "UNDERPASS_CGROUP")]
    pub cgroup: Option<PathBuf>,
    /// Directory on bpffs for programs and maps; they outlive the agent.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_PIN_ROOT)]
    pub pin_root: PathBuf,
    /// Directory for the last good configuration.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_STATE_DIR)]
    pub state_dir: PathBuf,
    /// Directory for the admin socket (PATH/admin.sock), and on a tmpfs for certificates of a restart; one agent per directory.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_RUN_DIR, env = "UNDERPASS_RUN_DIR")]
    pub run_dir: PathBuf,
    /// Certificate revocation lists (PEM, one or several), where the configuration has no crlFile. Watched for changes.
    #[arg(long, value_name = "FILE", env = "CRL_PATH")]
    pub crl_file: Option<PathBuf>,
    /// How tc programs attach: tcx needs Linux 6.6; auto takes it where it is, else clsact.
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    pub tc: TcMode,
    /// Forward log lines of the BPF programs. Slower.
    #[arg(long)]
    pub bpf_log: bool,
    /// Threads that move bytes [default: one per core].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub relay_threads: Option<u16>,
    /// Who protects the tunnels' records: auto leaves it to the kernel where it can, off keeps it in the agent. Slower, not weaker.
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    pub ktls: KtlsMode,
    /// Records that one key protects before it is replaced; where the kernel cannot replace keys (before Linux 6.14) the connection
    /// then ends with a reset [default: half of what the cipher can bear, or all of it without replacement].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(16..))]
    pub records_per_key: Option<u64>,
    /// Whether connections resume earlier TLS sessions of the same two identities; off makes each one a full handshake: slower, and
    /// no ticket is sent or used. Policies are evaluated on every connection in either case.
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    pub resumption: Resumption,
    /// Follow an agent that runs with the same --run-dir and --pin-root: take its pods over without a moment in which nobody accepts.
    /// Its live connections stay with it until they end.
    #[arg(long)]
    pub take_over: bool,
    /// On SIGTERM or SIGINT, how long live connections may go on, e.g. 30s; a second signal ends them at once. Without another agent
    /// that takes over, new connections are served meanwhile, too.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = pause)]
    pub drain_timeout: Duration,
    /// Install the CNI plugin on the node, keep it there, and answer it: a pod of the mesh starts when it is captured.
    #[arg(long, help_heading = "Kubernetes")]
    pub cni: bool,
    /// The node's directory for CNI plugins.
    #[arg(long, value_name = "PATH", default_value = "/opt/cni/bin", help_heading = "Kubernetes")]
    pub cni_bin_dir: PathBuf,
    /// The node's directory for CNI configurations.
    #[arg(long, value_name = "PATH", default_value = "/etc/cni/net.d", help_heading = "Kubernetes")]
    pub cni_conf_dir: PathBuf,
    /// The configuration to chain the plugin into [default: the one that the runtime uses, which is the first by name].
    #[arg(long, value_name = "FILE", help_heading = "Kubernetes")]
    pub cni_conf_name: Option<String>,
    /// Namespaces whose pods start also when no agent answers; the agent's own is always one of them.
    #[arg(
        long,
        value_name = "NAMESPACE",
        value_delimiter = ',',
        default_value = "kube-system",
        help_heading = "Kubernetes"
    )]
    pub cni_exempt: Vec<String>,
    /// The plugin to install [default: underpass-cni beside this program].
    #[arg(long, value_name = "PATH", help_heading = "Kubernetes")]
    pub cni_plugin: Option<PathBuf>,
    /// The agent's own namespace.
    #[arg(long, value_name = "NAMESPACE", env = "UNDERPASS_NAMESPACE", help_heading = "Kubernetes")]
    pub namespace: Option<String>,
    /// A `ConfigMap` whose key `uninstall` asks the agent to give everything back (see `underpass uninstall`).
    #[arg(long, value_name = "NAMESPACE/NAME", help_heading = "Kubernetes")]
    pub uninstall_configmap: Option<ObjectName>,
    /// Give the pods plain traffic back on SIGTERM or SIGINT, instead of keeping capture in place (fail closed).
    #[arg(long)]
    pub cleanup_on_exit: bool,
    /// Connections of one pod at once: as many outbound, as many from authenticated peers, and as
    /// many in plaintext that a policy let in; more are refused.
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub max_connections_per_pod: u32,
    /// TLS handshakes of one pod at once, for each direction. When there are more, a peer that has
    /// been silent loses its place; a quarter is one source's share, and as many connections at
    /// once are made to one destination.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_pending_per_pod: u32,
    /// Most addresses and networks of the mesh that the kernel is told of, each some 128 bytes; with more, every connection of the
    /// node's pods goes through the agent [default: what a sixteenth of the node's memory holds, at most 1048576]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=capacity::MESH as i64))]
    pub mesh_entries: Option<u32>,
    /// Longest time for a TLS handshake and the header after it, e.g. 500ms, 10s.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = limit)]
    pub handshake_timeout: Duration,
    /// Longest time for a TCP connect to a peer or an application, e.g. 500ms, 10s.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = limit)]
    pub connect_timeout: Duration,
    /// Address for operators on the node: `/config_dump`, `/logging`, `/quitquitquit`; loopback only, or off.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15000", value_parser = loopback)]
    pub admin_addr: Endpoint,
    /// Address for metrics (/metrics, /stats/prometheus), or off. They name workloads and identities to whoever reaches it, so only
    /// the node itself does unless you say otherwise, e.g. `[::]:15020`.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15020")]
    pub metrics_addr: Endpoint,
    /// Address for the kubelet's probes (/healthz/ready, /healthz/live), or off.
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:15021")]
    pub health_addr: Endpoint,
    /// Samples of Istio's TCP metrics at once; connections beyond that are counted together.
    #[arg(long, value_name = "N", default_value_t = 8_000, value_parser = clap::value_parser!(u32).range(Traffic::MIN_LIMIT as i64..=1_000_000))]
    pub max_series: u32,
    /// Whether connections have a line on standard output where the configuration does not say so.
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    pub access_log: Switch,
}

/// Kernel memory for an entry of `MESH`: a node of the trie for the entry and one where paths part, 64 bytes each
/// (`struct lpm_trie_node` with 20 bytes of key and 4 of value, as slabs of Linux 6.18 have it).
const MESH_ENTRY_BYTES: u64 = 128;

impl RunArgs {
    /// Most entries of `MESH`.
    pub fn mesh_entries(&self) -> usize {
        let fits = |memory: u64| usize::try_from(memory / 16 / MESH_ENTRY_BYTES).unwrap_or(usize::MAX);
        match (self.mesh_entries, procfs::Meminfo::current()) {
            (Some(entries), _) => entries as usize,
            (None, Ok(memory)) => fits(memory.mem_total).min(capacity::MESH),
            (None, Err(error)) => {
                tracing::warn!(%error, "cannot tell how much memory there is; --mesh-entries stays at its maximum");
                capacity::MESH
            }
        }
    }
}

/// Where to listen, if at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// Nowhere.
    Off,
    /// There; port 0 is one that the kernel chooses and the log tells.
    At(SocketAddr),
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self::Off);
        }
        text.parse()
            .map(Self::At)
            .map_err(|_| "write ADDRESS:PORT, like 127.0.0.1:15000 or [::]:15020, or off".to_owned())
    }
}

/// `--access-log`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Yes.
    #[default]
    On,
    /// No.
    Off,
}

/// The admin port ends the agent and tells everything, to anybody who reaches it.
fn loopback(text: &str) -> Result<Endpoint, String> {
    match text.parse()? {
        Endpoint::At(address) if !address.ip().is_loopback() => {
            Err("whoever reaches it can end the agent: use a loopback address, like 127.0.0.1:15000, or off".to_owned())
        }
        endpoint => Ok(endpoint),
    }
}

/// `--ktls`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum KtlsMode {
    /// The kernel, where it can.
    #[default]
    Auto,
    /// The agent.
    Off,
}

/// `--resumption`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Resumption {
    /// Sessions are resumed.
    #[default]
    On,
    /// Every handshake is a full one.
    Off,
}

/// `namespace/name` of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectName {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl FromStr for ObjectName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err("write NAMESPACE/NAME, like underpass-system/underpass-uninstall".to_owned()),
        }
    }
}

/// A time that may be none, and at most an hour.
fn pause(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text).map_err(|e| format!("{e}; write a number and a unit, like 10s"))?;
    if duration > Duration::from_hours(1) {
        return Err("must be at most 1h".to_owned());
    }
    Ok(duration)
}

/// A deadline: positive and at most an hour.
fn limit(text: &str) -> Result<Duration, String> {
    match pause(text)? {
        Duration::ZERO => Err("must be more than 0s".to_owned()),
        duration => Ok(duration),
    }
}
