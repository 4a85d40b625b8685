//! What a snapshot is made of.

use std::{collections::BTreeMap, fmt, net::IpAddr, path::PathBuf, sync::Arc};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{PodNamespace, SpiffeId};

/// `namespace/name` of a workload: unique in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkloadKey {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name of the pod or process group.
    pub name: Arc<str>,
}

impl fmt::Display for WorkloadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Serialize for WorkloadKey {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// What to do with plaintext that arrives for a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InboundMode {
    /// Plaintext and the tunnel are both accepted.
    #[default]
    Permissive,
    /// Only the tunnel is accepted.
    Strict,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Underpass => "underpass",
            Protocol::Plain => "plain",
        })
    }
}

impl fmt::Display for InboundMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            InboundMode::Permissive => "permissive",
            InboundMode::Strict => "strict",
        })
    }
}

/// How a workload is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// The native tunnel on port 15008: mutual TLS or nothing.
    Underpass,
    /// The workload is known but not in the mesh: plain TCP.
    Plain,
}

/// Inbound mode of one port, overriding the workload's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMode {
    /// Port the application listens on.
    pub port: u16,
    /// Mode for that port.
    pub mode: InboundMode,
}

/// What is left alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Exclusions {
    /// Destination ports not captured.
    pub outbound_ports: Vec<u16>,
    /// Destination networks not captured.
    pub outbound_cidrs: Vec<IpNet>,
    /// Ports on which plaintext is always passed, STRICT or not.
    pub inbound_ports: Vec<u16>,
}

/// PEM files of one workload's identity, for the `files` issuer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CertificateFiles {
    /// Certificate chain, leaf first.
    pub certificate: PathBuf,
    /// Private key (PKCS#8, PKCS#1 or SEC1).
    pub key: PathBuf,
    /// Trust roots for peers.
    pub roots: PathBuf,
}

/// What this node has to know to enrol one of its own workloads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LocalPod {
    /// The pod's Kubernetes uid. `None` from a source that has only names.
    pub uid: Option<Arc<str>>,
    /// The pod's network namespace.
    pub netns: PodNamespace,
    /// The pod's cgroup v2 directory; must lie below the attach point.
    pub cgroup: Option<PathBuf>,
    /// The pod's own exclusions, in addition to the mesh-wide ones.
    pub exclude: Exclusions,
    /// Capture every TCP destination, not only mesh addresses.
    pub capture_all: bool,
    /// Ports that the pod declares for probes and lifecycle hooks: they take the kubelet's
    /// plaintext in every mode, and that of [`ProbeSettings::node_addresses`].
    pub probe_ports: Vec<u16>,
    /// Where its certificate comes from, with the `files` issuer.
    pub files: Option<CertificateFiles>,
}

/// A pod (or any group of processes with its own addresses).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Workload {
    /// Its key.
    pub key: WorkloadKey,
    /// Who it is.
    pub identity: SpiffeId,
    /// Node it runs on.
    pub node: Arc<str>,
    /// Its addresses; never loopback, unspecified or multicast.
    pub addresses: Vec<IpAddr>,
    /// How to reach it.
    pub protocol: Protocol,
    /// What it does with plaintext.
    pub mode: InboundMode,
    /// Ports with another mode.
    pub port_modes: Vec<PortMode>,
    /// Present when the workload is on this node and to be enrolled.
    pub local: Option<LocalPod>,
}

impl Workload {
    /// The mode in force on `port`.
    pub fn mode_of(&self, port: u16) -> InboundMode {
        self.port_modes.iter().find(|m| m.port == port).map_or(self.mode, |m| m.mode)
    }
}

/// One port of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// Port on the VIP.
    pub port: u16,
    /// Port on the endpoints.
    pub target_port: u16,
}

/// One workload behind a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Endpoint {
    /// The workload.
    pub workload: Arc<Workload>,
    /// Overrides of the service's target ports, `(service port, target port)`.
    pub ports: Vec<ServicePort>,
}

/// A name with virtual addresses and endpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Service {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// Host name, e.g. `web.default.svc.cluster.local`.
    pub hostname: Arc<str>,
    /// Virtual addresses.
    pub vips: Vec<IpAddr>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// Endpoints; may be empty.
    pub endpoints: Vec<Endpoint>,
    /// An endpoint that must not be dialled yet, because it is not known who it is; for people.
    /// Connections that can use no other endpoint wait until it is known.
    pub awaited: Option<Arc<str>>,
}

/// The owner of an address that must not be dialled in plaintext, although no workload with a
/// tunnel has the address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The pod.
    pub pod: WorkloadKey,
    /// It is not known yet whether the pod takes part in the mesh. Otherwise it does, and cannot be
    /// reached.
    pub awaited: bool,
}

impl Service {
    /// The endpoint's port behind `port`, or `None` when the service does not have that port.
    pub fn target_port(&self, endpoint: &Endpoint, port: u16) -> Option<u16> {
        let in_list = |list: &[ServicePort]| list.iter().find(|p| p.port == port).map(|p| p.target_port);
        in_list(&endpoint.ports).or_else(|| in_list(&self.ports))
    }
}

/// Settings that hold for every workload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MeshSettings {
    /// Mode of workloads for which nothing narrower says one.
    pub mode: InboundMode,
    /// Namespace whose policies and modes hold for the whole mesh.
    pub root_namespace: Arc<str>,
    /// Networks captured beside the known workload addresses and VIPs.
    pub cidrs: Vec<IpNet>,
    /// Capture every TCP destination of every enrolled pod.
    pub capture_all: bool,
    /// What no pod has captured.
    pub exclude: Exclusions,
    /// How pods answer plaintext that they refuse.
    pub plaintext_refusal: PlaintextRefusal,
    /// Who probes this node's pods.
    pub probes: ProbeSettings,
    /// What the access log says.
    pub access_log: AccessLogSettings,
}

/// How a pod answers a plaintext connection that its mode or its policies refuse.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlaintextRefusal {
    /// With a TCP reset: the client fails at once.
    #[default]
    Reset,
    /// Not at all: the client waits until it gives up.
    Drop,
}

/// Which connections have a line in the access log, by the namespace of the pod on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct AccessLogSettings {
    /// In namespaces that have no rule of their own.
    pub default: AccessLogRule,
    /// Rules of namespaces; what one leaves out is taken from the default.
    pub namespaces: BTreeMap<Arc<str>, AccessLogRule>,
}

impl AccessLogSettings {
    /// What holds in a namespace.
    pub fn of(&self, namespace: &str) -> AccessLogRule {
        let Some(own) = self.namespaces.get(namespace) else { return self.default };
        AccessLogRule {
            enabled: own.enabled.or(self.default.enabled),
            sample_ppm: own.sample_ppm.or(self.default.sample_ppm),
        }
    }
}

/// A part of [`AccessLogSettings`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct AccessLogRule {
    /// Whether there are lines at all; when nothing says so, the agent's command line does.
    pub enabled: Option<bool>,
    /// How many of a million connections that end in order have a line; all when nothing is said. Others always have one.
    pub sample_ppm: Option<u32>,
}

/// How the kubelet's probes are recognised, which no mode or policy stops.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProbeSettings {
    /// cgroup v2 paths as `/proc/PID/cgroup` has them; connections of processes in them and below are probes.
    pub cgroups: Vec<PathBuf>,
    /// Addresses of the node whose connections to [`LocalPod::probe_ports`] pass for probes,
    /// whoever on the node or behind its address translation makes them. None unless the
    /// configuration asks for it.
    pub node_addresses: Vec<IpAddr>,
    /// With Kubernetes, and without `node_addresses` in the configuration: those of the Node
    /// object.
    pub from_node_addresses: bool,
}
