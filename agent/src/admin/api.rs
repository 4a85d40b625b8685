//! What goes over the socket. A public interface: fields are added, never renamed or removed.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use crate::{
    capture::{self, InterfaceGuard},
    identity::revocation::RevocationStatus,
    policy::{Peer, Query},
    relay::{ConnectionId, ConnectionInfo, DataPath},
    sources::{file::ReloadStatus, kubernetes::SourceStatus},
    telemetry::CountersSnapshot,
    tunnel::ktls::{Availability, Support},
};

/// Connections, workloads or services listed when the request names no limit.
pub const DEFAULT_LIMIT: usize = 1000;
/// Most of them listed at once.
pub const MAX_LIMIT: usize = 100_000;

/// Answer to `GET /v1/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the agent.
    pub version: String,
    /// The node's name.
    pub node: String,
    /// The node's trust domain.
    pub trust_domain: String,
    /// Number of the configuration in force, see [`crate::mesh::Snapshot::generation`].
    pub generation: u64,
    /// What new tunnels use where their cipher allows it.
    pub data_path: DataPath,
    /// What the kernel can do with the tunnels' records.
    pub ktls: KtlsStatus,
    /// This node's workloads that the configuration enrols.
    pub pods: Vec<PodStatus>,
    /// cgroups from which kubelet probes are expected.
    #[serde(default)]
    pub probe_cgroups: Vec<ProbeCgroupStatus>,
    /// Addresses from which declared probe ports take plaintext, whoever makes the connection;
    /// empty unless configured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probe_node_addresses: Vec<IpAddr>,
    /// Pods with plaintext connections that are forbidden now and could not be ended yet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plaintext_left: Vec<PlaintextLeft>,
    /// What is enforced more strictly than it is written because it is not in the BPF maps, and what to do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub capture_problems: Vec<String>,
    /// The interfaces by which packets leave this node's pods, and who guards them.
    #[serde(default)]
    pub interfaces: Vec<InterfaceStatus>,
    /// What happened to the configuration file.
    pub reload: ReloadStatus,
    /// How the Kubernetes API is followed; absent when the mesh comes from the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<SourceStatus>,
    /// Certificate revocation lists; absent without a file of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revocation: Option<RevocationStatus>,
}

impl Status {
    /// A status without what the server knows itself (version, node, trust domain, generation), which it fills in, and without
    /// what capture and cluster know.
    pub fn new(ktls: KtlsStatus, pods: Vec<PodStatus>, reload: ReloadStatus) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: String::new(),
            trust_domain: String::new(),
            generation: 0,
            data_path: if ktls.ciphers.is_empty() { DataPath::User } else { DataPath::Ktls },
            ktls,
            pods,
            probe_cgroups: Vec::new(),
            probe_node_addresses: Vec::new(),
            plaintext_left: Vec::new(),
            capture_problems: Vec::new(),
            interfaces: Vec::new(),
            reload,
            cluster: None,
            revocation: None,
        }
    }
}

/// A pod whose forbidden plaintext connections could not be ended; this is tried again until it
/// succeeds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlaintextLeft {
    /// `namespace/name`.
    pub workload: String,
    /// What forbids them: `mode` or `policy`.
    pub forbidden_by: String,
    /// How often this was tried.
    pub attempts: u32,
    /// What the last attempt ended in.
    pub error: String,
}

impl From<capture::Unswept> for PlaintextLeft {
    fn from(left: capture::Unswept) -> Self {
        Self {
            workload: left.key.to_string(),
            forbidden_by: left.cause.as_str().to_owned(),
            attempts: left.attempts,
            error: left.error,
        }
    }
}

/// An interface by which packets leave a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceStatus {
    /// `namespace/name` of the pod.
    pub workload: String,
    /// Its name, its kind, and the guard on it.
    #[serde(flatten)]
    pub guard: InterfaceGuard,
}

/// A cgroup that kubelet probes are expected from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeCgroupStatus {
    /// As `/proc/PID/cgroup` has it.
    pub path: String,
    /// Whether connections from it are let in as probes.
    pub state: ProbeCgroupState,
    /// Why it was refused, or why an active one is recognised only while packets carry their
    /// sockets; and what to do.
    pub reason: Option<String>,
}

/// Are connections from a cgroup probes?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProbeCgroupState {
    /// They are.
    Active,
    /// There is no such cgroup now.
    Missing,
    /// The cgroup is not used: it has to do with pods.
    Refused,
}

impl From<capture::ProbeCgroup> for ProbeCgroupStatus {
    fn from(cgroup: capture::ProbeCgroup) -> Self {
        let (state, reason) = match cgroup.state {
            capture::ProbeCgroupState::Active { .. } => (ProbeCgroupState::Active, cgroup.unrecorded),
            capture::ProbeCgroupState::Missing => (ProbeCgroupState::Missing, None),
            capture::ProbeCgroupState::Refused { reason } => (ProbeCgroupState::Refused, Some(reason)),
        };
        Self { path: cgroup.path.display().to_string(), state, reason }
    }
}

/// What kernel TLS can do on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KtlsStatus {
    /// Ciphers that the kernel has; without any, records are protected in the agent.
    pub ciphers: Vec<String>,
    /// Whether the kernel can replace keys; where it cannot, a connection ends when a key has done enough.
    pub rekey: bool,
    /// Why there are no ciphers, or not all.
    pub reason: Option<String>,
}

impl KtlsStatus {
    /// As found at the agent's start.
    pub fn of(support: &Support) -> Self {
        let refused = support.refused.iter().map(|(suite, why)| format!("{}: {why}", suite.as_str()));
        let reason = match &support.availability {
            Availability::Ready if support.refused.is_empty() => None,
            Availability::Ready => Some(refused.collect::<Vec<_>>().join("; ")),
            Availability::Missing(why) => Some(why.clone()),
            Availability::Disabled => Some("turned off (--ktls off)".to_owned()),
        };
        let ciphers = support.suites.iter().map(|suite| suite.as_str().to_owned()).collect();
        Self { ciphers, rekey: support.rekey, reason }
    }
}

/// One workload that is to be enrolled here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodStatus {
    /// `namespace/name`.
    pub workload: String,
    /// SPIFFE ID; empty when it is not known, which only a kept pod's may be.
    pub identity: String,
    /// Path of its network namespace, or `net:[inode]` of one without a name.
    pub netns: String,
    /// Number in the BPF maps; absent while it is not enrolled.
    pub pod_id: Option<u32>,
    /// In the mesh or not.
    pub state: PodState,
    /// Why it was refused, or is kept, and what to do.
    pub reason: Option<String>,
    /// Its certificate, when it has one.
    pub certificate: Option<CertificateStatus>,
}

/// Is a pod in the mesh?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PodState {
    /// Its traffic is captured.
    Enrolled,
    /// It could not be enrolled; its traffic is not touched.
    Refused,
    /// It vanished without leaving the mesh: captured and guarded, takes no plaintext, and every
    /// connection is refused.
    Kept,
}

/// A certificate, without anything secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateStatus {
    /// Serial number, hexadecimal.
    pub serial: String,
    /// Start of validity, RFC 3339, UTC.
    pub not_before: String,
    /// End of validity, RFC 3339, UTC.
    pub not_after: String,
}

impl CertificateStatus {
    /// With times as the certificate has them: whole seconds.
    pub fn new(serial: &str, not_before: SystemTime, not_after: SystemTime) -> Self {
        let text = |t| humantime::format_rfc3339_seconds(t).to_string();
        Self { serial: serial.to_owned(), not_before: text(not_before), not_after: text(not_after) }
    }
}

/// Answer to `GET /v1/connections`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Connections {
    /// Live connections that were asked for; more than are listed when the limit was reached.
    pub total: usize,
    /// In the order that was asked for, the oldest first by default.
    pub connections: Vec<ConnectionInfo>,
}

/// Answer to `POST /v1/connections/{id}/close`: the reset was asked for; the connection is gone a moment later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closed {
    /// Which connection.
    pub closed: ConnectionId,
}

/// Answer to `GET /v1/counters`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllCounters {
    /// Counted by the agent.
    pub agent: CountersSnapshot,
    /// Counted by the BPF programs.
    pub bpf: BTreeMap<String, u64>,
}

/// Parameters of `GET /v1/policies/explain`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExplainParameters {
    /// `ADDRESS:PORT` of a workload or service, IPv6 as `[ADDRESS]:PORT`.
    pub to: String,
    /// SPIFFE ID of a mesh peer.
    pub from: Option<String>,
    /// The mesh peer's address.
    pub source_ip: Option<String>,
    /// Address of a peer outside of the mesh, instead of `from`.
    pub plaintext_from: Option<String>,
}

impl ExplainParameters {
    /// The question, or what is wrong with it.
    pub fn query(&self) -> Result<Query, String> {
        let to: SocketAddr = parsed("to", &self.to, "ADDRESS:PORT, like 10.0.0.1:80 or [fd00::1]:80")?;
        if to.port() == 0 || underpass_abi::is_agent_port(to.port()) {
            return Err(format!(
                "to: port {} is no application's: it does not exist or is the agent's own in every pod; give another",
                to.port()
            ));
        }
        let address = |name, text: &Option<String>| {
            text.as_ref().map(|t| parsed::<IpAddr>(name, t, "an address, like 10.0.0.1 or fd00::1")).transpose()
        };
        let source = address("source_ip", &self.source_ip)?;
        let peer = match (&self.from, address("plaintext_from", &self.plaintext_from)?) {
            (Some(id), None) => {
                let form = "spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT";
                Peer::Mesh { identity: parsed("from", id, form)?, source }
            }
            (None, Some(address)) if source.is_none() => Peer::Plaintext(address),
            _ => return Err("give from (a SPIFFE ID, with source_ip if wanted) or plaintext_from, one of them".into()),
        };
        Ok(Query { peer, to })
    }
}

impl From<&Query> for ExplainParameters {
    fn from(query: &Query) -> Self {
        let to = query.to.to_string();
        match &query.peer {
            Peer::Mesh { identity, source } => {
                let source_ip = source.map(|s| s.to_string());
                Self { to, from: Some(identity.to_string()), source_ip, plaintext_from: None }
            }
            Peer::Plaintext(address) => Self { to, plaintext_from: Some(address.to_string()), ..Self::default() },
        }
    }
}

fn parsed<T: FromStr>(name: &str, text: &str, form: &str) -> Result<T, String> {
    /// Longest piece of foreign text in an answer, in characters.
    const QUOTED: usize = 80;
    text.parse().map_err(|_| {
        let shown: String = text.chars().take(QUOTED).collect();
        format!("{name}: {shown:?} is not of the form {form}")
    })
}

/// Body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What was wrong with the request, and what to send instead.
    pub error: String,
}
