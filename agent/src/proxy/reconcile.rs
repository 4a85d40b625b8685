//! Keeps the enrolled pods equal to what the mesh says about this node.

use std::{
    collections::BTreeMap,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream};
use serde::Serialize;
use tokio::sync::{Notify, watch};
use tracing::{error, info, warn};

use super::{Proxy, policy::judges_alike};
use crate::{
    capture::{Pod, Reason},
    mesh::{NetnsId, PodNamespace, Snapshot, SpiffeId, Workload, WorkloadKey},
    policy::PolicySet,
    relay::{CloseReason, Connection},
    until::until,
};

/// A pod can be refused for reasons that no event announces (a process in the wrong cgroup, a port in use), so it
/// is tried again this often.
const RETRY_REFUSED: Duration = Duration::from_secs(5);
/// First and longest pause between two looks for kept pods that are gone. A look goes through all
/// processes, once for all pods.
const LOOK: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));
/// Pods enrolled side by side; the work is system calls in namespaces, so a few are enough.
const ENROL_PARALLEL: usize = 4;

/// How a pod of this node stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum PodState {
    /// Captured and listening.
    Enrolled {
        /// Its number in the BPF maps.
        pod_id: u32,
    },
    /// Not in the mesh, and why.
    Refused {
        /// For people.
        reason: String,
    },
    /// It vanished without leaving the mesh: captured and guarded, takes no plaintext, and every
    /// connection is refused.
    Kept {
        /// Its number in the BPF maps.
        pod_id: u32,
        /// Why it is kept.
        reason: Reason,
    },
}

impl PodState {
    fn result(&self) -> Result<(), String> {
        match self {
            Self::Enrolled { .. } => Ok(()),
            Self::Refused { reason } => Err(reason.clone()),
            Self::Kept { reason, .. } => Err(reason.to_string()),
        }
    }
}

/// A pod of this node, for `status`.
#[derive(Debug, Clone)]
pub struct PodStatus {
    /// Which workload. Of a pod that an earlier agent captured and nobody knows, the name is made
    /// of its number.
    pub key: WorkloadKey,
    /// Its identity, if it is known.
    pub identity: Option<SpiffeId>,
    /// What its network namespace is called.
    pub netns: PathBuf,
    /// The namespace that this is about; `None` when there was none of that name, and of a kept
    /// pod.
    pub namespace: Option<NetnsId>,
    /// How it stands.
    pub state: PodState,
}

/// What the node has been made equal to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// The last configuration that every pod has been tried with; 0 at first.
    pub generation: u64,
    /// Why the latest one is not in the BPF maps, if it is not.
    pub error: Option<String>,
}

/// Enrols and un-enrols pods as snapshots come.
pub struct Reconciler {
    proxy: Arc<Proxy>,
    prepare: Box<dyn Fn(&Snapshot) + Send + Sync>,
    states: Mutex<BTreeMap<WorkloadKey, Standing>>,
    applied: Mutex<Applied>,
    /// The last snapshot of which every pod is enrolled; `None` while there is something to be tried again.
    done: Mutex<Option<Arc<Snapshot>>>,
    /// Told whenever the state of a pod is another one.
    changes: watch::Sender<()>,
    /// Held while the node is being changed.
    turn: tokio::sync::Mutex<()>,
    /// How often a pod has been enrolled, or tried to.
    enrolments: AtomicU64,
    /// Pods and maps are another agent's.
    retired: AtomicBool,
    /// When kept pods are looked at next, and the pause before that.
    look: Mutex<Option<(Instant, Duration)>>,
    /// Something says that a kept pod may be gone.
    hint: Notify,
}

/// A pod of this node, and what it was enrolled with.
struct Standing {
    status: PodStatus,
    enrolled: Option<Enrolled>,
}

/// All that an enrolment depends on. While it is the same there is nothing to do.
#[derive(PartialEq)]
struct Enrolled {
    workload: Arc<Workload>,
    policies: ByAddress<PolicySet>,
    /// Ports that the mesh excludes.
    excluded: Vec<u16>,
    /// Device and inode of the namespace: another one may have the same path.
    namespace: NetnsId,
}

impl Enrolled {
    fn uid(&self) -> Option<Arc<str>> {
        self.workload.local.as_ref()?.uid.clone()
    }
}

/// Equal when it is the same allocation.
struct ByAddress<T>(Arc<T>);

impl<T> PartialEq for ByAddress<T> {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Standing {
    fn is_refused(&self) -> bool {
        matches!(self.status.state, PodState::Refused { .. })
    }
}

impl Reconciler {
    /// `prepare` sees every snapshot before its pods are enrolled: issuers that are configured per workload hook in there.
    pub fn new(proxy: Arc<Proxy>, prepare: Box<dyn Fn(&Snapshot) + Send + Sync>) -> Arc<Self> {
        Arc::new(Self {
            proxy,
            prepare,
            states: Mutex::default(),
            applied: Mutex::default(),
            done: Mutex::default(),
            changes: watch::Sender::new(()),
            turn: tokio::sync::Mutex::default(),
            enrolments: AtomicU64::new(0),
            retired: AtomicBool::new(false),
            look: Mutex::default(),
            hint: Notify::new(),
        })
    }

    /// From now on somebody else enrols pods, or nobody: only policies and identities are followed, for the connections that are still
    /// here. Waits for what is under way.
    pub async fn retire(&self) {
        self.retired.store(true, Relaxed);
        drop(self.turn.lock().await);
    }

    /// How a pod stands: enrolled, or why not. `None` when it is not tried.
    pub fn state(&self, key: &WorkloadKey) -> Option<Result<(), String>> {
        let state = self.states().get(key).map(|pod| pod.status.state.result());
        state.or_else(|| self.kept().find(|pod| pod.key == *key).map(|pod| pod.state.result()))
    }

    /// A sandbox has been taken down, it is said: kept pods are looked at soon. No proof that one
    /// is gone.
    pub fn look_soon(&self) {
        self.hint.notify_one();
    }

    /// Waits until the pod with this namespace is enrolled, or until that has failed.
    pub async fn settled(&self, key: &WorkloadKey, netns: NetnsId) -> Result<(), String> {
        let mut changes = self.changes.subscribe();
        loop {
            changes.borrow_and_update();
            let pod = self.states().get(key).map(|pod| pod.status.clone());
            let is = |pod: &PodStatus| pod.namespace == Some(netns);
            if let Some(pod) = pod.filter(is) {
                return pod.state.result();
            }
            // The sender is part of self.
            let _ = changes.changed().await;
        }
    }

    /// How every pod of this node stands.
    pub fn pods(&self) -> Vec<PodStatus> {
        let mut pods: Vec<_> = self.states().values().map(|standing| standing.status.clone()).collect();
        // One that is wanted and cannot be enrolled is there already, with the reason.
        let listed = |pod: &PodStatus| {
            let refused = matches!(pod.state, PodState::Kept { reason: Reason::Refused, .. });
            refused && pods.iter().any(|other| other.key == pod.key)
        };
        let kept: Vec<_> = self.kept().filter(|pod| !listed(pod)).collect();
        pods.extend(kept);
        pods.sort_by(|a, b| a.key.cmp(&b.key));
        pods
    }

    fn kept(&self) -> impl Iterator<Item = PodStatus> {
        self.proxy.capture.kept().into_iter().map(|pod| PodStatus {
            key: pod.key.unwrap_or_else(|| WorkloadKey {
                namespace: "unknown".into(),
                name: format!("pod-{}", pod.pod_id).into(),
            }),
            identity: pod.identity,
            netns: pod.netns,
            namespace: None,
            state: PodState::Kept { pod_id: pod.pod_id, reason: pod.reason },
        })
    }

    /// What the node has been made equal to.
    pub fn applied(&self) -> Applied {
        self.applied.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How often a pod has been enrolled, or tried to: a number that only grows.
    pub fn enrolments(&self) -> u64 {
        self.enrolments.load(Relaxed)
    }

    fn note(&self, change: impl FnOnce(&mut Applied)) {
        change(&mut self.applied.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Follows the mesh until dropped. [`Self::reconcile`] has been called once before, after these generations had been subscribed to:
    /// what was published while it ran is not missed.
    pub async fn run(self: Arc<Self>, mut generations: watch::Receiver<u64>) {
        loop {
            let again = self.applied().error.is_some() || self.states().values().any(Standing::is_refused);
            let look = self.next_look().map(|(at, _)| at);
            tokio::select! {
                changed = generations.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(RETRY_REFUSED), if again => {}
                () = until(look) => {
                    self.look().await;
                    continue;
                }
                () = self.hint.notified() => {
                    self.look_by(LOOK.0);
                    continue;
                }
                () = until(self.proxy.policies.due()) => {
                    self.proxy.end_unheld().await;
                    continue;
                }
            }
            self.reconcile().await;
        }
    }

    /// Makes the node what the current snapshot says. A pod that cannot be enrolled does not keep others from it. What is of other nodes
    /// costs nothing here but their addresses.
    pub async fn reconcile(&self) {
        let _turn = self.turn.lock().await;
        let snapshot = self.proxy.mesh.load();
        // Put back when all is done.
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner).take();
        let settled =
            done.is_some_and(|done| judges_alike(&snapshot, &done) && snapshot.departures() == done.departures());
        if !settled {
            (self.prepare)(&snapshot);
            self.proxy.certificates.want(snapshot.local_identities());
        }
        // Tighter policies first of all: nothing below may hold them up.
        if self.proxy.policies.set(&snapshot) {
            self.proxy.end_forbidden();
        }
        if self.retired.load(Relaxed) {
            return;
        }
        // Addresses before pods: a pod must not be enrolled with its peers' addresses still uncaptured. When they cannot be
        // written, everything that pods send is captured, so pods may come and go all the same.
        let error = self.proxy.capture.apply(&snapshot).err().map(|e| e.to_string());
        if let Some(error) = &error {
            error!(%error, "the BPF maps do not have all of the configuration; every connection of the pods is captured");
        }
        if !settled {
            self.part(&snapshot).await;
            let workloads: Vec<Arc<Workload>> = snapshot.local_workloads().cloned().collect();
            stream::iter(workloads)
                .for_each_concurrent(ENROL_PARALLEL, |workload| {
                    let snapshot = &snapshot;
                    async move { self.enrol(&workload, snapshot).await }
                })
                .await;
        }
        self.note(|applied| *applied = Applied { generation: snapshot.generation, error });
        if !self.states().values().any(Standing::is_refused) {
            *self.done.lock().unwrap_or_else(PoisonError::into_inner) = Some(snapshot);
        }
    }

    /// Gives every pod plain traffic back.
    pub async fn unenrol_all(&self) {
        for pod in self.proxy.capture.pods() {
            self.proxy.capture.unenroll(&pod.key).await;
        }
        self.proxy.capture.release_kept().await;
        self.states().clear();
        *self.done.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Releases who left on purpose, and keeps who only vanished.
    async fn part(&self, snapshot: &Snapshot) {
        let capture = &self.proxy.capture;
        let mut kept = false;
        for pod in capture.pods() {
            let local = snapshot.workload(&pod.key).and_then(|workload| workload.local.as_ref());
            let found = local.and_then(|local| identity(&local.netns));
            if found == Some(pod.namespace_id()) {
                continue;
            }
            let uid = self.states().get(&pod.key).and_then(|standing| standing.enrolled.as_ref()?.uid());
            if snapshot.departures().includes(Some(&pod.key), uid.as_deref()) {
                info!(pod = %pod.key, "un-enrolling: it was taken out of the mesh");
                capture.unenroll(&pod.key).await;
            } else {
                let reason = match (snapshot.workload(&pod.key), found) {
                    (None, _) => Reason::Absent,
                    (Some(_), None) => Reason::Lost,
                    (Some(_), Some(_)) => Reason::Replaced,
                };
                self.keep(&pod, reason).await;
                kept = true;
            }
            if let Some(standing) = self.states().get_mut(&pod.key) {
                standing.enrolled = None;
            }
        }
        let is_local = |key: &WorkloadKey| snapshot.workload(key).is_some_and(|workload| workload.local.is_some());
        self.states().retain(|key, _| is_local(key));
        capture.release_departed(snapshot.departures()).await;
        if kept {
            self.look_by(LOOK.0);
        }
    }

    /// Nobody answers for the pod any more, so its connections end.
    async fn keep(&self, pod: &Arc<Pod>, reason: Reason) {
        info!(pod = %pod.key, "kept captured and closed: {reason}");
        self.proxy.capture.keep(&pod.key, reason).await;
        let of_pod = |connection: &Connection| connection.what.workload == pod.key && connection.what.pod_id == pod.id;
        let ended = self.proxy.table.close_where(CloseReason::Unenrolled, of_pod);
        if ended > 0 {
            info!(pod = %pod.key, ended, "connections reset: the pod is kept");
        }
    }

    fn next_look(&self) -> Option<(Instant, Duration)> {
        *self.look.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next look takes place by then, and not later if one is planned.
    fn look_by(&self, pause: Duration) {
        if self.next_look().is_none_or(|(at, _)| at > Instant::now() + pause) {
            self.look_after(pause);
        }
    }

    /// Plans the next look, unless there is nobody to look for.
    fn look_after(&self, pause: Duration) {
        let next = (!self.proxy.capture.kept().is_empty()).then(|| (Instant::now() + pause, pause));
        *self.look.lock().unwrap_or_else(PoisonError::into_inner) = next;
    }

    /// Looks whether kept pods are gone: seldom while they stay, at once when something has
    /// changed.
    async fn look(&self) {
        let _turn = self.turn.lock().await;
        if self.retired.load(Relaxed) {
            *self.look.lock().unwrap_or_else(PoisonError::into_inner) = None;
            return;
        }
        let pause = self.next_look().map_or(LOOK.0, |(_, pause)| (pause * 2).min(LOOK.1));
        let snapshot = self.proxy.mesh.load();
        // Some are known only since the snapshot was applied: an earlier agent's.
        self.proxy.capture.release_departed(snapshot.departures()).await;
        let left = self.proxy.capture.release_gone(snapshot.departures().in_sync).await;
        self.look_after(if left.vanishing { LOOK.0 } else { pause });
    }

    async fn enrol(&self, workload: &Arc<Workload>, snapshot: &Snapshot) {
        let Some(local) = &workload.local else { return };
        if self.retired.load(Relaxed) {
            return;
        }
        let namespace = identity(&local.netns);
        let wanted = self.proxy.policies.of(&workload.key).zip(namespace).map(|(policies, namespace)| {
            let excluded = snapshot.settings.exclude.inbound_ports.clone();
            Enrolled { workload: Arc::clone(workload), policies: ByAddress(policies), excluded, namespace }
        });
        let known = self.states().get(&workload.key).is_some_and(|s| s.enrolled.is_some() && s.enrolled == wanted);
        if known {
            return;
        }
        self.enrolments.fetch_add(1, Relaxed);
        let plaintext = self.proxy.policies.plaintext_rules(&workload.key);
        let state = match self.proxy.capture.enroll(workload, Some(plaintext)).await {
            Ok(pod) => {
                self.proxy.attach(&pod);
                self.proxy.end_forbidden_plaintext(&pod).await;
                PodState::Enrolled { pod_id: pod.id }
            }
            Err(e) => PodState::Refused { reason: e.to_string() },
        };
        let status = PodStatus {
            key: workload.key.clone(),
            identity: Some(workload.identity.clone()),
            netns: local.netns.name().to_owned(),
            namespace,
            state: state.clone(),
        };
        let enrolled = wanted.filter(|_| matches!(state, PodState::Enrolled { .. }));
        let before = self.states().insert(workload.key.clone(), Standing { status, enrolled });
        self.changes.send_replace(());
        // Said once per change, not once per retry.
        if before.is_none_or(|before| before.status.state != state) {
            match &state {
                PodState::Enrolled { pod_id } => {
                    info!(pod = %workload.key, identity = %workload.identity, pod_id, "enrolled");
                }
                PodState::Refused { reason } => {
                    warn!(pod = %workload.key, %reason, "not enrolled; will be tried again");
                }
                PodState::Kept { .. } => {}
            }
        }
    }

    fn states(&self) -> std::sync::MutexGuard<'_, BTreeMap<WorkloadKey, Standing>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What tells a namespace from others that have had its name.
fn identity(namespace: &PodNamespace) -> Option<NetnsId> {
    if let Some((_, id)) = namespace.file() {
        return Some(id);
    }
    let meta = std::fs::metadata(namespace.name()).ok()?;
    Some((meta.dev(), meta.ino()))
}
