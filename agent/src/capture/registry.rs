//! Which pods there are, and which numbers and namespaces are taken.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use underpass_abi::{PodConfig, capacity};

use super::{CaptureError, EnrollError, desired::Everywhere, netns::Netns, pod::Pod, room::Overflow};
use crate::{
    mesh::{Snapshot, Workload, WorkloadKey},
    policy::PlaintextRules,
};

/// The bookkeeping of enrolment. Guards nothing itself: it lives behind a mutex that is never held across an await.
#[derive(Default)]
pub struct Registry {
    /// Enrolled pods.
    pub entries: BTreeMap<WorkloadKey, Entry>,
    /// What the mesh-wide part of the maps is; `None` when that is not known exactly.
    pub applied: Option<Snapshot>,
    /// What holds for every pod alike. Every destination is captured also when not every address of the mesh is in `MESH`.
    pub everywhere: Everywhere,
    /// What of the mesh-wide part is enforced more strictly than it is written, because it does not fit.
    pub problems: Vec<String>,
    /// Namespaces of enrolled pods and of those being enrolled.
    claims: HashMap<u64, Claim>,
    /// Namespaces of pods that are kept ([`super::kept`]).
    kept: BTreeSet<u64>,
    /// Numbers that something in a map or a pin refers to.
    ids: BTreeSet<u32>,
}

/// An enrolled pod.
#[derive(Clone)]
pub struct Entry {
    /// The pod.
    pub pod: Arc<Pod>,
    /// Its namespace.
    pub netns: Arc<Netns>,
    /// As what it was enrolled.
    pub workload: Workload,
    /// What modes and policies make of plaintext for it.
    pub plaintext: Option<PlaintextRules>,
    /// What of its rules did not fit into the maps.
    pub overflow: Overflow,
}

#[derive(Debug, Clone)]
struct Claim {
    key: WorkloadKey,
    id: u32,
}

impl Registry {
    /// Starts with the numbers found in maps and pins.
    pub fn new(ids: impl IntoIterator<Item = u32>) -> Self {
        Self { ids: ids.into_iter().filter(|id| *id != 0).collect(), ..Self::default() }
    }

    /// Reserves a namespace and a number for a workload: the one the namespace has in the maps, else the lowest free.
    pub fn claim(&mut self, key: &WorkloadKey, netns: &Netns, adopted: Option<&PodConfig>) -> Result<u32, EnrollError> {
        if let Some(claim) = self.claims.get(&netns.cookie()) {
            return Err(EnrollError::Duplicate { path: netns.path().to_owned(), other: claim.key.to_string() });
        }
        let id = match adopted {
            Some(config) => config.pod_id,
            None => self.free_id()?,
        };
        self.ids.insert(id);
        self.claims.insert(netns.cookie(), Claim { key: key.clone(), id });
        self.kept.remove(&netns.cookie());
        Ok(id)
    }

    /// The numbers that the next pods will have.
    pub fn next_ids(&self, count: usize) -> Vec<u32> {
        (1..=capacity::PODS as u32).filter(|id| !self.ids.contains(id)).take(count).collect()
    }

    fn free_id(&self) -> Result<u32, CaptureError> {
        let last = capacity::PODS as u32;
        (1..=last).find(|id| !self.ids.contains(id)).ok_or(CaptureError::Capacity {
            map: "PODS",
            capacity: capacity::PODS,
            needed: capacity::PODS + 1,
        })
    }

    /// Gives a namespace back. Its number is not free before [`Registry::free`].
    pub fn unclaim(&mut self, netns: u64) {
        self.claims.remove(&netns);
    }

    /// The number can be used again: nothing refers to it any more.
    pub fn free(&mut self, id: u32) {
        self.ids.remove(&id);
    }

    /// Remembers that a namespace stays captured although nobody enrols it.
    pub fn keep(&mut self, netns: u64) {
        self.kept.insert(netns);
    }

    /// Forgets that.
    pub fn unkeep(&mut self, netns: u64) {
        self.kept.remove(&netns);
    }

    /// Is the namespace somebody's?
    pub fn has(&self, netns: u64) -> bool {
        self.claims.contains_key(&netns) || self.kept.contains(&netns)
    }

    /// A number for a pod that is kept.
    pub fn reserve(&mut self) -> Result<u32, CaptureError> {
        let id = self.free_id()?;
        self.ids.insert(id);
        Ok(id)
    }

    /// Of the namespaces in the maps, those that belong to nobody.
    pub fn orphans(&self, pods: &BTreeMap<u64, PodConfig>) -> BTreeSet<u64> {
        pods.keys().copied().filter(|n| !self.has(*n)).collect()
    }

    /// Of the numbers in use, those that belong to nobody.
    pub fn orphan_ids(&self, pods: &BTreeMap<u64, PodConfig>) -> BTreeSet<u32> {
        let kept = self.kept.iter().filter_map(|n| pods.get(n)).map(|c| c.pod_id);
        let live: BTreeSet<u32> = self.claims.values().map(|c| c.id).chain(kept).collect();
        self.ids.difference(&live).copied().collect()
    }
}
