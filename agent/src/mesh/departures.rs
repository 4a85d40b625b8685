//! Who was taken out of the mesh on purpose.
//!
//! A pod that a snapshot does not list has only vanished: the object was force-deleted, a watch
//! lost it, somebody else claims its address, the copy on disk is older than the pod. None of this
//! is a decision, so none of this opens what was closed. A decision is written down here.

use std::{collections::BTreeSet, sync::Arc};

use super::WorkloadKey;

/// The explicit opt-outs that a source knows of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Departures {
    /// The source has said everything it has to say since the agent started, so nothing here or in
    /// the snapshot comes from a copy.
    pub in_sync: bool,
    /// Underpass is being removed: every pod leaves.
    pub everybody: bool,
    /// Uids of this node's pods whose labels, annotations or namespace say that they take no part.
    pub uids: BTreeSet<Arc<str>>,
    /// Workloads that the configuration file lists without `enroll`.
    pub workloads: BTreeSet<WorkloadKey>,
}

impl Departures {
    /// Was this very pod taken out of the mesh? By its uid, or by its name where names are all that
    /// the source has.
    pub fn includes(&self, key: Option<&WorkloadKey>, uid: Option<&str>) -> bool {
        self.everybody
            || uid.is_some_and(|uid| self.uids.contains(uid))
            || key.is_some_and(|key| self.workloads.contains(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_pod_leaves() {
        let key = |name: &str| WorkloadKey { namespace: "shop".into(), name: name.into() };
        let by_uid = Departures { uids: BTreeSet::from(["one".into()]), ..Departures::default() };
        assert!(by_uid.includes(Some(&key("web")), Some("one")));
        assert!(!by_uid.includes(Some(&key("web")), Some("two")), "another pod of that name");
        assert!(!by_uid.includes(Some(&key("web")), None) && !by_uid.includes(None, None));
        let by_name = Departures { workloads: BTreeSet::from([key("web")]), ..Departures::default() };
        assert!(by_name.includes(Some(&key("web")), None) && !by_name.includes(Some(&key("api")), None));
        let everybody = Departures { everybody: true, ..Departures::default() };
        assert!(everybody.includes(None, None));
    }
}
