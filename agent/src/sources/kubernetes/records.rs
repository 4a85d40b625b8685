//! What is kept of each object, in memory and in the last good copy: flat, small, without Kubernetes' types.

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{fnv::fnv1a, pod_identity::NoIdentity};

/// `namespace/name` of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Key {
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What labels say of taking part in the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Choice {
    In,
    Out,
}

/// A pod that has not ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PodRecord {
    pub(super) uid: Arc<str>,
    /// `None` until it is scheduled.
    pub(super) node: Option<Arc<str>>,
    /// Empty for a pod that has no identity.
    pub(super) service_account: Arc<str>,
    /// Set for a pod that has no identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) unvouched: Option<Box<Unvouched>>,
    /// All of them for this node's pods; of others those that name the application.
    pub(super) labels: BTreeMap<Arc<str>, Arc<str>>,
    pub(super) choice: Option<Choice>,
    /// Something else already intercepts its traffic, e.g. a sidecar.
    pub(super) occupied: bool,
    pub(super) host_network: bool,
    pub(super) terminating: bool,
    pub(super) addresses: Vec<IpAddr>,
    /// Seconds since 1970; of two pods with one address the younger has it.
    pub(super) created: i64,
    pub(super) exclude: Excluded,
    pub(super) probe_ports: Vec<u16>,
    /// What is wrong with its annotations, for its own node to report.
    pub(super) problems: Vec<String>,
}

/// A pod that no `ServiceAccount` vouches for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Unvouched {
    pub(super) why: NoIdentity,
    /// The UID that the node's kubelet uses for a static pod; its mirror pod has another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) uid: Option<Box<str>>,
}

/// What annotations leave alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Excluded {
    pub(super) outbound_ports: Vec<u16>,
    pub(super) outbound_cidrs: Vec<IpNet>,
    pub(super) inbound_ports: Vec<u16>,
}

/// A namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NamespaceRecord {
    pub(super) choice: Option<Choice>,
    pub(super) exclude: Excluded,
    pub(super) problems: Vec<String>,
}

/// A service with a virtual address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ServiceRecord {
    pub(super) vips: Vec<IpAddr>,
    /// TCP ports by name; the only port of a service may have the empty one.
    pub(super) ports: Vec<(Arc<str>, u16)>,
    /// Only endpoints of the client's node.
    pub(super) local_only: bool,
}

/// A slice of a service's endpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SliceRecord {
    /// The service's name, in the slice's namespace.
    pub(super) service: Arc<str>,
    /// TCP ports by name.
    pub(super) ports: Vec<(Arc<str>, u16)>,
    pub(super) endpoints: Vec<EndpointRecord>,
}

/// Tells uids apart in less room. The API server chooses uids, so nobody can aim at a collision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Fingerprint(u64);

impl Fingerprint {
    pub(super) fn of(uid: &str) -> Self {
        Self(fnv1a(uid.as_bytes()))
    }
}

/// An endpoint, usable or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct EndpointRecord {
    pub(super) address: IpAddr,
    /// The pod it is, if it is one.
    pub(super) pod: Option<Key>,
    /// The pod's uid, where the slice says it.
    #[serde(default)]
    pub(super) uid: Option<Fingerprint>,
    pub(super) node: Option<Arc<str>>,
    pub(super) ready: bool,
    /// Still serves while it terminates.
    pub(super) draining: bool,
    pub(super) zones: Vec<Arc<str>>,
    pub(super) nodes: Vec<Arc<str>>,
}

/// This node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NodeRecord {
    pub(super) addresses: Vec<IpAddr>,
    pub(super) zone: Option<Arc<str>>,
}

/// An object of Istio's API: its spec as JSON text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ConfiguredRecord {
    pub(super) created: i64,
    /// `istio.io/dry-run: "true"`.
    pub(super) dry_run: bool,
    pub(super) spec: Arc<str>,
}
