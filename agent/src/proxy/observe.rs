//! What is said of a connection in metrics and the access log: who is at its ends, by what is known of the mesh.

use std::{
    fmt::Display,
    net::{IpAddr, SocketAddr},
    sync::{Arc, LazyLock},
};

use super::PodContext;
use crate::{
    mesh::{LATEST_REVISION, Resolution, Service, Snapshot, SpiffeId, Workload, WorkloadKey},
    relay::{DataPath, Direction, NewConnection},
    telemetry::{Account, Failure, Labels, LogChoice, Party, RefusalReason, Reporter, ServiceName, TraceId},
};

/// A connection that goes nowhere.
pub(super) struct Refused<'a> {
    /// Which way it was to go.
    pub(super) direction: Direction,
    /// Why it does not.
    pub(super) reason: RefusalReason,
    /// For people.
    pub(super) detail: &'a dyn Display,
    /// The client's address.
    pub(super) source: SocketAddr,
    /// Where it was to go.
    pub(super) destination: Option<SocketAddr>,
    /// Who the peer proved to be.
    pub(super) identity: Option<&'a SpiffeId>,
    /// The service, as the client named it.
    pub(super) service: Option<&'a str>,
    /// What ties the lines of both agents together.
    pub(super) trace: Option<TraceId>,
}

/// Both ends of a connection.
struct Ends<'a> {
    direction: Direction,
    local: &'a WorkloadKey,
    /// Whose address the other end has.
    peer: Option<&'a Arc<Workload>>,
    /// Who the local pod is; only with mutual TLS.
    own_identity: Option<&'a SpiffeId>,
    /// Who the peer proved to be.
    peer_identity: Option<&'a SpiffeId>,
    service: Option<&'a Arc<Service>>,
}

impl PodContext {
    /// Counts an established connection.
    pub(super) fn account(&self, new: &NewConnection, trace: Option<TraceId>) -> Account {
        let mesh = self.proxy.mesh.load();
        let labels = established(&mesh, new);
        Account::open(&self.proxy.telemetry, labels, self.log_choice(&mesh), trace)
    }

    /// Counts and logs one that goes nowhere.
    pub(super) fn refused(&self, refused: &Refused<'_>) {
        let mesh = self.proxy.mesh.load();
        let labels = unestablished(&mesh, &self.pod.key, refused);
        let failure = Failure {
            reason: refused.reason,
            detail: refused.detail,
            trace: refused.trace,
            source: Some(refused.source),
            destination: refused.destination,
            service: refused.service,
        };
        self.proxy.telemetry.fail(labels, self.log_choice(&mesh), &failure);
    }

    /// Decides whether a connection that begins now will have a line.
    fn log_choice(&self, mesh: &Snapshot) -> LogChoice {
        let rule = mesh.settings.access_log.of(&self.pod.key.namespace);
        if !rule.enabled.unwrap_or(self.proxy.access_log) {
            return LogChoice::Never;
        }
        match rule.sample_ppm {
            Some(share) if rand::random_range(0..1_000_000) >= share => LogChoice::Failures,
            _ => LogChoice::Always,
        }
    }
}

/// Labels of a connection that reached the relay.
fn established(mesh: &Snapshot, new: &NewConnection) -> Labels {
    let mutual = new.data_path != DataPath::Plain;
    let (address, own, peer) = match new.direction {
        Direction::Outbound => (new.upstream.ip(), &new.source_identity, &new.destination_identity),
        Direction::Inbound => (new.source.ip(), &new.destination_identity, &new.source_identity),
    };
    let service = new.service.as_deref().and_then(|name| mesh.service_named(name));
    labels(
        mesh,
        &Ends {
            direction: new.direction,
            local: &new.workload,
            peer: peer_at(mesh, address, peer.as_ref()),
            own_identity: own.as_ref().filter(|_| mutual),
            peer_identity: peer.as_ref().filter(|_| mutual),
            service: selected(mesh, new.direction, &new.workload, service),
        },
    )
}

/// Labels of a connection that was refused, from what was known by then.
fn unestablished(mesh: &Snapshot, local: &WorkloadKey, refused: &Refused<'_>) -> Labels {
    let (address, resolved) = match refused.direction {
        Direction::Outbound => match refused.destination.map(|to| (to.ip(), mesh.resolve(to.ip()))) {
            Some((_, Resolution::Service(service))) => (None, Some(service)),
            Some((address, _)) => (Some(address), None),
            None => (None, None),
        },
        Direction::Inbound => {
            (Some(refused.source.ip()), refused.service.and_then(|name| mesh.service_named(name)).cloned())
        }
    };
    labels(
        mesh,
        &Ends {
            direction: refused.direction,
            local,
            peer: address.and_then(|address| peer_at(mesh, address, refused.identity)),
            own_identity: None,
            peer_identity: refused.identity,
            service: selected(mesh, refused.direction, local, resolved.as_ref()),
        },
    )
}

/// The workload at an address, unless the peer proved to be somebody else.
fn peer_at<'a>(mesh: &'a Snapshot, address: IpAddr, proved: Option<&SpiffeId>) -> Option<&'a Arc<Workload>> {
    mesh.workload_at(address).filter(|w| proved.is_none_or(|identity| w.identity == *identity))
}

/// A service that the client of an inbound connection names counts only when it selects the pod.
fn selected<'a>(
    mesh: &Snapshot,
    direction: Direction,
    local: &WorkloadKey,
    service: Option<&'a Arc<Service>>,
) -> Option<&'a Arc<Service>> {
    let own = mesh.workload(local);
    let selects = |s: &&Arc<Service>| own.is_some_and(|own| s.endpoints.iter().any(|e| Arc::ptr_eq(&e.workload, own)));
    service.filter(|s| direction == Direction::Outbound || selects(s))
}

fn labels(mesh: &Snapshot, ends: &Ends<'_>) -> Labels {
    let own = party(mesh, ends.local, ends.own_identity);
    let peer = match (ends.peer, ends.peer_identity) {
        (Some(workload), identity) => party(mesh, &workload.key, identity),
        // Whoever it is, it is of that namespace: that is in the identity.
        (None, Some(identity)) => Party {
            namespace: Some(identity.namespace().into()),
            principal: Some(identity.clone()),
            ..Party::default()
        },
        (None, None) => Party::default(),
    };
    let (reporter, source, destination) = match ends.direction {
        Direction::Outbound => (Reporter::Source, own, peer),
        Direction::Inbound => (Reporter::Destination, peer, own),
    };
    let mut labels = Labels::new(reporter);
    (labels.source, labels.destination) = (source, destination);
    labels.service = ends.service.map(|s| ServiceName {
        hostname: Arc::clone(&s.hostname),
        name: Arc::clone(&s.name),
        namespace: Arc::clone(&s.namespace),
    });
    labels.mutual_tls = ends.peer_identity.is_some();
    labels
}

fn party(mesh: &Snapshot, key: &WorkloadKey, principal: Option<&SpiffeId>) -> Party {
    static LATEST: LazyLock<Arc<str>> = LazyLock::new(|| LATEST_REVISION.into());
    Party {
        workload: Some(Arc::clone(&key.name)),
        namespace: Some(Arc::clone(&key.namespace)),
        principal: principal.cloned(),
        app: Some(Arc::clone(mesh.canonical_name(key).unwrap_or(&key.name))),
        version: Some(Arc::clone(mesh.canonical_revision(key).unwrap_or(&LATEST))),
    }
}

#[cfg(test)]
#[path = "observe_tests.rs"]
mod tests;
