//! Pods that vanished from what the agent knows, and have not left the mesh.
//!
//! Such a pod stays captured and guarded, takes plaintext on no port, and what it dials or is
//! dialled with is refused. It is released when it was taken out of the mesh on purpose
//! ([`Departures`]), or when it is really gone ([`alive`]).

use std::{collections::BTreeMap, fmt, path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};
use tokio::{sync::oneshot, task::JoinHandle};
use underpass_abi::PodConfig;

use super::{
    CaptureError, EnrollError, Inner,
    alive::{self, Sighting},
    desired,
    enroll::{self, Enrolled},
    interfaces,
    netns::Netns,
    pod::Pod,
    records::{self, Record},
    routes, watcher,
};
use crate::mesh::{Departures, SpiffeId, Workload, WorkloadKey};

/// So many looks in a row must not see a pod before it counts as gone: processes come and go while
/// one look takes place.
const LOOKS: u8 = 2;

/// Why a pod is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reason {
    /// No source lists it any more.
    Absent,
    /// Another pod has its name.
    Replaced,
    /// It is listed, and its network namespace is not found.
    Lost,
    /// An earlier agent captured it, and what this agent knows does not have it.
    Orphaned,
    /// An earlier agent captured it, and this one cannot enrol it.
    Refused,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Absent, Self::Replaced, Self::Lost, Self::Orphaned, Self::Refused];

    /// The word in metrics and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Replaced => "replaced",
            Self::Lost => "lost",
            Self::Orphaned => "orphaned",
            Self::Refused => "refused",
        }
    }
}

/// For people.
impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Absent => "no source lists the pod any more, and its network namespace is still in use",
            Self::Replaced => "another pod has its name now, and its network namespace is still in use",
            Self::Lost => "the pod is listed, and its network namespace is not found where it was",
            Self::Orphaned => "an earlier agent captured the pod, and the agent does not know it now",
            Self::Refused => "an earlier agent captured the pod, and the agent cannot enrol it now",
        })
    }
}

/// A pod that is kept, for operators.
#[derive(Debug, Clone)]
pub struct KeptPod {
    /// Which workload it is; `None` when nobody wrote it down.
    pub key: Option<WorkloadKey>,
    /// Its identity.
    pub identity: Option<SpiffeId>,
    /// How its namespace was reached.
    pub netns: PathBuf,
    /// Number in the BPF maps.
    pub pod_id: u32,
    /// Why.
    pub reason: Reason,
}

/// What is left to do about the pods that are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Left {
    /// How many there are.
    pub pods: usize,
    /// Some were not seen: one more look shows whether they are gone.
    pub vanishing: bool,
}

type Watcher = (JoinHandle<()>, oneshot::Sender<()>);

/// A pod that is kept, by the cookie of its namespace.
pub struct Held {
    record: Record,
    pod_id: u32,
    reason: Reason,
    /// Of a pod that this agent enrolled; it listens, and refuses.
    pod: Option<Arc<Pod>>,
    /// `None` when nothing leads there.
    netns: Option<Arc<Netns>>,
    watcher: Option<Watcher>,
    /// How many looks in a row have not seen it.
    unseen: u8,
}

impl Held {
    /// The pod as it was, if it comes back as the same workload with the same identity.
    pub fn returned(self, workload: &Workload) -> Result<Enrolled, Box<Self>> {
        match (self.pod, self.netns) {
            (Some(pod), Some(netns)) if pod.key == workload.key && pod.identity == workload.identity => {
                Ok(Enrolled { pod, netns, watcher: self.watcher })
            }
            (pod, netns) => Err(Box::new(Self { pod, netns, ..self })),
        }
    }

    /// Its name, also when nobody wrote it down.
    fn name(&self) -> WorkloadKey {
        self.record
            .key()
            .unwrap_or_else(|| WorkloadKey { namespace: "unknown".into(), name: format!("pod-{}", self.pod_id).into() })
    }

    /// The pod, if this agent enrolled it.
    pub fn pod(&self) -> Option<Arc<Pod>> {
        self.pod.clone()
    }

    /// Lets go of it without changing anything in the kernel.
    pub async fn let_go(mut self) {
        if let Some(pod) = self.pod.take() {
            pod.signal_unenrolled();
        }
        stop(self.watcher.take()).await;
    }
}

async fn stop(watcher: Option<Watcher>) {
    let Some((watcher, stop)) = watcher else { return };
    drop(stop);
    if let Err(error) = watcher.await {
        tracing::error!(%error, "interface watcher failed");
    }
}

/// Keeps a pod that is enrolled. Its accept loops refuse from the first moment on.
pub async fn keep(inner: &Arc<Inner>, enrolled: Enrolled, reason: Reason) {
    let Enrolled { pod, netns, watcher } = enrolled;
    pod.keep(Some(reason));
    let record = {
        let mut registry = inner.registry();
        let entry = registry.entries.remove(&pod.key);
        registry.unclaim(pod.netns_cookie);
        let of = |entry: super::registry::Entry| entry.workload.local.as_ref().map(|l| Record::new(&entry.workload, l));
        entry.and_then(of).unwrap_or_default()
    };
    let (cookie, pod_id) = (pod.netns_cookie, pod.id);
    let held = Held { record, pod_id, reason, pod: Some(pod), netns: Some(netns), watcher, unseen: 0 };
    if let Err(error) = hold(inner, cookie, held).await {
        tracing::error!(netns = cookie, %error, "a pod is kept, but not all of it could be closed");
    }
}

/// Keeps what an earlier agent captured in the namespace with this cookie. On error it is kept all
/// the same, and not all of it is closed.
pub async fn adopt(
    inner: &Arc<Inner>,
    record: Record,
    pod_id: u32,
    cookie: u64,
    netns: Option<Arc<Netns>>,
    reason: Reason,
) -> Result<(), EnrollError> {
    hold(inner, cookie, Held { record, pod_id, reason, pod: None, netns, watcher: None, unseen: 0 }).await
}

/// Closes as much as can be closed, whatever fails.
async fn hold(inner: &Arc<Inner>, cookie: u64, mut held: Held) -> Result<(), EnrollError> {
    inner.registry().keep(cookie);
    // One that was refused is wanted: its rules stay what they were.
    let closed = if held.reason == Reason::Refused { Ok(()) } else { close(inner, cookie, held.pod_id) };
    held.record.kept = Some(held.reason);
    records::write(inner.objects.layout(), cookie, &held.record);
    let mut guarded = Ok(());
    if let (None, Some(netns)) = (&held.watcher, &held.netns) {
        match guard(inner, netns, held.pod_id).await {
            Ok(watcher) => held.watcher = Some(watcher),
            Err(error) => guarded = Err(error),
        }
    }
    let sweep = match (&closed, &held.netns) {
        (Ok(()), Some(netns)) => Some(enroll::strict_sweep(inner, &held.name(), netns)),
        _ => None,
    };
    inner.kept().insert(cookie, held);
    if let Some(sweep) = sweep {
        inner.sweeps.run(sweep).await;
    }
    closed?;
    guarded
}

/// Takes plaintext on no port from now on.
fn close(inner: &Inner, cookie: u64, pod_id: u32) -> Result<(), CaptureError> {
    let mut tables = inner.maps.tables();
    let config =
        tables.pods().get(&cookie).copied().unwrap_or(PodConfig { pod_id, flags: 0, addr4: [0; 16], addr6: [0; 16] });
    let state = desired::kept(&config, &tables.rules(pod_id), &tables.rules(desired::ALL_PODS));
    let (config, _) = tables.apply_pod(state)?;
    tables.capture(cookie, config)
}

/// Guards the interfaces that are there, and those that come.
async fn guard(inner: &Arc<Inner>, netns: &Arc<Netns>, pod_id: u32) -> Result<Watcher, EnrollError> {
    let mut watch = interfaces::watch(netns)
        .await
        .map_err(|e| EnrollError::Setup { action: "watch interfaces", reason: e.to_string() })?;
    let present = watcher::present(&mut watch);
    let programs = enroll::attach(inner, netns, pod_id, present).await?;
    let (stop, stopped) = oneshot::channel();
    Ok((tokio::spawn(watcher::run(inner.attacher(netns, pod_id), programs, watch, stopped)), stop))
}

/// Leaves the interfaces of kept pods to another agent.
pub async fn stop_watching(inner: &Inner) {
    let watchers: Vec<_> = inner.kept().values_mut().map(|held| held.watcher.take()).collect();
    for watcher in watchers {
        stop(watcher).await;
    }
}

/// Takes a pod that comes back out of the kept ones.
pub fn take(inner: &Inner, cookie: u64) -> Option<Held> {
    inner.kept().remove(&cookie)
}

/// The pods that are kept.
pub fn list(inner: &Inner) -> Vec<KeptPod> {
    let kept = inner.kept();
    let pods = kept.values().map(|held| KeptPod {
        key: held.record.key(),
        identity: held.record.identity(),
        netns: held.record.netns.clone(),
        pod_id: held.pod_id,
        reason: held.reason,
    });
    pods.collect()
}

/// Writes again what holds for kept pods, for mesh-wide rules that are about to come into force.
pub fn close_for(
    kept: &BTreeMap<u64, Held>,
    tables: &mut super::maps::Tables,
    all: &desired::Rules,
) -> Result<(), CaptureError> {
    for (cookie, held) in kept.iter().filter(|(_, held)| held.reason != Reason::Refused) {
        let Some(config) = tables.pods().get(cookie).copied() else { continue };
        let state = desired::kept(&config, &tables.rules(held.pod_id), all);
        tables.apply_pod(state)?;
    }
    Ok(())
}

/// Releases those that were taken out of the mesh on purpose.
pub async fn release_departed(inner: &Inner, departures: &Departures) {
    let leaves = |held: &Held| departures.includes(held.record.key().as_ref(), held.record.uid.as_deref());
    release_where(inner, "it was taken out of the mesh", leaves).await;
}

/// Releases those that could not be enrolled and are this workload.
pub async fn release_refused(inner: &Inner, key: &WorkloadKey) {
    let is = |held: &Held| held.reason == Reason::Refused && held.record.key().as_ref() == Some(key);
    release_where(inner, "it was taken out of the mesh", is).await;
}

/// Releases all.
pub async fn release_all(inner: &Inner) {
    release_where(inner, "every pod leaves", |_| true).await;
}

/// Looks once for all that are kept, and releases those that are gone. Orphans only when the source
/// is `in_sync`: before, it has not said everything.
pub async fn release_gone(inner: &Inner, in_sync: bool) -> Left {
    if inner.kept().is_empty() {
        return Left::default();
    }
    let sighting = tokio::task::spawn_blocking(alive::look).await.map_err(std::io::Error::other).flatten();
    match sighting {
        Ok(sighting) => note(&mut inner.kept(), &sighting),
        Err(error) => tracing::error!(%error, "cannot look whether kept pods are gone (/proc)"),
    }
    let may_go = |held: &Held| held.unseen >= LOOKS && (in_sync || held.reason != Reason::Orphaned);
    release_where(inner, "its network namespace is gone", may_go).await;
    let kept = inner.kept();
    Left { pods: kept.len(), vanishing: kept.values().any(|held| (1..LOOKS).contains(&held.unseen)) }
}

fn note(kept: &mut BTreeMap<u64, Held>, sighting: &Sighting) {
    for held in kept.values_mut() {
        let seen = sighting.shows(&held.record, held.netns.as_deref());
        held.unseen = if seen { 0 } else { held.unseen.saturating_add(1) };
    }
}

async fn release_where(inner: &Inner, why: &str, which: impl Fn(&Held) -> bool) {
    let released: Vec<(u64, Held)> = inner.kept().extract_if(.., |_, held| which(held)).collect();
    for (cookie, held) in released {
        let pod = held.record.key().map_or_else(|| "unknown".to_owned(), |key| key.to_string());
        tracing::info!(%pod, netns = cookie, %why, "a kept pod is released");
        release(inner, cookie, held).await;
    }
}

/// Capture off first, guard and inbound program last.
async fn release(inner: &Inner, cookie: u64, mut held: Held) {
    inner.sweeps.forget(cookie);
    let failed = |what, error: &CaptureError| tracing::error!(netns = cookie, %error, "{what}");
    if let Err(error) = inner.maps.tables().release(cookie) {
        failed("cannot turn capture off", &error);
    }
    if let Some(pod) = held.pod.take() {
        pod.signal_unenrolled();
    } else if let Some(netns) = &held.netns {
        routes::remove(netns).await;
    }
    stop(held.watcher.take()).await;
    let detached = enroll::detach(inner, held.netns.as_deref(), held.pod_id).await;
    records::remove(inner.objects.layout(), cookie);
    let mut registry = inner.registry();
    registry.unkeep(cookie);
    match detached {
        Ok(()) => registry.free(held.pod_id),
        // The number stays taken, so that no other pod meets these programs.
        Err(error) => failed("cannot remove the pod's tc programs or rules", &error),
    }
}
