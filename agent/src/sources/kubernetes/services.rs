//! From services and their endpoint slices to services of the mesh: which endpoints are used, as kube-proxy decides it.

use std::{
    collections::{BTreeMap, HashSet, btree_map::Entry},
    net::IpAddr,
    sync::Arc,
};

use super::{
    cluster::Cluster,
    disputes::Disputes,
    index::Index,
    pods::{identity, workload_key},
    records::{EndpointRecord, Key, ServiceRecord, SliceRecord},
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
    /// Cluster's domain, `cluster.local`.
    pub(super) domain: &'a str,
}

/// An endpoint and the slice it is in.
type Candidate<'a> = (&'a EndpointRecord, usize);

impl Context<'_> {
    /// The service, when one of its endpoints is in the mesh; kube-proxy serves all others, and nothing of theirs is captured.
    pub(super) fn service(&self, key: &Key, record: &ServiceRecord) -> Option<Service> {
        let slices: Vec<_> = self.slices.get(key).iter().filter_map(|slice| self.cluster.slices.get(slice)).collect();
        let candidates = slices.iter().enumerate().flat_map(|(i, s)| s.endpoints.iter().map(move |e| (e, i)));
        let chosen = choose(candidates, record.local_only, &self.base.node, self.zone);
        let ports: Vec<Vec<ServicePort>> = slices.iter().map(|slice| ports(record, slice)).collect();
        let common = common(&ports);
        let mut endpoints: BTreeMap<WorkloadKey, Endpoint> = BTreeMap::new();
        for (endpoint, slice) in chosen {
            let Some(workload) = self.workload(&key.namespace, endpoint) else { continue };
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
        if endpoints.values().all(|e| e.workload.protocol == Protocol::Plain) {
            return None;
        }
        // An address that a pod has is the pod's, whatever a service says. The others are captured
        // all the same.
        let vips: Vec<_> = record.vips.iter().filter(|vip| self.disputes.service_may_have(vip)).copied().collect();
        if vips.is_empty() {
            return None;
        }
        Some(Service {
            namespace: Arc::clone(&key.namespace),
            name: Arc::clone(&key.name),
            hostname: format!("{}.{}.svc.{}", key.name, key.namespace, self.domain).into(),
            vips,
            ports: common,
            endpoints: endpoints.into_values().collect(),
        })
    }

    /// Who answers at an endpoint. A pod that is not known (yet) is nobody: it may be one that must not be dialled in plaintext.
    fn workload(&self, namespace: &Arc<str>, endpoint: &EndpointRecord) -> Option<Arc<Workload>> {
        let Some(key) = &endpoint.pod else {
            let key = WorkloadKey { namespace: Arc::clone(namespace), name: endpoint.address.to_string().into() };
            return self.plain(key, endpoint.address, "default");
        };
        if let Some(workload) = self.mesh.workload(&workload_key(key)) {
            return workload.addresses.contains(&endpoint.address).then(|| Arc::clone(workload));
        }
        // It must not be dialled in plaintext.
        if self.unreachable.contains(key) {
            return None;
        }
        let pod = self.cluster.pods.get(key)?;
        // Nobody is authenticated where plaintext is dialled, so nobody sees the name.
        let account = if pod.unvouched.is_some() { "default" } else { &*pod.service_account };
        self.plain(workload_key(key), endpoint.address, account)
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
