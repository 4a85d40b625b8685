//! From pods to workloads.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
    sync::Arc,
    time::Instant,
};

use super::{
    cluster::Cluster,
    enrolment::{Enrolments, Phase, wanted},
    finder::Finder,
    modes::Modes,
    records::{Excluded, Key, NamespaceRecord, PodRecord},
    status::Problem,
};
use crate::mesh::{
    Exclusions, IdentityError, InboundMode, Labels, LocalPod, ModeSource, Protocol, Snapshot, SpiffeId, Workload,
    WorkloadKey, WorkloadPolicy,
};

/// A pod with what is decided about it.
pub(super) struct Placed<'a> {
    pub(super) key: &'a Key,
    pub(super) record: &'a Arc<PodRecord>,
    pub(super) phase: Phase,
    /// It runs on this node, and takes part or is about to.
    pub(super) captured_here: bool,
}

/// Decides about every pod. The time is when the next pod ends being in between.
pub(super) fn place<'a>(
    cluster: &'a Cluster,
    node: &str,
    enrolments: &mut Enrolments,
    pass: u64,
) -> (Vec<Placed<'a>>, Option<Instant>) {
    let mut pass = enrolments.pass(pass, Instant::now());
    let mut namespace: Option<(&Arc<str>, Option<&Arc<NamespaceRecord>>)> = None;
    let mut placed = Vec::with_capacity(cluster.pods.len());
    for (key, record) in cluster.pods.iter() {
        // Ordered by namespace, so each is looked up once.
        let of = match namespace {
            Some((name, found)) if *name == key.namespace => found,
            _ => cluster.namespaces.get(&cluster_scoped(&key.namespace)),
        };
        namespace = Some((&key.namespace, of));
        let phase = pass.phase(key, record, !cluster.leaving && wanted(record, of.map(Arc::as_ref)));
        let captured_here = phase != Phase::Out && record.node.as_deref() == Some(node) && !record.addresses.is_empty();
        placed.push(Placed { key, record, phase, captured_here });
    }
    (placed, pass.finish())
}

/// Key of an object that is in no namespace.
pub(super) fn cluster_scoped(name: &Arc<str>) -> Key {
    Key { namespace: "".into(), name: Arc::clone(name) }
}

/// Whose an address is: of several pods that claim it, the one that does not end, else the younger. Kubernetes may give the
/// address of a pod that has ended to another before it says that the first is gone.
pub(super) fn owners<'a>(placed: &'a [Placed<'a>]) -> Owners<'a> {
    let mut owners = Owners::with_capacity(placed.len());
    for pod in placed.iter().filter(|p| !p.record.host_network) {
        let rank = |p: &Placed<'_>| (!p.record.terminating, p.record.created);
        for address in &pod.record.addresses {
            match owners.entry(*address) {
                Entry::Vacant(e) => {
                    e.insert(pod);
                }
                Entry::Occupied(mut e) if rank(pod) > rank(e.get()) => {
                    e.insert(pod);
                }
                Entry::Occupied(_) => {}
            }
        }
    }
    owners
}

/// Pods by the addresses that are theirs.
pub(super) type Owners<'a> = HashMap<IpAddr, &'a Placed<'a>>;

/// Those of a pod's addresses that no other has.
fn own_addresses(owners: &Owners<'_>, pod: &Placed<'_>) -> Vec<IpAddr> {
    let own = |address: &&IpAddr| owners.get(*address).is_some_and(|owner| std::ptr::eq(*owner, pod));
    pod.record.addresses.iter().filter(own).copied().collect()
}

/// What a workload is made of, beside its pod.
pub(super) struct Context<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) base: &'a Snapshot,
    pub(super) owners: &'a Owners<'a>,
    pub(super) modes: &'a Modes,
    pub(super) finder: &'a Finder,
}

/// Workloads of the last pass, taken again while nothing about them is different.
#[derive(Debug, Default)]
pub(super) struct Made(HashMap<Key, One>);

#[derive(Debug)]
struct One {
    of: Arc<PodRecord>,
    phase: Phase,
    workload: Arc<Workload>,
    policy: Arc<WorkloadPolicy>,
}

/// A workload, and what policies have to know of it.
pub(super) type Known = (Arc<Workload>, Arc<WorkloadPolicy>);

impl Made {
    /// Forgets pods that are gone.
    pub(super) fn retain(&mut self, cluster: &Cluster) {
        if self.0.len() > cluster.pods.len() {
            self.0.retain(|key, _| cluster.pods.get(key).is_some());
        }
    }

    /// The workload of a pod of another node. `None` when it has no address of its own.
    pub(super) fn remote(&mut self, context: &Context<'_>, pod: &Placed<'_>) -> Result<Option<Known>, IdentityError> {
        let addresses = own_addresses(context.owners, pod);
        if addresses.is_empty() {
            return Ok(None);
        }
        if let Some(made) = self.0.get(pod.key)
            && Arc::ptr_eq(&made.of, pod.record)
            && made.phase == pod.phase
            && made.workload.addresses == addresses
        {
            return Ok(Some((Arc::clone(&made.workload), Arc::clone(&made.policy))));
        }
        let workload = Arc::new(Workload {
            key: workload_key(pod.key),
            identity: identity(context.base, &pod.key.namespace, &pod.record.service_account)?,
            node: pod.record.node.clone().unwrap_or_else(|| "".into()),
            addresses,
            protocol: protocol(pod.phase),
            mode: InboundMode::Permissive,
            port_modes: Vec::new(),
            local: None,
        });
        let policy = Arc::new(workload_policy(pod.record, ModeSource::Mesh));
        let of = Arc::clone(pod.record);
        let known = (Arc::clone(&workload), Arc::clone(&policy));
        self.0.insert(pod.key.clone(), One { of, phase: pod.phase, workload, policy });
        Ok(Some(known))
    }
}

/// How others reach a pod.
fn protocol(phase: Phase) -> Protocol {
    if phase == Phase::In { Protocol::Underpass } else { Protocol::Plain }
}

/// The workload of one of this node's pods.
pub(super) fn local(
    context: &Context<'_>,
    pod: &Placed<'_>,
    problems: &mut Vec<Problem>,
) -> Result<Option<Known>, IdentityError> {
    let (key, record) = (pod.key, pod.record);
    let addresses = own_addresses(context.owners, pod);
    if addresses.is_empty() {
        return Ok(None);
    }
    let labels = Labels(record.labels.clone());
    let (mode, port_modes) = match pod.phase {
        Phase::Between => (Modes::between(), Vec::new()),
        Phase::In | Phase::Out => context.modes.of(&key.namespace, &labels),
    };
    let of_namespace = context.cluster.namespaces.get(&cluster_scoped(&key.namespace));
    let said = record.problems.iter().cloned().map(|problem| Problem { object: format!("Pod {key}"), problem });
    problems.extend(said);
    let local = context.finder.place(key, &record.uid).map(|place| LocalPod {
        netns: place.netns.clone(),
        cgroup: place.cgroup.clone(),
        exclude: exclusions(&record.exclude, of_namespace.map(|n| &n.exclude)),
        capture_all: false,
        probe_ports: record.probe_ports.clone(),
        files: None,
    });
    if local.is_none() && !record.terminating {
        let problem = "its processes were not found below the attach point, so it is not captured; check --cgroup and that the agent sees the node's processes (hostPID)";
        problems.push(Problem { object: format!("Pod {key}"), problem: problem.into() });
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
