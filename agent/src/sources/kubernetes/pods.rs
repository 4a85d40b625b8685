//! From pods to workloads.

use std::{net::IpAddr, sync::Arc, time::Instant};

use super::{
    cluster::Cluster,
    disputes::Disputes,
    enrolment::{Enrolments, Phase, Wish, asked, wish},
    finder::Finder,
    index::Index,
    modes::Modes,
    records::{Excluded, Key, PodRecord},
};
use crate::{
    mesh::{
        Exclusions, IdentityError, InboundMode, Labels, LocalPod, ModeSource, Protocol, Snapshot, SpiffeId, Workload,
        WorkloadKey, WorkloadPolicy,
    },
    pod_identity::NoIdentity,
};

/// A pod with what is decided about it.
#[derive(Clone, Copy)]
pub(super) struct Placed<'a> {
    pub(super) key: &'a Key,
    pub(super) record: &'a Arc<PodRecord>,
    pub(super) phase: Phase,
    /// It runs on this node, and takes part or is about to.
    pub(super) captured_here: bool,
    /// It runs on this node and is asked to take part, and has no identity.
    pub(super) without_identity: Option<NoIdentity>,
    /// It runs on this node, and it is written down that it takes no part.
    pub(super) left: bool,
}

impl Placed<'_> {
    /// Others have to do with it as a workload of the mesh.
    pub(super) fn takes_part(&self) -> bool {
        self.captured_here || self.phase == Phase::In
    }
}

/// Decides about a pod.
pub(super) fn place<'a>(
    cluster: &'a Cluster,
    node: &str,
    enrolments: &mut Enrolments,
    key: &'a Key,
    record: &'a Arc<PodRecord>,
    now: Instant,
) -> Placed<'a> {
    let namespace = cluster.namespaces.get(&cluster_scoped(&key.namespace));
    let namespace = namespace.map(Arc::as_ref);
    let wish = if cluster.leaving { Wish::Out } else { wish(record, namespace) };
    let phase = enrolments.phase(key, record, wish, now);
    let here = record.node.as_deref() == Some(node);
    // Without its namespace's object a pod is not what it was, and it has not left either: its node
    // keeps it.
    let captured_here = phase != Phase::Out && wish != Wish::Unknown && here && !record.addresses.is_empty();
    let asked = asked(record, namespace);
    let unvouched = record.unvouched.as_ref().filter(|_| here && !cluster.leaving);
    let without_identity = unvouched.filter(|_| asked == Wish::In).map(|pod| pod.why);
    // A pod that has no identity has not said that it leaves.
    let left = here && (cluster.leaving || asked == Wish::Out);
    Placed { key, record, phase, captured_here, without_identity, left }
}

/// Is it unknown whether a pod takes part, because nothing is known of its namespace?
pub(super) fn undecided(cluster: &Cluster, key: &Key, record: &PodRecord) -> bool {
    let excluded = record.host_network || record.occupied || record.unvouched.is_some();
    let possible = record.choice.is_none() && !excluded && !cluster.leaving;
    possible && cluster.namespaces.get(&cluster_scoped(&key.namespace)).is_none()
}

/// Key of an object that is in no namespace.
pub(super) fn cluster_scoped(name: &Arc<str>) -> Key {
    Key { namespace: "".into(), name: Arc::clone(name) }
}

/// The addresses that a pod claims.
pub(super) fn claims(record: &PodRecord) -> &[IpAddr] {
    if record.host_network { &[] } else { &record.addresses }
}

/// Pods by the addresses that they claim.
pub(super) type Claims = Index<IpAddr, Key>;

/// Addresses of a pod that nobody may dial in plaintext.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) addresses: Vec<IpAddr>,
    /// It is not known yet whether the pod takes part.
    pub(super) awaited: bool,
}

/// The addresses of a pod in the mesh that are not its workload's, if it is one, and those of a pod
/// that may be in the mesh.
pub(super) fn held(cluster: &Cluster, pod: &Placed<'_>, workload: Option<&Workload>) -> Held {
    let awaited = undecided(cluster, pod.key, pod.record);
    if pod.phase != Phase::In && !awaited {
        return Held::default();
    }
    let own = workload.map_or(&[][..], |workload| &workload.addresses);
    let addresses = claims(pod.record).iter().filter(|address| !own.contains(address)).copied();
    Held { addresses: addresses.collect(), awaited }
}

/// Those of a pod's addresses that no other has.
fn own_addresses(context: &Context<'_>, pod: &Placed<'_>) -> Vec<IpAddr> {
    let own = |address: &&IpAddr| context.disputes.pod_has(pod.key, address);
    claims(pod.record).iter().filter(own).copied().collect()
}

/// What a workload is made of, beside its pod.
pub(super) struct Context<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) base: &'a Snapshot,
    pub(super) disputes: &'a Disputes,
    pub(super) modes: &'a Modes,
    pub(super) finder: &'a Finder,
}

/// A workload, and what policies have to know of it.
pub(super) type Known = (Arc<Workload>, Arc<WorkloadPolicy>);

/// The workload of a pod that takes part. `None` when it has no address of its own.
pub(super) fn workload(
    context: &Context<'_>,
    pod: &Placed<'_>,
    problems: &mut Vec<String>,
) -> Result<Option<Known>, IdentityError> {
    if pod.captured_here { local(context, pod, problems) } else { remote(context, pod) }
}

/// The workload of a pod of another node.
fn remote(context: &Context<'_>, pod: &Placed<'_>) -> Result<Option<Known>, IdentityError> {
    let addresses = own_addresses(context, pod);
    if addresses.is_empty() {
        return Ok(None);
    }
    let workload = Workload {
        key: workload_key(pod.key),
        identity: identity(context.base, &pod.key.namespace, &pod.record.service_account)?,
        node: pod.record.node.clone().unwrap_or_else(|| "".into()),
        addresses,
        protocol: protocol(pod.phase),
        mode: InboundMode::Permissive,
        port_modes: Vec::new(),
        local: None,
    };
    Ok(Some((Arc::new(workload), Arc::new(workload_policy(pod.record, ModeSource::Mesh)))))
}

/// How others reach a pod.
fn protocol(phase: Phase) -> Protocol {
    if phase == Phase::In { Protocol::Underpass } else { Protocol::Plain }
}

/// The workload of one of this node's pods.
fn local(context: &Context<'_>, pod: &Placed<'_>, problems: &mut Vec<String>) -> Result<Option<Known>, IdentityError> {
    let (key, record) = (pod.key, pod.record);
    let addresses = own_addresses(context, pod);
    if addresses.is_empty() {
        return Ok(None);
    }
    let labels = Labels(record.labels.clone());
    let (mode, port_modes) = match pod.phase {
        Phase::Between => (Modes::between(), Vec::new()),
        Phase::In | Phase::Out => context.modes.of(&key.namespace, &labels),
    };
    let of_namespace = context.cluster.namespaces.get(&cluster_scoped(&key.namespace));
    problems.extend(record.problems.iter().cloned());
    let local = context.finder.place(key, &record.uid).map(|place| LocalPod {
        uid: Some(Arc::clone(&record.uid)),
        netns: place.netns.clone(),
        cgroup: place.cgroup.clone(),
        exclude: exclusions(&record.exclude, of_namespace.map(|n| &n.exclude)),
        capture_all: false,
        probe_ports: record.probe_ports.clone(),
        files: None,
    });
    if local.is_none() && !record.terminating {
        let problem = "its processes were not found below the attach point, so it is not captured; check --cgroup and that the agent sees the node's processes (hostPID)";
        problems.push(problem.into());
    }
    let workload = Workload {
        key: workload_key(key),
        identity: identity(context.base, &key.namespace, &record.service_account)?,
        node: Arc::clone(&context.base.node),
        addresses,
        protocol: protocol(pod.phase),
        mode: mode.mode,
        port_modes,
        local,
    };
    Ok(Some((Arc::new(workload), Arc::new(workload_policy(record, mode.set_by)))))
}

/// What policies have to know of a pod.
fn workload_policy(record: &PodRecord, mode_set_by: ModeSource) -> WorkloadPolicy {
    WorkloadPolicy { labels: Labels(record.labels.clone()), policies: Vec::new(), mode_set_by }
}

pub(super) fn workload_key(key: &Key) -> WorkloadKey {
    WorkloadKey { namespace: Arc::clone(&key.namespace), name: Arc::clone(&key.name) }
}

pub(super) fn identity(base: &Snapshot, namespace: &str, account: &str) -> Result<SpiffeId, IdentityError> {
    SpiffeId::new(base.trust_domain.clone(), namespace, account)
}

fn exclusions(pod: &Excluded, namespace: Option<&Excluded>) -> Exclusions {
    let both = || std::iter::once(pod).chain(namespace);
    Exclusions {
        outbound_ports: distinct(both().flat_map(|e| e.outbound_ports.iter().copied())),
        outbound_cidrs: distinct(both().flat_map(|e| e.outbound_cidrs.iter().copied())),
        inbound_ports: distinct(both().flat_map(|e| e.inbound_ports.iter().copied())),
    }
}

fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut out = Vec::new();
    for value in values {
        if !out.contains(&value) {
            out.push(value);
        }
    }
    out
}
