//! Policies that workloads name and that have not arrived: how long connections are held for them.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    mesh::{PolicyKey, WorkloadKey},
    policy::NodePolicies,
};

/// How long a policy may take to arrive after a workload has named it: as long as a handshake may
/// take. New connections are held and live ones left alone until then; afterwards both are denied.
pub(super) const ARRIVAL: Duration = Duration::from_secs(10);

/// Since when policies have been missing, by the workload that names them.
#[derive(Debug, Default)]
pub(super) struct Hold(Mutex<HashMap<WorkloadKey, Missing>>);

#[derive(Debug, Default)]
struct Missing {
    policies: HashMap<PolicyKey, Instant>,
    /// The workload's connections have been ended because one of them did not arrive.
    over: bool,
}

impl Missing {
    /// When the first of them is given up.
    fn until(&self) -> Option<Instant> {
        self.policies.values().min().map(|since| *since + ARRIVAL)
    }
}

impl Hold {
    /// Takes note of the policies that are missing now.
    pub(super) fn set(&self, node: &NodePolicies, now: Instant) {
        let mut all = self.lock();
        let mut before = std::mem::take(&mut *all);
        for (workload, unknown) in node.unknown() {
            let mut missing = before.remove(workload).unwrap_or_default();
            missing.policies.retain(|key, _| unknown.contains(key));
            for key in unknown {
                missing.policies.entry(key.clone()).or_insert(now);
            }
            missing.over &= missing.until().is_some_and(|until| until <= now);
            all.insert(workload.clone(), missing);
        }
    }

    /// Until when a workload's connections are held for a policy. `None`: not at all, or not any
    /// more.
    pub(super) fn until(&self, workload: &WorkloadKey, now: Instant) -> Option<Instant> {
        self.lock().get(workload)?.until().filter(|until| now < *until)
    }

    /// When the next workload's live connections have to be judged because a policy did not arrive.
    pub(super) fn due(&self) -> Option<Instant> {
        self.lock().values().filter(|missing| !missing.over).filter_map(Missing::until).min()
    }

    /// The workloads whose live connections have to be judged now, each once.
    pub(super) fn take_over(&self, now: Instant) -> Vec<WorkloadKey> {
        let mut all = self.lock();
        let over = all.iter_mut().filter(|(_, m)| !m.over && m.until().is_some_and(|until| until <= now));
        over.map(|(workload, missing)| {
            missing.over = true;
            workload.clone()
        })
        .collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<WorkloadKey, Missing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
