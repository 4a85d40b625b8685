//! Addresses that more than one object claims, and who has each of them.
//!
//! Any kubelet writes the status of the pods of its node, so a claim proves nothing. Nobody loses
//! an address because somebody else claims it: while a dispute stands, the address stays with the
//! object that has it, and connections go to that object's identity or nowhere. A pod outside the
//! mesh never takes the address of one inside: that would be plaintext.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashSet},
    net::IpAddr,
    sync::Arc,
};

use super::{
    cluster::{Changes, Cluster},
    enrolment::{Wish, wish},
    index::Index,
    pods::{Claims, claims, cluster_scoped, workload_key},
    records::{Key, PodRecord},
    status::Problem,
};
use crate::mesh::{Resolution, Snapshot};

/// Services by the addresses that they claim.
pub(super) type Vips = Index<IpAddr, Key>;

/// Who has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Owner {
    Pod(Key),
    Service(Key),
}

/// The disputes that stand.
#[derive(Debug, Default)]
pub(super) struct Disputes {
    owners: BTreeMap<IpAddr, Owner>,
    /// What was published last: whoever had an address then has it now.
    last: Option<Snapshot>,
}

/// Whose address is another's than before.
#[derive(Debug, Default)]
pub(super) struct Moved {
    pub(super) pods: HashSet<Key>,
    pub(super) services: BTreeSet<Key>,
}

/// Everything that decides about a claim.
pub(super) struct Claimants<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) node: &'a str,
    pub(super) claims: &'a Claims,
    pub(super) vips: &'a Vips,
}

/// Notes which service claims which address now.
pub(super) fn note_vips(vips: &mut Vips, cluster: &Cluster, changes: &Changes) {
    for (key, old) in &changes.services {
        for vip in old.iter().flat_map(|service| &service.vips) {
            vips.remove(vip, key);
        }
        for vip in cluster.services.get(key).iter().flat_map(|service| &service.vips) {
            vips.add(*vip, key.clone());
        }
    }
}

/// Addresses whose owner may be another one, now that these pods and these changes are looked at.
pub(super) fn touched(cluster: &Cluster, changes: &Changes, pods: &HashSet<Key>) -> BTreeSet<IpAddr> {
    let now = pods.iter().filter_map(|key| cluster.pods.get(key)).flat_map(|pod| claims(pod));
    let before = changes.pods.values().flatten().flat_map(|pod| claims(pod));
    let services = changes.services.iter();
    let services = services.flat_map(|(key, old)| old.iter().chain(cluster.services.get(key)).flat_map(|s| &s.vips));
    now.chain(before).chain(services).copied().collect()
}

impl Claimants<'_> {
    fn is_disputed(&self, address: &IpAddr) -> bool {
        self.claims.get(address).len() + self.vips.get(address).len() > 1
    }

    /// Of the pods: one that the CNI plugin handed over with this address, then one of the mesh,
    /// then one of this node (its own kubelet says so), then one that does not end, then the one
    /// that has it, then the older.
    fn rank(&self, key: &Key, pod: &PodRecord, address: &IpAddr, inside: bool, has_it: bool) -> impl Ord + use<> {
        let attached = self.cluster.attached.get(key);
        let confirmed = attached.is_some_and(|a| a.is(pod) && a.addresses.contains(address));
        let here = pod.node.as_deref() == Some(self.node);
        (confirmed, inside, here, !pod.terminating, has_it, Reverse(pod.created))
    }

    fn inside(&self, key: &Key, pod: &PodRecord, last: Option<&Snapshot>) -> bool {
        let namespace = self.cluster.namespaces.get(&cluster_scoped(&key.namespace));
        !self.cluster.leaving
            && match wish(pod, namespace.map(AsRef::as_ref)) {
                Wish::In => true,
                Wish::Out => false,
                // Its namespace's object is not there: it is where it was.
                Wish::Unknown => last.is_some_and(|last| last.workload(&workload_key(key)).is_some()),
            }
    }

    fn owner(&self, address: &IpAddr, had: Option<&Owner>, last: Option<&Snapshot>) -> Option<Owner> {
        let has_it = |key: &Key| matches!(had, Some(Owner::Pod(had)) if had == key);
        let pods = self.claims.get(address).iter().filter_map(|key| Some((key, self.cluster.pods.get(key)?)));
        // In order, so of equals it is the first.
        let pods: Vec<_> = pods.collect();
        let inside = |key: &Key, pod: &PodRecord| self.inside(key, pod, last);
        let rank = |key: &Key, pod: &PodRecord| self.rank(key, pod, address, inside(key, pod), has_it(key));
        let best = pods.into_iter().rev().max_by_key(|(key, pod)| rank(key, pod));
        let services = self.vips.get(address);
        let Some(first) = services.first() else { return best.map(|(key, _)| Owner::Pod(key.clone())) };
        let service = match had {
            Some(Owner::Service(had)) if services.contains(had) => had,
            _ => first,
        };
        let service = Owner::Service(service.clone());
        let Some((key, pod)) = best.filter(|(key, pod)| inside(key, pod)) else { return Some(service) };
        // What the API server assigned to a service is not taken by a kubelet of another node.
        let here = pod.node.as_deref() == Some(self.node);
        let keeps = had == Some(&service) && !here;
        Some(if keeps { service } else { Owner::Pod(key.clone()) })
    }
}

impl Disputes {
    /// Decides about these addresses.
    pub(super) fn settle(&mut self, claimants: &Claimants<'_>, mut touched: BTreeSet<IpAddr>) -> Moved {
        let mut moved = Moved::default();
        // Few, and what the CNI plugin says of them is no change to a pod.
        touched.extend(self.owners.keys());
        for address in touched {
            let before = self.owners.remove(&address);
            let owner = if claimants.is_disputed(&address) {
                let had = before.clone().or_else(|| self.had(&address));
                claimants.owner(&address, had.as_ref(), self.last.as_ref())
            } else {
                None
            };
            if owner != before {
                moved.pods.extend(claimants.claims.get(&address).iter().cloned());
                moved.services.extend(claimants.vips.get(&address).iter().cloned());
            }
            if let Some(owner) = owner {
                self.owners.insert(address, owner);
            }
        }
        moved
    }

    fn had(&self, address: &IpAddr) -> Option<Owner> {
        let key =
            |namespace: &Arc<str>, name: &Arc<str>| Key { namespace: Arc::clone(namespace), name: Arc::clone(name) };
        match self.last.as_ref()?.resolve(*address) {
            Resolution::Workload(w) => Some(Owner::Pod(key(&w.key.namespace, &w.key.name))),
            Resolution::Service(s) => Some(Owner::Service(key(&s.namespace, &s.name))),
            Resolution::Held(held) => Some(Owner::Pod(key(&held.pod.namespace, &held.pod.name))),
            Resolution::Unknown => None,
        }
    }

    /// This is what is published now.
    pub(super) fn published(&mut self, snapshot: &Snapshot) {
        self.last = Some(snapshot.clone());
    }

    /// Is an address that the pod claims its own?
    pub(super) fn pod_has(&self, key: &Key, address: &IpAddr) -> bool {
        self.owners.get(address).is_none_or(|owner| matches!(owner, Owner::Pod(of) if of == key))
    }

    /// May a service have an address that it claims? Among services the mesh decides.
    pub(super) fn service_may_have(&self, address: &IpAddr) -> bool {
        !matches!(self.owners.get(address), Some(Owner::Pod(_)))
    }

    /// Addresses that are disputed.
    pub(super) fn len(&self) -> usize {
        self.owners.len()
    }

    /// What is wrong with the objects that claim what they do not have.
    pub(super) fn problems(&self, claims: &Claims, vips: &Vips) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (address, owner) in &self.owners {
            let (name, pod) = match owner {
                Owner::Pod(key) => (format!("Pod {key}"), Some(key)),
                Owner::Service(key) => (format!("Service {key}"), None),
            };
            let problem = |object: String| Problem {
                object,
                problem: format!(
                    "claims address {address}, which {name} has; the address stays there until one of the claims ends"
                ),
            };
            let pods = claims.get(address).iter().filter(|key| Some(*key) != pod);
            problems.extend(pods.map(|key| problem(format!("Pod {key}"))));
            if pod.is_some() {
                problems.extend(vips.get(address).iter().map(|key| problem(format!("Service {key}"))));
            }
        }
        problems
    }
}
