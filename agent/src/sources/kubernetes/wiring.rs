//! What has to be worked out again when something is different.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use super::{
    cluster::{Changes, Cluster},
    index::Index,
    pods::{self, Claims},
    records::{Key, PodRecord, SliceRecord},
};
use crate::mesh::{Service, Snapshot};

/// Which objects concern which others.
#[derive(Debug, Default)]
pub(super) struct Wiring {
    /// Pods by the addresses that they claim.
    pub(super) claims: Claims,
    /// Slices by the service they belong to.
    pub(super) slices: Index<Key, Key>,
    /// Services by the pods that their slices name.
    users: Index<Key, Key>,
    /// Services by addresses of their endpoints that no pod named there has.
    watchers: Index<IpAddr, Key>,
    /// The same by service; only those that have such endpoints.
    watched: HashMap<Key, Vec<IpAddr>>,
}

/// The service that a slice belongs to.
fn service_of(key: &Key, slice: &SliceRecord) -> Key {
    Key { namespace: Arc::clone(&key.namespace), name: Arc::clone(&slice.service) }
}

impl Wiring {
    /// Notes who claims which address now. Returns the pods that are different, or that claim an address which a different one claims
    /// or has claimed.
    pub(super) fn pods(&mut self, cluster: &Cluster, changes: &Changes) -> HashSet<Key> {
        let mut touched: Vec<IpAddr> = Vec::new();
        for (key, old) in &changes.pods {
            let (old, new) = (old.as_deref().map_or(&[][..], pods::claims), cluster.pods.get(key));
            let new = new.map_or(&[][..], |new| pods::claims(new));
            for address in old {
                self.claims.remove(address, key);
            }
            for address in new {
                self.claims.add(*address, key.clone());
            }
            touched.extend(old.iter().chain(new));
        }
        let mut dirty: HashSet<Key> = changes.pods.keys().cloned().collect();
        for address in touched {
            match self.claims.get(&address) {
                // That is one of the different ones, or nobody any more.
                [] => {}
                claimants => dirty.extend(claimants.iter().cloned()),
            }
        }
        dirty
    }

    /// Notes which slices and pods concern which services now. Returns the services that are different, or have a different slice.
    pub(super) fn services(&mut self, cluster: &Cluster, changes: &Changes) -> BTreeSet<Key> {
        let mut dirty: BTreeSet<Key> = changes.services.keys().cloned().collect();
        for (key, old) in &changes.slices {
            if let Some(old) = old {
                let service = service_of(key, old);
                for pod in old.endpoints.iter().filter_map(|e| e.pod.as_ref()) {
                    self.users.remove(pod, &service);
                }
                self.slices.remove(&service, key);
                dirty.insert(service);
            }
            if let Some(new) = cluster.slices.get(key) {
                let service = service_of(key, new);
                for pod in new.endpoints.iter().filter_map(|e| e.pod.as_ref()) {
                    self.users.add(pod.clone(), service.clone());
                }
                self.slices.add(service.clone(), key.clone());
                dirty.insert(service);
            }
        }
        dirty
    }

    /// Notes on which addresses a service depends beside the pods that its slices name.
    pub(super) fn watch(&mut self, service: &Key, addresses: Vec<IpAddr>) {
        let before = if addresses.is_empty() {
            self.watched.remove(service)
        } else {
            for address in &addresses {
                self.watchers.add(*address, service.clone());
            }
            self.watched.insert(service.clone(), addresses)
        };
        for address in before.into_iter().flatten() {
            self.watchers.remove(&address, service);
        }
    }

    /// The services that a pod concerns, which is or was as `old`: those whose slices name it, or
    /// have an endpoint at one of its addresses, whichever pod that names.
    pub(super) fn concerned<'a>(
        &'a self,
        cluster: &'a Cluster,
        pod: &'a Key,
        old: Option<&'a PodRecord>,
    ) -> impl Iterator<Item = &'a Key> {
        let now = cluster.pods.get(pod).map(Arc::as_ref);
        let addresses = old.into_iter().chain(now).flat_map(pods::claims);
        let by_address = addresses.flat_map(move |address| {
            let others = self.claims.get(address).iter().filter(move |other| *other != pod);
            self.watchers.get(address).iter().chain(others.flat_map(|other| self.users.get(other)))
        });
        self.users.get(pod).iter().chain(by_address)
    }
}

/// Services as they would be if no address was claimed twice.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    services: BTreeMap<Key, Arc<Service>>,
    vips: Index<IpAddr, Key>,
}

/// A service that was one thing and is another.
pub(super) struct Replaced {
    pub(super) key: Key,
    pub(super) before: Option<Arc<Service>>,
    pub(super) after: Option<Arc<Service>>,
}

impl Candidates {
    /// All, in the order in which they claim addresses.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Key, &Arc<Service>)> {
        self.services.iter()
    }

    /// Does a service claim the address?
    pub(super) fn claim(&self, address: IpAddr) -> bool {
        !self.vips.get(&address).is_empty()
    }

    /// Takes in what a service is now; `None` when that is what it was.
    pub(super) fn set(&mut self, key: Key, service: Option<Service>) -> Option<Replaced> {
        let before = self.services.get(&key).cloned();
        if before.as_deref() == service.as_ref() {
            return None;
        }
        let after = service.map(Arc::new);
        for vip in before.iter().flat_map(|s| &s.vips) {
            self.vips.remove(vip, &key);
        }
        for vip in after.iter().flat_map(|s| &s.vips) {
            self.vips.add(*vip, key.clone());
        }
        match &after {
            Some(service) => drop(self.services.insert(key.clone(), Arc::clone(service))),
            None => drop(self.services.remove(&key)),
        }
        Some(Replaced { key, before, after })
    }

    /// Does somebody else claim one of its addresses, before or after?
    pub(super) fn disputed(&self, replaced: &Replaced, mesh: &Snapshot) -> bool {
        let vips = replaced.before.iter().chain(&replaced.after).flat_map(|s| &s.vips);
        vips.into_iter().any(|vip| {
            self.vips.get(vip).iter().any(|other| *other != replaced.key) || mesh.workload_at(*vip).is_some()
        })
    }
}
