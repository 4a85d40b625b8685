//! How the source is doing, for operators.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::telemetry::logging::printable;

/// Most problems that are listed; `problems_total` counts the others.
const MAX_PROBLEMS: usize = 100;
/// An error that has not come again for so long is over, although nothing happened to the objects
/// that would tell: twice the longest pause between two attempts.
const OVER: Duration = Duration::from_mins(1);
/// Longest error kept, in bytes.
const MAX_ERROR: usize = 512;

/// A kind of object that is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    /// `v1`
    Pod,
    /// `v1`
    Namespace,
    /// `v1`: this node's.
    Node,
    /// `v1`
    Service,
    /// `discovery.k8s.io`
    EndpointSlice,
    /// `security.istio.io`, where it exists.
    AuthorizationPolicy,
    /// `security.istio.io`, where it exists.
    PeerAuthentication,
}

impl Kind {
    /// All of them.
    pub(super) const ALL: [Self; 7] = [
        Self::Pod,
        Self::Namespace,
        Self::Node,
        Self::Service,
        Self::EndpointSlice,
        Self::AuthorizationPolicy,
        Self::PeerAuthentication,
    ];

    /// Does it exist only where somebody installed its CRD?
    pub(super) fn is_custom(self) -> bool {
        matches!(self, Self::AuthorizationPolicy | Self::PeerAuthentication)
    }

    /// API group, kind and plural.
    pub(super) fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Pod => ("", "Pod", "pods"),
            Self::Namespace => ("", "Namespace", "namespaces"),
            Self::Node => ("", "Node", "nodes"),
            Self::Service => ("", "Service", "services"),
            Self::EndpointSlice => ("discovery.k8s.io", "EndpointSlice", "endpointslices"),
            Self::AuthorizationPolicy => ("security.istio.io", "AuthorizationPolicy", "authorizationpolicies"),
            Self::PeerAuthentication => ("security.istio.io", "PeerAuthentication", "peerauthentications"),
        }
    }
}

/// The source at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceStatus {
    /// Every kind has been listed since the agent started.
    pub synced: bool,
    /// What is in force is (in part) what was known when the agent last ran.
    pub from_last_good: bool,
    /// The kinds that are followed.
    pub kinds: Vec<KindStatus>,
    /// Addresses that several objects claim; each stays with the object that has it.
    #[serde(default)]
    pub disputed_addresses: usize,
    /// How many objects are not taken as they are.
    pub problems_total: usize,
    /// The first of them, by name.
    pub problems: Vec<Problem>,
}

/// One kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KindStatus {
    /// Which.
    pub kind: Kind,
    /// The version that is read; absent while the API server knows none.
    pub version: Option<String>,
    /// Objects that count.
    pub objects: usize,
    /// It has been listed since the agent started.
    pub synced: bool,
    /// Seconds since the API server last said something about it.
    pub heard_seconds_ago: Option<u64>,
    /// What went wrong last; absent since the API server answered again, or for a minute without
    /// another failure.
    pub error: Option<String>,
}

/// An object that is not taken as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// `kind namespace/name`
    pub object: String,
    /// What is wrong, and what to do.
    pub problem: String,
}

/// Collects the status. Cloning gives another handle.
#[derive(Clone, Debug, Default)]
pub struct Statuses(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    watches: HashMap<Kind, Watch>,
    counts: BTreeMap<Kind, (usize, bool)>,
    from_last_good: bool,
    disputed: usize,
    problems_total: usize,
    problems: Vec<Problem>,
}

#[derive(Debug, Default)]
struct Watch {
    version: Option<String>,
    heard: Option<SystemTime>,
    /// And when it last came.
    error: Option<(String, Instant)>,
}

impl Watch {
    fn error(&self) -> Option<&str> {
        self.error.as_ref().filter(|(_, at)| at.elapsed() < OVER).map(|(error, _)| error.as_str())
    }
}

impl Statuses {
    /// The status now.
    pub fn status(&self) -> SourceStatus {
        let state = self.lock();
        let nothing = Watch::default();
        let kinds = Kind::ALL.into_iter().map(|kind| {
            let watch = state.watches.get(&kind).unwrap_or(&nothing);
            let (objects, synced) = state.counts.get(&kind).copied().unwrap_or_default();
            KindStatus {
                kind,
                version: watch.version.clone(),
                objects,
                synced,
                heard_seconds_ago: watch.heard.map(|t| t.elapsed().unwrap_or_default().as_secs()),
                error: watch.error().map(ToOwned::to_owned),
            }
        });
        let kinds: Vec<_> = kinds.collect();
        SourceStatus {
            synced: kinds.iter().all(|k| k.synced),
            from_last_good: state.from_last_good,
            disputed_addresses: state.disputed,
            kinds,
            problems_total: state.problems_total,
            problems: state.problems.clone(),
        }
    }

    /// Addresses that several objects claim.
    pub fn disputed_addresses(&self) -> usize {
        self.lock().disputed
    }

    /// The API server does not know the kind. Is that new?
    pub(super) fn absent(&self, kind: Kind) -> bool {
        let mut state = self.lock();
        let watch = state.watches.entry(kind).or_default();
        let new = watch.version.is_some() || watch.heard.is_none();
        (watch.version, watch.error, watch.heard) = (None, None, Some(SystemTime::now()));
        new
    }

    pub(super) fn serving(&self, kind: Kind, version: &str) {
        self.lock().watches.entry(kind).or_default().version = Some(version.to_owned());
    }

    pub(super) fn heard(&self, kind: Kind) {
        let mut state = self.lock();
        let watch = state.watches.entry(kind).or_default();
        (watch.heard, watch.error) = (Some(SystemTime::now()), None);
    }

    /// Said once in the log, until the API server answers again.
    pub(super) fn failed(&self, kind: Kind, error: &str) {
        let error = printable(&error[..error.floor_char_boundary(MAX_ERROR)]).into_owned();
        let mut state = self.lock();
        let watch = state.watches.entry(kind).or_default();
        if watch.error().is_none() {
            warn!(?kind, %error, "cannot be followed; what is known of it stays in force, and it is tried again");
        }
        watch.error = Some((error, Instant::now()));
    }

    /// Notes what the snapshot in force was made of.
    pub(super) fn compiled(
        &self,
        counts: impl IntoIterator<Item = (Kind, usize, bool)>,
        from_last_good: bool,
        disputed: usize,
        mut problems: Vec<Problem>,
    ) {
        problems.sort_by(|a, b| a.object.cmp(&b.object));
        let mut state = self.lock();
        state.counts = counts.into_iter().map(|(kind, count, synced)| (kind, (count, synced))).collect();
        state.from_last_good = from_last_good;
        state.disputed = disputed;
        state.problems_total = problems.len();
        problems.truncate(MAX_PROBLEMS);
        state.problems = problems;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
