//! From services and their endpoint slices to services of the mesh: which endpoints are used, as kube-proxy decides it.

use std::{
    collections::{BTreeMap, HashMap, HashSet, btree_map::Entry},
    net::IpAddr,
    sync::Arc,
};

use super::{
    cluster::Cluster,
    disputes::Disputes,
    index::Index,
    pods::{claims, cluster_scoped, identity, undecided, workload_key},
    records::{Choice, EndpointRecord, Fingerprint, Key, ServiceRecord, SliceRecord},
};
use crate::mesh::{Endpoint, InboundMode, Protocol, Service, ServicePort, Snapshot, Workload, WorkloadKey};

/// What the endpoints of a service are chosen and resolved by.
pub(super) struct Context<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) base: &'a Snapshot,
    pub(super) zone: Option<&'a str>,
    /// The slices of every service.
    pub(super) slices: &'a Index<Key, Key>,
    /// Has the workloads of the pods that take part.
    pub(super) mesh: &'a Snapshot,
    /// Pods that take part and cannot be reached.
    pub(super) unreachable: &'a HashSet<Key>,
    /// Who has the addresses that pods claim, too.
    pub(super) disputes: &'a Disputes,
    /// How many pods of a namespace take part; none of 0.
    pub(super) members: &'a HashMap<Arc<str>, usize>,
    /// Cluster's domain, `cluster.local`.
    pub(super) domain: &'a str,
}

/// An endpoint and the slice it is in.
type Candidate<'a> = (&'a EndpointRecord, usize);

/// What a service is made into.
pub(super) struct Made {
    /// `None`: kube-proxy serves it, and nothing of it is captured.
    pub(super) service: Option<Service>,
    /// What is known of its place in the mesh now; `None` when its slices say nothing about that.
    pub(super) meshed: Option<bool>,
    /// Addresses that it depends on beside the pods that its slices name.
    pub(super) watched: Vec<IpAddr>,
}

/// Who answers at an endpoint.
enum Who<'a> {
    /// A workload.
    Known(&'a Arc<Workload>),
    /// Somebody outside of the mesh, with this service account.
    Outside(WorkloadKey, &'a str),
    /// It is not known yet.
    Awaited,
    /// A pod of the mesh that cannot be reached.
    Unreachable,
}

impl Context<'_> {
    /// Makes a service of a record. It is captured when one of its endpoints, ready or not, is in
    /// the mesh, or may be; a service without any endpoint when the next one may be. kube-proxy
    /// serves all others.
    pub(super) fn service(&self, key: &Key, record: &ServiceRecord) -> Made {
        let slices: Vec<_> = self.slices.get(key).iter().filter_map(|slice| self.cluster.slices.get(slice)).collect();
        let candidates = || slices.iter().enumerate().flat_map(|(i, s)| s.endpoints.iter().map(move |e| (e, i)));
        let mut watched = Vec::new();
        let (mut any, mut captured) = (false, false);
        for (endpoint, _) in candidates() {
            any = true;
            captured |= match self.who(&key.namespace, endpoint, &mut watched) {
                Who::Known(workload) => workload.protocol != Protocol::Plain,
                Who::Outside(..) => false,
                Who::Awaited | Who::Unreachable => true,
            };
        }
        watched.sort_unstable();
        watched.dedup();
        if !any {
            captured = self.cluster.meshed.contains(key) || self.has_members(&key.namespace);
        }
        let meshed = any.then_some(captured);
        // An address that a pod has is the pod's, whatever a service says. The others are captured
        // all the same.
        let vips: Vec<_> = record.vips.iter().filter(|vip| self.disputes.service_may_have(vip)).copied().collect();
        let service = (captured && !vips.is_empty()).then(|| {
            let chosen = choose(candidates(), record.local_only, &self.base.node, self.zone);
            self.assemble(key, record, vips, &slices, chosen)
        });
        Made { service, meshed, watched }
    }

    /// Is a pod of the namespace in the mesh, or will it be?
    fn has_members(&self, namespace: &Arc<str>) -> bool {
        let record = self.cluster.namespaces.get(&cluster_scoped(namespace));
        record.is_some_and(|record| record.choice == Some(Choice::In)) || self.members.contains_key(namespace)
    }

    fn assemble(
        &self,
        key: &Key,
        record: &ServiceRecord,
        vips: Vec<IpAddr>,
        slices: &[&Arc<SliceRecord>],
        chosen: Vec<Candidate<'_>>,
    ) -> Service {
        let ports: Vec<Vec<ServicePort>> = slices.iter().map(|slice| ports(record, slice)).collect();
        let common = common(&ports);
        let mut endpoints: BTreeMap<WorkloadKey, Endpoint> = BTreeMap::new();
        let mut awaited = None;
        for (endpoint, slice) in chosen {
            let workload = match self.who(&key.namespace, endpoint, &mut Vec::new()) {
                Who::Known(workload) => Some(Arc::clone(workload)),
                Who::Outside(key, account) => self.plain(key, endpoint.address, account),
                Who::Unreachable => None,
                Who::Awaited => {
                    awaited.get_or_insert_with(|| describe(endpoint));
                    None
                }
            };
            let Some(workload) = workload else { continue };
            let own = || ports[slice].iter().filter(|p| !common.contains(p)).copied();
            match endpoints.entry(workload.key.clone()) {
                Entry::Vacant(e) => {
                    e.insert(Endpoint { workload, ports: own().collect() });
                }
                // The same pod by its address of the other family.
                Entry::Occupied(mut e) => {
                    let known = e.get_mut();
                    for port in own() {
                        if !known.ports.contains(&port) {
                            known.ports.push(port);
                        }
                    }
                    if workload.protocol == Protocol::Plain && known.workload.addresses != workload.addresses {
                        let mut both = Workload::clone(&known.workload);
                        both.addresses
                            .extend(workload.addresses.iter().filter(|a| !known.workload.addresses.contains(a)));
                        known.workload = Arc::new(both);
                    }
                }
            }
        }
        Service {
            namespace: Arc::clone(&key.namespace),
            name: Arc::clone(&key.name),
            hostname: format!("{}.{}.svc.{}", key.name, key.namespace, self.domain).into(),
            vips,
            ports: common,
            endpoints: endpoints.into_values().collect(),
            awaited,
        }
    }

    /// Who answers at an endpoint. The address decides: whoever of the mesh has it is reached as
    /// what it is, whatever the slice says. Somebody is outside only when nothing says otherwise
    /// and, for a pod, when the pod is known. Notes the address in `watched` when the pod that is
    /// named is not the one that has it.
    fn who(&self, namespace: &Arc<str>, endpoint: &EndpointRecord, watched: &mut Vec<IpAddr>) -> Who<'_> {
        let address = endpoint.address;
        let named = endpoint.pod.as_ref();
        let record = named.and_then(|key| self.cluster.pods.get(key));
        if let Some(key) = named {
            let Some(record) = record else { return Who::Awaited };
            // Another pod had the name, or the slice is from before it.
            let same = endpoint.uid.is_none_or(|uid| record.uid.is_empty() || uid == Fingerprint::of(&record.uid));
            if !same {
                return Who::Awaited;
            }
            // A pod of the mesh stays in the mesh when its namespace's object vanishes.
            let known = self.mesh.workload(&workload_key(key)).is_some();
            if !known && undecided(self.cluster, key, record) {
                return Who::Awaited;
            }
        }
        if record.is_none_or(|record| !claims(record).contains(&address)) {
            watched.push(address);
        }
        if let Some(workload) = self.mesh.workload_at(address) {
            return Who::Known(workload);
        }
        if let Some(held) = self.mesh.held_at(address) {
            return if held.awaited { Who::Awaited } else { Who::Unreachable };
        }
        let (Some(key), Some(record)) = (named, record) else {
            let key = WorkloadKey { namespace: Arc::clone(namespace), name: address.to_string().into() };
            return Who::Outside(key, "default");
        };
        let workload = self.mesh.workload(&workload_key(key));
        if self.unreachable.contains(key) || workload.is_some_and(|w| w.protocol != Protocol::Plain) {
            // It is in the mesh, and is not known to have this address.
            return Who::Awaited;
        }
        // Nobody is authenticated where plaintext is dialled, so nobody sees the name.
        let account = if record.unvouched.is_some() { "default" } else { &*record.service_account };
        Who::Outside(workload_key(key), account)
    }

    fn plain(&self, key: WorkloadKey, address: IpAddr, account: &str) -> Option<Arc<Workload>> {
        let identity = identity(self.base, &key.namespace, account).ok()?;
        Some(Arc::new(Workload {
            key,
            identity,
            node: "".into(),
            addresses: vec![address],
            protocol: Protocol::Plain,
            mode: InboundMode::Permissive,
            port_modes: Vec::new(),
            local: None,
        }))
    }
}

/// An endpoint, for people.
fn describe(endpoint: &EndpointRecord) -> Arc<str> {
    match &endpoint.pod {
        Some(pod) => format!("Pod {pod} at {}", endpoint.address).into(),
        None => endpoint.address.to_string().into(),
    }
}

/// The endpoints that are used: ready ones, or, when there is none, those that still serve while they end; of this node when
/// the service says so; and those that the hints give to this node or zone, if every endpoint has hints.
fn choose<'a>(
    candidates: impl Iterator<Item = Candidate<'a>>,
    local_only: bool,
    node: &str,
    zone: Option<&str>,
) -> Vec<Candidate<'a>> {
    let here = |e: &EndpointRecord| e.node.as_deref() == Some(node);
    let all: Vec<Candidate<'_>> = candidates.filter(|(e, _)| !local_only || here(e)).collect();
    let mut usable: Vec<Candidate<'_>> = all.iter().filter(|(e, _)| e.ready).copied().collect();
    if usable.is_empty() {
        return all.into_iter().filter(|(e, _)| e.draining).collect();
    }
    if local_only {
        return usable;
    }
    for (hints, own) in [
        ((|e: &EndpointRecord| &e.nodes) as fn(&EndpointRecord) -> &Vec<Arc<str>>, Some(node)),
        (|e: &EndpointRecord| &e.zones, zone),
    ] {
        let Some(own) = own else { continue };
        let for_us = |e: &EndpointRecord| hints(e).iter().any(|h| **h == *own);
        if usable.iter().all(|(e, _)| !hints(e).is_empty()) && usable.iter().any(|(e, _)| for_us(e)) {
            usable.retain(|(e, _)| for_us(e));
            return usable;
        }
    }
    usable
}

/// Ports of the service, with the slice's numbers for them. A port that the slice does not have is not served there.
fn ports(service: &ServiceRecord, slice: &SliceRecord) -> Vec<ServicePort> {
    let target = |name: &str| slice.ports.iter().find(|(n, _)| **n == *name).map(|(_, port)| *port);
    let pair = |(name, port): &(Arc<str>, u16)| Some(ServicePort { port: *port, target_port: target(name)? });
    service.ports.iter().filter_map(pair).collect()
}

/// Ports that mean the same in all slices.
fn common(slices: &[Vec<ServicePort>]) -> Vec<ServicePort> {
    let Some((first, others)) = slices.split_first() else { return Vec::new() };
    first.iter().filter(|p| others.iter().all(|o| o.contains(p))).copied().collect()
}
