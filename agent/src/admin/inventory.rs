//! What the mesh consists of, as seen by this node: workloads, services, certificates. Part of the public interface, as
//! [`super::api`].

use std::{collections::BTreeMap, net::IpAddr};

use serde::{Deserialize, Serialize};

use super::api::{CertificateStatus, PodState, PodStatus};
use crate::{
    identity::Description,
    mesh::{InboundMode, ModeSource, PortMode, Protocol, Service, ServicePort, Snapshot, SpiffeId, Workload},
};

/// Most endpoints of one service that are listed.
pub const MAX_ENDPOINTS: usize = 100;

/// Answer to `GET /v1/workloads`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workloads {
    /// How many there are; more than are listed when the limit was reached.
    pub total: usize,
    /// Those of this node first, then by name.
    pub workloads: Vec<WorkloadInfo>,
}

/// One workload of the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadInfo {
    /// `namespace/name`.
    pub workload: String,
    /// SPIFFE ID.
    pub identity: String,
    /// The node it runs on.
    pub node: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// How it is reached.
    pub protocol: Protocol,
    /// What it does with plaintext.
    pub mode: InboundMode,
    /// Where that was written down.
    pub mode_set_by: ModeSource,
    /// Ports with another mode.
    pub port_modes: Vec<PortMode>,
    /// Whether it is on this node and to be enrolled.
    pub local: bool,
    /// Enrolled, refused or kept; absent when it is not this node's, and while it is being looked
    /// at.
    pub state: Option<PodState>,
    /// Number in the BPF maps, while it is enrolled.
    pub pod_id: Option<u32>,
    /// Why it was refused, and what to do.
    pub reason: Option<String>,
}

/// Answer to `GET /v1/services`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Services {
    /// How many there are; more than are listed when the limit was reached.
    pub total: usize,
    /// By name.
    pub services: Vec<ServiceInfo>,
}

/// One service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceInfo {
    /// `namespace/name`.
    pub service: String,
    /// Host name.
    pub hostname: String,
    /// Virtual addresses.
    pub vips: Vec<IpAddr>,
    /// Ports, and the endpoints' ports behind them.
    pub ports: Vec<ServicePort>,
    /// How many endpoints it has.
    pub endpoints_total: usize,
    /// At most [`MAX_ENDPOINTS`] of them.
    pub endpoints: Vec<EndpointInfo>,
    /// An endpoint of which it is not known yet who it is. Connections that can use no other wait
    /// for that.
    #[serde(default)]
    pub awaited: Option<String>,
}

/// A workload behind a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointInfo {
    /// `namespace/name`.
    pub workload: String,
    /// The node it runs on.
    pub node: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// How it is reached.
    pub protocol: Protocol,
    /// Ports that differ from the service's.
    pub ports: Vec<ServicePort>,
}

/// Answer to `GET /v1/certificates`. Nothing in it is secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificates {
    /// The node's trust domain.
    pub trust_domain: String,
    /// Where certificates come from: `local`, `files`.
    pub source: String,
    /// One per identity of this node's workloads.
    pub certificates: Vec<CertificateInfo>,
}

/// The certificate of an identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateInfo {
    /// SPIFFE ID.
    pub identity: String,
    /// Workloads that prove themselves with it, `namespace/name`.
    pub workloads: Vec<String>,
    /// Absent while there is none that is valid now: connections of its workloads are refused.
    pub certificate: Option<CertificateDetails>,
}

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateDetails {
    /// Serial number and validity.
    #[serde(flatten)]
    pub status: CertificateStatus,
    /// Distinguished name of who signed it.
    pub issuer: String,
    /// Algorithm of its key.
    pub key: String,
    /// Certificates in the chain, the leaf included.
    pub chain: usize,
    /// Distinguished names of the roots that peers are verified with.
    pub roots: Vec<String>,
    /// SHA-256 over those roots, hexadecimal: differs between nodes only while a root is replaced.
    pub roots_sha256: String,
}

impl From<Description> for CertificateDetails {
    fn from(d: Description) -> Self {
        Self {
            status: CertificateStatus::new(&d.serial, d.not_before, d.not_after),
            issuer: d.issuer,
            key: d.key,
            chain: d.chain,
            roots: d.roots,
            roots_sha256: d.roots_sha256,
        }
    }
}

/// The workloads of `mesh`, with the states of this node's pods.
pub fn workloads(mesh: &Snapshot, pods: &[PodStatus], limit: usize) -> Workloads {
    let pods: BTreeMap<&str, &PodStatus> = pods.iter().map(|p| (p.workload.as_str(), p)).collect();
    let mut all: Vec<_> = mesh.workloads().collect();
    all.sort_by_key(|w| (w.local.is_none(), &w.key));
    let info = |w: &Workload| {
        let workload = w.key.to_string();
        let pod = pods.get(workload.as_str()).filter(|_| w.local.is_some());
        WorkloadInfo {
            identity: w.identity.to_string(),
            node: w.node.to_string(),
            addresses: w.addresses.clone(),
            protocol: w.protocol,
            mode: w.mode,
            mode_set_by: mesh.workload_policy(&w.key).mode_set_by,
            port_modes: w.port_modes.clone(),
            local: w.local.is_some(),
            state: pod.map(|p| p.state),
            pod_id: pod.and_then(|p| p.pod_id),
            reason: pod.and_then(|p| p.reason.clone()),
            workload,
        }
    };
    let known = |pod: &PodStatus| all.iter().any(|w| w.local.is_some() && w.key.to_string() == pod.workload);
    let kept = pods.values().filter(|pod| pod.state == PodState::Kept && !known(pod));
    let kept: Vec<_> = kept.map(|pod| kept_pod(mesh, pod)).collect();
    let total = all.len() + kept.len();
    let workloads = kept.into_iter().chain(all.into_iter().map(|w| info(w))).take(limit).collect();
    Workloads { total, workloads }
}

/// A pod of this node that the mesh does not have any more.
fn kept_pod(mesh: &Snapshot, pod: &PodStatus) -> WorkloadInfo {
    WorkloadInfo {
        workload: pod.workload.clone(),
        identity: pod.identity.clone(),
        node: mesh.node.to_string(),
        addresses: Vec::new(),
        protocol: Protocol::Underpass,
        mode: InboundMode::Strict,
        mode_set_by: ModeSource::Mesh,
        port_modes: Vec::new(),
        local: true,
        state: Some(pod.state),
        pod_id: pod.pod_id,
        reason: pod.reason.clone(),
    }
}

/// The services of `mesh`.
pub fn services(mesh: &Snapshot, limit: usize) -> Services {
    let mut all: Vec<_> = mesh.services().iter().collect();
    all.sort_by_key(|s| (&s.namespace, &s.name));
    let info = |s: &Service| ServiceInfo {
        service: format!("{}/{}", s.namespace, s.name),
        hostname: s.hostname.to_string(),
        vips: s.vips.clone(),
        ports: s.ports.clone(),
        endpoints_total: s.endpoints.len(),
        endpoints: s.endpoints.iter().take(MAX_ENDPOINTS).map(EndpointInfo::of).collect(),
        awaited: s.awaited.as_ref().map(ToString::to_string),
    };
    Services { total: all.len(), services: all.into_iter().take(limit).map(|s| info(s)).collect() }
}

impl EndpointInfo {
    fn of(endpoint: &crate::mesh::Endpoint) -> Self {
        let w = &endpoint.workload;
        Self {
            workload: w.key.to_string(),
            node: w.node.to_string(),
            addresses: w.addresses.clone(),
            protocol: w.protocol,
            ports: endpoint.ports.clone(),
        }
    }
}

/// The certificates of this node's identities; `describe` knows them.
pub fn certificates(
    mesh: &Snapshot,
    source: &str,
    describe: impl Fn(&SpiffeId) -> Option<CertificateDetails>,
) -> Certificates {
    let mut identities: BTreeMap<&SpiffeId, Vec<String>> = BTreeMap::new();
    for w in mesh.local_workloads() {
        identities.entry(&w.identity).or_default().push(w.key.to_string());
    }
    let info = |(identity, mut workloads): (&SpiffeId, Vec<String>)| {
        workloads.sort();
        CertificateInfo { identity: identity.to_string(), workloads, certificate: describe(identity) }
    };
    Certificates {
        trust_domain: mesh.trust_domain.to_string(),
        source: source.to_owned(),
        certificates: identities.into_iter().map(info).collect(),
    }
}
