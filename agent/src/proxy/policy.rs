//! Policies in force: asked before a connection is let in, and about every live one when they change.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use tracing::{error, info};

use super::Proxy;
use crate::{
    capture::Pod,
    mesh::{InboundMode, Snapshot, SpiffeId, WorkloadKey},
    policy::{Decision, Disposition, NodePolicies, PlaintextRules, PolicySet, Request, Selection, plaintext_rules},
    relay::{CloseReason, Connection, Direction},
};

/// The policies of this node's workloads, and whom they were last enforced on.
pub struct Enforcement {
    current: ArcSwap<InForce>,
    /// What plaintext connections inside the pods were last judged by. They do not pass the agent, so they are looked for only
    /// when this changes.
    plaintext: Mutex<HashMap<WorkloadKey, Judged>>,
}

/// One snapshot's policies.
struct InForce {
    snapshot: Arc<Snapshot>,
    node: NodePolicies,
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
        let nothing = InForce { snapshot, node: NodePolicies::default() };
        Self { current: ArcSwap::from_pointee(nothing), plaintext: Mutex::default() }
    }

    /// Puts a snapshot's policies in force, for connections that come from now on.
    pub(super) fn set(&self, snapshot: &Arc<Snapshot>) {
        let node = NodePolicies::compile(snapshot);
        self.current.store(Arc::new(InForce { snapshot: Arc::clone(snapshot), node }));
    }

    /// May the peer of a tunnel reach `destination`, the workload's own address? `source` is the checked one of its header.
    pub(super) fn tunnel(
        &self,
        workload: &WorkloadKey,
        peer: &SpiffeId,
        source: IpAddr,
        destination: SocketAddr,
    ) -> Result<(), Forbidden> {
        self.current.load().judge(workload, Some(peer), source, destination)
    }

    /// May a plaintext connection from `source` reach `destination`, the workload's own address?
    pub(super) fn plaintext(
        &self,
        workload: &WorkloadKey,
        source: IpAddr,
        destination: SocketAddr,
    ) -> Result<(), Forbidden> {
        self.current.load().judge(workload, None, source, destination)
    }

    /// What the programs in the kernel have to do with plaintext for a workload.
    pub(super) fn plaintext_rules(&self, workload: &WorkloadKey) -> PlaintextRules {
        let current = self.current.load();
        match (current.snapshot.workload(workload), current.node.of(workload)) {
            (Some(known), Some(policies)) => plaintext_rules(&current.snapshot, known, policies),
            _ => PlaintextRules { default: Disposition::Deny, ports: std::collections::BTreeMap::new() },
        }
    }

    /// Does a live connection have to end?
    pub(super) fn forbids(&self, connection: &Connection) -> bool {
        let what = &connection.what;
        if what.direction != Direction::Inbound {
            return false;
        }
        let current = self.current.load();
        // A pod that has left the mesh keeps its connections.
        current.node.of(&what.workload).is_some()
            && current.judge(&what.workload, what.source_identity.as_ref(), what.source.ip(), what.upstream).is_err()
    }

    /// Takes note of what decides about plaintext for a workload; whether that is something new.
    fn changed(&self, workload: &WorkloadKey) -> bool {
        let current = self.current.load();
        let mut all = self.plaintext.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(policies) = current.node.of(workload) else {
            all.remove(workload);
            return false;
        };
        let judged = Judged { rules: self.plaintext_rules(workload), selection: policies.selection().clone() };
        let lenient = policies.is_empty();
        match all.insert(workload.clone(), judged) {
            Some(before) => all.get(workload) != Some(&before),
            // Of an earlier agent's pods nothing is known.
            None => !lenient,
        }
    }
}

impl InForce {
    fn judge(
        &self,
        workload: &WorkloadKey,
        peer: Option<&SpiffeId>,
        source: IpAddr,
        destination: SocketAddr,
    ) -> Result<(), Forbidden> {
        let (Some(known), Some(policies)) = (self.snapshot.workload(workload), self.node.of(workload)) else {
            return Err(Forbidden("the workload is not this node's any more".into()));
        };
        if peer.is_none() && known.mode_of(destination.port()) == InboundMode::Strict {
            return Err(Forbidden("plaintext, and the mode is STRICT".into()));
        }
        let request = Request { peer, source, destination };
        judge(policies, workload, &request)
    }
}

fn judge(policies: &PolicySet, workload: &WorkloadKey, request: &Request<'_>) -> Result<(), Forbidden> {
    let verdict = policies.evaluate(request);
    if let Some(dry_run) = verdict.dry_run.as_ref().filter(|dry_run| dry_run.is_allowed() != verdict.is_allowed()) {
        let peer = request.peer.map(tracing::field::display);
        info!(
            pod = %workload, source = %request.source, destination = %request.destination, peer, enforced = %verdict.decision,
            "dry run: would be {}: {dry_run}", if dry_run.is_allowed() { "allowed" } else { "denied" }
        );
    }
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

    /// Ends plaintext connections inside a pod, which do not pass the agent, when what decides about them has changed.
    pub(super) async fn end_forbidden_plaintext(self: &Arc<Self>, pod: &Pod) {
        if !self.policies.changed(&pod.key) {
            return;
        }
        let (proxy, key) = (Arc::clone(self), pod.key.clone());
        let rules = self.policies.plaintext_rules(&key);
        let forbidden = move |local: SocketAddr, remote: SocketAddr| match rules.of(local.port()) {
            Disposition::Allow => false,
            Disposition::Deny => true,
            Disposition::Evaluate => proxy.policies.plaintext(&key, remote.ip(), local).is_err(),
        };
        match self.capture.end_plaintext(pod, forbidden).await {
            Ok(0) => {}
            Ok(ended) => info!(pod = %pod.key, ended, "plaintext connections ended: the policies forbid them now"),
            Err(error) => error!(pod = %pod.key, %error, "plaintext connections that the policies forbid go on"),
        }
    }
}
