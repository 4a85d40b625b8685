//! The policies that select a workload, compiled.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
};

use super::{
    Decision, Disposition, Request, Selection, Verdict,
    request::{SourceAddress, Subject},
    select,
    table::Table,
};
use crate::mesh::{Action, Condition, Policy, PolicyKey, PolicyStatus, Snapshot, WorkloadKey};

/// The compiled policies of this node's workloads, of one snapshot.
#[derive(Debug, Default)]
pub struct NodePolicies {
    sets: HashMap<WorkloadKey, Arc<PolicySet>>,
}

impl NodePolicies {
    /// Compiles what this node enforces. Workloads that the same policies select share one set.
    pub fn compile(snapshot: &Snapshot) -> Self {
        Self::select(snapshot, |_| None, HashMap::new())
    }

    /// Compiles what this node enforces, after what it enforced with another snapshot. A workload that is subject to the same policies
    /// keeps its set.
    pub fn compile_after(snapshot: &Snapshot, before: &Snapshot, compiled: &Self) -> Self {
        let same_policies = snapshot.shares_policies(before);
        let kept = |workload: &WorkloadKey| {
            let same = same_policies && snapshot.workload_policy(workload) == before.workload_policy(workload);
            compiled.sets.get(workload).filter(|_| same).cloned()
        };
        let mut shared = HashMap::new();
        let mut seen = HashSet::new();
        for set in compiled.sets.values().filter(|set| seen.insert(Arc::as_ptr(set))) {
            shared.insert(names(&set.selection), Arc::clone(set));
        }
        Self::select(snapshot, kept, shared)
    }

    fn select(
        snapshot: &Snapshot,
        kept: impl Fn(&WorkloadKey) -> Option<Arc<PolicySet>>,
        mut shared: HashMap<Names, Arc<PolicySet>>,
    ) -> Self {
        let mut set = |workload: &WorkloadKey| {
            kept(workload).unwrap_or_else(|| {
                let selection = select(snapshot, workload);
                match shared.get(&names(&selection)) {
                    Some(known) if known.selection == selection => Arc::clone(known),
                    // None of these names, or they mean something else now.
                    _ => {
                        let set = Arc::new(PolicySet::new(selection));
                        shared.insert(names(&set.selection), Arc::clone(&set));
                        set
                    }
                }
            })
        };
        Self { sets: snapshot.local_workloads().map(|w| (w.key.clone(), set(&w.key))).collect() }
    }

    /// The workloads that name policies which are not known, with those.
    pub fn unknown(&self) -> impl Iterator<Item = (&WorkloadKey, &[PolicyKey])> {
        let unknown = self.sets.iter().map(|(workload, set)| (workload, &*set.selection.unknown));
        unknown.filter(|(_, unknown)| !unknown.is_empty())
    }

    /// The policies of a workload. `None`: it is none of this node's, so nothing may be let in for it.
    pub fn of(&self, workload: &WorkloadKey) -> Option<&Arc<PolicySet>> {
        self.sets.get(workload)
    }
}

/// The policies of a selection, and those that are not known.
type Names = (Vec<PolicyKey>, Vec<PolicyKey>);

fn names(selection: &Selection) -> Names {
    (selection.policies.iter().map(|p| p.key.clone()).collect(), selection.unknown.clone())
}

/// The policies that select a workload. Immutable; evaluation takes no lock and no time that grows noticeably with the
/// number of policies.
#[derive(Debug)]
pub struct PolicySet {
    selection: Selection,
    enforced: Layer,
    /// Absent without dry-run policies.
    dry_run: Option<Layer>,
}

/// Policies that are enforced, or those that are not.
#[derive(Debug)]
struct Layer {
    obstacle: Option<Decision>,
    deny: Table,
    allow: Table,
}

impl PolicySet {
    /// Compiles a selection.
    pub fn new(selection: Selection) -> Self {
        let (dry_run, enforced): (Vec<_>, Vec<_>) = selection.policies.iter().cloned().partition(|p| p.dry_run);
        let unknown = selection.unknown.first().cloned().map(Decision::Unknown);
        Self {
            enforced: Layer::new(&enforced, unknown),
            dry_run: (!dry_run.is_empty()).then(|| Layer::new(&dry_run, None)),
            selection,
        }
    }

    /// What was compiled.
    pub fn selection(&self) -> &Selection {
        &self.selection
    }

    /// Does nothing select the workload? Then everything is allowed.
    pub fn is_empty(&self) -> bool {
        self.selection.policies.is_empty() && self.selection.unknown.is_empty()
    }

    /// Decides on a connection.
    pub fn evaluate(&self, request: &Request<'_>) -> Verdict {
        let subject = Subject::new(request);
        let decision = decide(&[&self.enforced], &subject);
        let dry_run = self.dry_run.as_ref().map(|dry_run| decide(&[&self.enforced, dry_run], &subject));
        Verdict { decision, dry_run }
    }

    /// Whether a plaintext connection to `destination` (the workload's own address) is allowed, as far as that can be said
    /// without its source address. Dry-run policies do not count.
    pub fn plaintext_disposition(&self, destination: SocketAddr) -> Disposition {
        let Layer { obstacle, deny, allow } = &self.enforced;
        let some = Subject::plaintext(destination, SourceAddress::Some);
        let every = Subject::plaintext(destination, SourceAddress::Every);
        let unknown = matches!(obstacle, Some(Decision::Unknown(_)));
        let nobody_allowed = !allow.is_empty() && allow.first(&some).is_none();
        if deny.first(&every).is_some() || (!unknown && (obstacle.is_some() || nobody_allowed)) {
            return Disposition::Deny;
        }
        if unknown {
            // The policy may arrive at any moment, and whoever evaluates can wait for it.
            return Disposition::Evaluate;
        }
        let all_allowed = allow.is_empty() || allow.first(&every).is_some();
        if all_allowed && deny.first(&some).is_none() { Disposition::Allow } else { Disposition::Evaluate }
    }

    /// Every port that a rule names. On all others the policies decide alike.
    pub fn ports(&self) -> BTreeSet<u16> {
        let mut ports = BTreeSet::new();
        for rule in self.selection.policies.iter().flat_map(|p| &p.rules) {
            let conditions = rule.when.iter().filter_map(|c| match c {
                Condition::DestinationPort(values) => Some(values),
                _ => None,
            });
            for values in rule.to.iter().map(|o| &o.ports).chain(conditions) {
                ports.extend(values.any_of.iter().chain(&values.none_of));
            }
        }
        ports
    }
}

impl Layer {
    fn new(policies: &[Arc<Policy>], obstacle: Option<Decision>) -> Self {
        let invalid = policies.iter().find(|p| matches!(p.status(), PolicyStatus::Invalid { .. })).cloned();
        let of = |action| Table::new(policies.iter().filter(|p| p.action == action).cloned().collect());
        Self { obstacle: invalid.map(Decision::Invalid).or(obstacle), deny: of(Action::Deny), allow: of(Action::Allow) }
    }
}

fn decide(layers: &[&Layer], subject: &Subject<'_>) -> Decision {
    if let Some(obstacle) = layers.iter().find_map(|l| l.obstacle.clone()) {
        return obstacle;
    }
    if let Some(rule) = layers.iter().find_map(|l| l.deny.first(subject)) {
        return Decision::Denied(rule);
    }
    if layers.iter().all(|l| l.allow.is_empty()) {
        return Decision::AllowedByDefault;
    }
    let allowed = layers.iter().find_map(|l| l.allow.first(subject));
    allowed.map_or(Decision::NotAllowed, Decision::Allowed)
}
