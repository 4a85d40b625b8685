//! Policies in force: asked before a connection is let in, and about every live one when they change.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use arc_swap::ArcSwap;
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};
use tracing::{info, warn};

use super::{Proxy, hold::Hold};
use crate::{
    capture::{Judge, Pod},
    mesh::{InboundMode, Snapshot, SpiffeId, WorkloadKey},
    policy::{
        Decision, Disposition, NodePolicies, PlaintextRules, PolicySet, Request, Selection, Verdict, plaintext_rules,
    },
    relay::{CloseReason, Connection, Direction},
};

/// The policies of this node's workloads, and whom they were last enforced on.
pub struct Enforcement {
    current: ArcSwap<InForce>,
    /// What plaintext connections inside the pods were last judged by. They do not pass the agent, so they are looked for only
    /// when this changes.
    plaintext: Mutex<HashMap<WorkloadKey, Judged>>,
    /// Policies that are named and have not arrived.
    hold: Hold,
    /// Told whenever other policies are in force.
    changes: watch::Sender<()>,
}

/// One snapshot's policies.
struct InForce {
    snapshot: Arc<Snapshot>,
    node: Arc<NodePolicies>,
    /// `node` is made of `snapshot`.
    compiled: bool,
}

/// What decides about plaintext for a workload.
#[derive(PartialEq, Eq)]
struct Judged {
    rules: PlaintextRules,
    selection: Selection,
}

/// Why a connection is not let in; for logs.
#[derive(Debug)]
pub(super) struct Forbidden(String);

impl std::fmt::Display for Forbidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl Enforcement {
    /// Lets nothing in until [`Self::set`] is called.
    pub fn new(snapshot: Arc<Snapshot>) -> Self {
        let nothing = InForce { snapshot, node: Arc::default(), compiled: false };
        Self {
            current: ArcSwap::from_pointee(nothing),
            plaintext: Mutex::default(),
            hold: Hold::default(),
            changes: watch::Sender::new(()),
        }
    }

    /// Puts a snapshot's policies in force, for connections that come from now on. `false`: they judge every connection as those before.
    pub(super) fn set(&self, snapshot: &Arc<Snapshot>) -> bool {
        let before = self.current.load();
        let same = before.compiled && judges_alike(snapshot, &before.snapshot);
        let node = if same {
            Arc::clone(&before.node)
        } else if before.compiled {
            Arc::new(NodePolicies::compile_after(snapshot, &before.snapshot, &before.node))
        } else {
            Arc::new(NodePolicies::compile(snapshot))
        };
        if !same {
            // Pods come and go; nothing is kept of those that went.
            self.judged().retain(|workload, _| node.of(workload).is_some());
            // Before they are in force, so that nobody is denied for a policy whose time has not
            // begun.
            self.hold.set(&node, Instant::now());
        }
        self.current.store(Arc::new(InForce { snapshot: Arc::clone(snapshot), node, compiled: true }));
        if !same {
            self.changes.send_replace(());
        }
        !same
    }

    /// The policies of a workload, if it is this node's. The same ones are the same allocation.
    pub(super) fn of(&self, workload: &WorkloadKey) -> Option<Arc<PolicySet>> {
        self.current.load().node.of(workload).cloned()
    }

    /// When live connections have to be judged again because a policy that a workload names did not
    /// arrive.
    pub(super) fn due(&self) -> Option<Instant> {
        self.hold.due()
    }

    /// May the peer of a tunnel reach `destination`, the workload's own address? `source` is the
    /// checked one of its header. Waits for policies that the workload names and that have not
    /// arrived.
    pub(super) async fn tunnel(
        &self,
        workload: &WorkloadKey,
        peer: &SpiffeId,
        source: IpAddr,
        destination: SocketAddr,
    ) -> Result<(), Forbidden> {
        self.admit(workload, &Request { peer: Some(peer), source, destination }).await
    }

    /// May a plaintext connection from `source` reach `destination`, the workload's own address?
    /// Waits as above.
    pub(super) async fn plaintext(
        &self,
        workload: &WorkloadKey,
        source: IpAddr,
        destination: SocketAddr,
    ) -> Result<(), Forbidden> {
        self.admit(workload, &Request { peer: None, source, destination }).await
    }

    /// Judges a connection that wants in, as soon as all policies that the workload names are known
    /// or the time for that is over.
    async fn admit(&self, workload: &WorkloadKey, request: &Request<'_>) -> Result<(), Forbidden> {
        let mut changes = None;
        loop {
            let current = self.current.load_full();
            let verdict = current.verdict(workload, request)?;
            let held = matches!(verdict.decision, Decision::Unknown(_))
                .then(|| self.hold.until(workload, Instant::now()))
                .flatten();
            let Some(until) = held else { return InForce::admit(workload, request, verdict) };
            let Some(changes) = &mut changes else {
                // Looked at once more, so that no change between the look and the subscription is
                // missed.
                changes = Some(self.changes.subscribe());
                continue;
            };
            // At the end of the time the verdict stands. The sender is part of self.
            let _ = timeout_at(until, changes.changed()).await;
        }
    }

    /// Is a connection left alone because a policy that decides about it may still arrive?
    fn is_held(&self, workload: &WorkloadKey, verdict: &Verdict) -> bool {
        matches!(verdict.decision, Decision::Unknown(_)) && self.hold.until(workload, Instant::now()).is_some()
    }

    /// Does an open connection have to end?
    fn ends(&self, current: &InForce, workload: &WorkloadKey, request: &Request<'_>) -> bool {
        match current.verdict(workload, request) {
            Ok(verdict) => !verdict.is_allowed() && !self.is_held(workload, &verdict),
            Err(_) => true,
        }
    }

    /// What the programs in the kernel have to do with plaintext for a workload.
    pub(super) fn plaintext_rules(&self, workload: &WorkloadKey) -> PlaintextRules {
        self.current.load().plaintext_rules(workload)
    }

    /// Does an open plaintext connection that does not pass the agent have to end?
    fn forbids_plaintext(&self, workload: &WorkloadKey, source: IpAddr, destination: SocketAddr) -> bool {
        self.ends(&self.current.load(), workload, &Request { peer: None, source, destination })
    }

    /// Does a live connection have to end?
    pub(super) fn forbids(&self, connection: &Connection) -> bool {
        let what = &connection.what;
        if what.direction != Direction::Inbound {
            return false;
        }
        let (peer, source) = (what.source_identity.as_ref(), what.source.ip());
        let request = Request { peer, source, destination: what.upstream };
        let current = self.current.load();
        // A pod that has left the mesh keeps its connections.
        current.node.of(&what.workload).is_some() && self.ends(&current, &what.workload, &request)
    }

    /// Takes note of what decides about plaintext for a workload; is that something new?
    fn changed(&self, workload: &WorkloadKey) -> bool {
        let current = self.current.load();
        let Some(policies) = current.node.of(workload) else { return false };
        let judged = Judged { rules: current.plaintext_rules(workload), selection: policies.selection().clone() };
        let mut all = self.judged();
        let changed = match all.get(workload) {
            Some(before) => *before != judged,
            // Of an earlier agent's pods nothing is known.
            None => !policies.is_empty(),
        };
        all.insert(workload.clone(), judged);
        changed
    }

    fn judged(&self) -> MutexGuard<'_, HashMap<WorkloadKey, Judged>> {
        self.plaintext.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InForce {
    /// Enforces the verdict on a connection that wants in, and reports what dry-run policies would
    /// make of it.
    fn admit(workload: &WorkloadKey, request: &Request<'_>, verdict: Verdict) -> Result<(), Forbidden> {
        if let Some(dry_run) = verdict.dry_run.as_ref().filter(|dry_run| dry_run.is_allowed() != verdict.is_allowed()) {
            let peer = request.peer.map(tracing::field::display);
            info!(
                pod = %workload, source = %request.source, destination = %request.destination, peer, enforced = %verdict.decision,
                "dry run: would be {}: {dry_run}", if dry_run.is_allowed() { "allowed" } else { "denied" }
            );
        }
        enforced(verdict)
    }

    fn verdict(&self, workload: &WorkloadKey, request: &Request<'_>) -> Result<Verdict, Forbidden> {
        let (Some(known), Some(policies)) = (self.snapshot.workload(workload), self.node.of(workload)) else {
            return Err(Forbidden("the workload is not this node's any more".into()));
        };
        if request.peer.is_none() && known.mode_of(request.destination.port()) == InboundMode::Strict {
            return Err(Forbidden("plaintext, and the mode is STRICT".into()));
        }
        Ok(policies.evaluate(request))
    }

    fn plaintext_rules(&self, workload: &WorkloadKey) -> PlaintextRules {
        match (self.snapshot.workload(workload), self.node.of(workload)) {
            (Some(known), Some(policies)) => plaintext_rules(&self.snapshot, known, policies),
            _ => PlaintextRules { default: Disposition::Deny, ports: BTreeMap::new() },
        }
    }
}

/// Is everything the same that decides about connections of this node's workloads? `false` also when that is not obvious.
pub(super) fn judges_alike(snapshot: &Snapshot, before: &Snapshot) -> bool {
    snapshot.shares_local_workloads(before) && snapshot.shares_policies(before) && snapshot.settings == before.settings
}

fn enforced(verdict: Verdict) -> Result<(), Forbidden> {
    match verdict.decision {
        Decision::AllowedByDefault | Decision::Allowed(_) => Ok(()),
        denied => Err(Forbidden(denied.to_string())),
    }
}

impl Proxy {
    /// Resets every live connection through the agent that the policies in force forbid.
    pub(super) fn end_forbidden(&self) {
        let ended = self.table.close_where(CloseReason::Policy, |connection| self.policies.forbids(connection));
        if ended > 0 {
            info!(ended, "connections reset: the policies forbid them now");
        }
    }

    /// Has a certificate of the connection's other end been revoked?
    pub(super) fn is_revoked(&self, connection: &Connection) -> bool {
        connection.what.peer.as_ref().is_some_and(|chain| self.tls.revocations().revoke(chain))
    }

    /// Resets every live connection whose other end has a certificate that is revoked, as soon as it is, until dropped.
    pub async fn end_revoked(self: Arc<Self>) {
        let mut changes = self.tls.revocations().subscribe();
        changes.mark_changed();
        while changes.changed().await.is_ok() {
            let ended = self.table.close_where(CloseReason::Policy, |connection| self.is_revoked(connection));
            if ended > 0 {
                info!(ended, "connections reset: certificates of their other ends are revoked");
            }
        }
    }

    /// Ends plaintext connections inside a pod, which do not pass the agent, when what decides about them has changed.
    pub(super) async fn end_forbidden_plaintext(self: &Arc<Self>, pod: &Pod) {
        if self.policies.changed(&pod.key) {
            self.end_plaintext(pod).await;
        }
    }

    /// Ends the connections of workloads that name a policy which did not arrive in time.
    pub(super) async fn end_unheld(self: &Arc<Self>) {
        let over = self.policies.hold.take_over(Instant::now());
        if over.is_empty() {
            return;
        }
        self.end_forbidden();
        for pod in self.capture.pods().into_iter().filter(|pod| over.contains(&pod.key)) {
            warn!(pod = %pod.key, "a policy that it names has not arrived; its connections are denied until it does");
            self.end_plaintext(&pod).await;
        }
    }

    async fn end_plaintext(self: &Arc<Self>, pod: &Pod) {
        let (proxy, key) = (Arc::downgrade(self), pod.key.clone());
        let judge: Judge = Arc::new(move || {
            let proxy = proxy.upgrade()?;
            proxy.policies.of(&key)?;
            let (rules, key) = (proxy.policies.plaintext_rules(&key), key.clone());
            Some(Box::new(move |local: SocketAddr, remote: SocketAddr| match rules.of(local.port()) {
                Disposition::Allow => false,
                Disposition::Deny => true,
                Disposition::Evaluate => proxy.policies.forbids_plaintext(&key, remote.ip(), local),
            }))
        });
        self.capture.end_plaintext(pod, judge).await;
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
