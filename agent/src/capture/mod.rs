//! Redirects pods' traffic to the agent: loads and pins the BPF programs, writes their maps, enrols pods.
//!
//! The one owner of everything under the pin directory is [`Capture`]. Work that has to happen inside a pod's network
//! namespace runs on worker threads that enter it ([`netns`]); the data path takes ready-made sockets from
//! a pod's [`sockets`] pool, so no connection costs a `setns`.

mod alive;
pub mod cleanup;
mod desired;
mod enroll;
pub mod events;
mod flows;
mod garbage;
mod hierarchy;
pub mod inheritance;
pub mod inspect;
mod interfaces;
mod kept;
mod links;
mod loader;
mod lock;
mod maps;
pub mod netns;
mod node_guard;
pub mod object;
mod pins;
mod pod;
mod probes;
pub mod processes;
pub mod records;
mod registry;
mod room;
pub mod routes;
mod shares;
mod sockdiag;
pub mod sockets;
mod sweep;
mod table;
mod tc;
mod watcher;

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, BorrowedFd},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use tokio::task::JoinHandle;

pub use enroll::EnrollError;
pub use kept::{KeptPod, Left, Reason};
pub use node_guard::{InterfaceGuard, unguarded as unguarded_interfaces};
pub use pod::{Pod, PodListeners};
pub use probes::{ProbeCgroup, ProbeCgroupState};
pub use shares::Share;
pub use sweep::{Cause, Judge, Unswept};

use self::{
    enroll::Enrolled,
    enroll::Wanted,
    inheritance::{Inheritance, Listening},
    netns::Netns,
    node_guard::NodeGuard,
    probes::{Probes, Recorder},
    registry::{Entry, Registry},
    sweep::{Sweep, Sweeps},
    watcher::Attacher,
};
use crate::{
    mesh::{Departures, Snapshot, Workload, WorkloadKey},
    policy::PlaintextRules,
};

/// Where and how to capture.
#[derive(Debug, Clone)]
pub struct CaptureOptions {
    /// cgroup v2 directory that the connect hooks attach to; pods' cgroups lie below it.
    pub cgroup: PathBuf,
    /// Directory on bpffs under which a versioned directory is made; created when missing.
    pub pin_root: PathBuf,
    /// How tc programs attach.
    pub tc: TcMode,
    /// Most entries of `MESH`: addresses of the mesh, and captured networks.
    pub mesh_entries: usize,
    /// Load the object with aya-log and forward its lines to `tracing`.
    pub bpf_log: bool,
    /// Listeners that an agent which is still here has handed over.
    pub inheritance: Inheritance,
}

/// How tc programs attach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum TcMode {
    /// tcx where the kernel has it (6.6), else clsact.
    #[default]
    Auto,
    /// tcx links.
    Tcx,
    /// clsact qdisc and filters.
    Clsact,
}

/// Why capture cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// A BPF object, map, program or link.
    #[error("{action}: {reason}")]
    Bpf {
        /// What was tried, on what.
        action: String,
        /// What the kernel or loader said, and what to do where that is known.
        reason: String,
    },
    /// The file system: cgroup, bpffs, namespaces.
    #[error("{action} {path}: {source}")]
    Path {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A map is too small for what it has to hold; nothing was written.
    #[error("{map} has room for {capacity} entries and the configuration needs {needed}")]
    Capacity {
        /// Name of the map.
        map: &'static str,
        /// Its size.
        capacity: usize,
        /// What would be needed.
        needed: usize,
    },
}

/// The running capture. Dropping it leaves everything in place: pods stay captured, and their connections are refused
/// until an agent is back.
pub struct Capture {
    inner: Arc<Inner>,
    /// Readers of what the programs report and count.
    readers: Vec<JoinHandle<()>>,
}

/// Flags a socket as the agent's own.
type Marker = Arc<dyn Fn(BorrowedFd<'_>) -> io::Result<()> + Send + Sync>;

struct Inner {
    options: CaptureOptions,
    method: tc::Method,
    objects: Arc<loader::Objects>,
    maps: Arc<maps::Maps>,
    node_guard: Arc<NodeGuard>,
    probes: Arc<Probes>,
    registry: Mutex<Registry>,
    census: processes::Census,
    sweeps: Arc<Sweeps>,
    /// Pods that vanished and are still captured, by the cookie of their namespace.
    kept: Mutex<BTreeMap<u64, kept::Held>>,
    /// Enrolments, each behind a lock that serialises what happens to its workload.
    slots: Mutex<HashMap<WorkloadKey, Slot>>,
    /// Failures to attach to interfaces that came later.
    bare_interfaces: Arc<AtomicU64>,
    /// None when another agent has taken over.
    lock: Mutex<Option<lock::PinLock>>,
}

type Slot = Arc<tokio::sync::Mutex<Option<Enrolled>>>;

impl Capture {
    /// Loads, pins and attaches; adopts or atomically replaces what an earlier agent left. There is no moment without
    /// capture.
    pub async fn start(options: CaptureOptions) -> Result<Arc<Self>, CaptureError> {
        let method = tc::Method::choose(options.tc)?;
        let (options, started) = blocking(move || {
            let started = loader::start(&options);
            (options, started)
        })
        .await;
        let loader::Started { lock, objects, maps, probe, events, log } = started?;
        let ids = objects.layout().tc_pins()?.into_iter().map(|(pin, _)| pin.pod_id).collect::<Vec<_>>();
        let registry = Registry::new(ids.into_iter().chain(maps.tables().pod_ids()));
        let mut readers = vec![tokio::spawn(events::log_events(events))];
        readers.extend(log.map(|log| tokio::spawn(events::forward_log(log))));
        let maps = Arc::new(maps);
        readers.push(tokio::spawn(flows::keep_counts(Arc::clone(&maps))));
        let inner = Inner {
            method,
            node_guard: NodeGuard::new(method, Arc::clone(&objects), Arc::clone(&maps)),
            probes: Probes::new(options.cgroup.clone(), Arc::clone(&maps), Recorder::new(probe, objects.layout())),
            objects,
            maps,
            options,
            registry: Mutex::new(registry),
            census: processes::Census::default(),
            sweeps: Sweeps::new(),
            kept: Mutex::default(),
            slots: Mutex::default(),
            bare_interfaces: Arc::default(),
            lock: Mutex::new(Some(lock)),
        };
        Ok(Arc::new(Self { inner: Arc::new(inner), readers }))
    }

    /// Projects mesh addresses, VIPs, CIDRs, mesh-wide exclusions and who sends probes into the maps (differences only;
    /// additions before removals). What does not fit is enforced more strictly than it is written ([`Self::problems`]); so is
    /// what cannot be written, which is an error besides. Must be called within a Tokio runtime: ending plaintext connections
    /// that are not allowed any more goes on in the background.
    pub fn apply(&self, snapshot: &Snapshot) -> Result<(), CaptureError> {
        let written = self.inner.apply(snapshot);
        for (key, netns) in written.tighter {
            self.inner.sweeps.start(enroll::strict_sweep(&self.inner, &key, &netns));
        }
        written.result.and(self.inner.probes.set(&snapshot.settings.probes.cgroups))
    }

    /// What is enforced more strictly than it is written because it does not fit into the maps, and what to do.
    pub fn problems(&self) -> Vec<String> {
        let registry = self.inner.registry();
        let pods = registry.entries.iter().filter(|(_, entry)| !entry.overflow.is_none());
        let of_pods = pods.map(|(key, entry)| format!("{key}: {}", entry.overflow.of_pod()));
        registry.problems.iter().cloned().chain(of_pods).collect()
    }

    /// How much of the maps that pods share the fullest pods have.
    pub fn shares(&self) -> Vec<Share> {
        shares::of(&self.inner.maps)
    }

    /// Enrols a pod, with what modes and policies make of plaintext for it (without policies: `None`): listeners and routes first, then capture, guard and inbound program on every interface last. Fails
    /// whole. For an already enrolled pod, applies what changed (mode, port rules, exclusions); switching to STRICT
    /// destroys plaintext connections already admitted. Runs to its end even when the caller stops waiting.
    pub async fn enroll(
        &self,
        workload: &Workload,
        plaintext: Option<PlaintextRules>,
    ) -> Result<Arc<Pod>, EnrollError> {
        run(enroll::enroll(Arc::clone(&self.inner), Wanted { workload: workload.clone(), plaintext })).await
    }

    /// Ends the plaintext connections of a pod that `judge` says its policies forbid. Both ends see
    /// a reset. A failure is tried again in the background until it succeeds, see
    /// [`unswept`](Self::unswept). Nothing happens to a pod that is not enrolled.
    pub async fn end_plaintext(&self, pod: &Pod, judge: Judge) {
        let netns = self.inner.registry().entries.get(&pod.key).map(|e| Arc::clone(&e.netns));
        let Some(netns) = netns else { return };
        let (sweeps, sweep) =
            (Arc::clone(&self.inner.sweeps), Sweep { key: pod.key.clone(), netns, cause: Cause::Policy, judge });
        run(async move { sweeps.run(sweep).await }).await;
    }

    /// Pods with plaintext connections that are forbidden and could not be ended yet.
    pub fn unswept(&self) -> Vec<Unswept> {
        self.inner.sweeps.unswept()
    }

    /// Gives the pod plain traffic back: capture off first, guard and inbound program last. Live connections go on; the
    /// reply route stays until the returned pod is dropped by its last connection.
    pub async fn unenroll(&self, key: &WorkloadKey) {
        run(enroll::unenroll(Arc::clone(&self.inner), key.clone())).await;
    }

    /// Keeps an enrolled pod that has vanished, without anybody having said that it leaves: it
    /// stays captured and guarded, takes plaintext on no port, and its connections are refused,
    /// until it is enrolled again, released on purpose, or gone.
    pub async fn keep(&self, key: &WorkloadKey, reason: Reason) {
        let (inner, key) = (Arc::clone(&self.inner), key.clone());
        run(async move {
            let slot = inner.slot(&key);
            let enrolled = slot.lock().await.take();
            if let Some(enrolled) = enrolled {
                kept::keep(&inner, enrolled, reason).await;
            }
            drop(slot);
            inner.prune_slots();
        })
        .await;
    }

    /// The pods that are kept.
    pub fn kept(&self) -> Vec<KeptPod> {
        kept::list(&self.inner)
    }

    /// Releases kept pods that were taken out of the mesh on purpose.
    pub async fn release_departed(&self, departures: &Departures) {
        let (inner, departures) = (Arc::clone(&self.inner), departures.clone());
        run(async move { kept::release_departed(&inner, &departures).await }).await;
    }

    /// Looks for kept pods that are gone, and releases them. One look, at all processes, for all
    /// pods; `in_sync` says that the source has said everything, before which pods of an earlier
    /// agent stay.
    pub async fn release_gone(&self, in_sync: bool) -> Left {
        let inner = Arc::clone(&self.inner);
        run(async move { kept::release_gone(&inner, in_sync).await }).await
    }

    /// Releases every kept pod: the agent gives the node back.
    pub async fn release_kept(&self) {
        let inner = Arc::clone(&self.inner);
        run(async move { kept::release_all(&inner).await }).await;
    }

    /// Before [`cleanup::cleanup`] at a planned end: the lock file goes too, also when the last connection's task still holds this.
    pub fn leave_nothing(&self) {
        if let Some(lock) = &*self.inner.lock() {
            lock.remove_with_drop();
        }
    }

    /// Takes out the reply routes that ended connections of un-enrolled pods still hold, after which nothing of this process is left in
    /// any pod. For its end.
    pub async fn remove_reply_routes(&self) {
        run(routes::remove_all()).await;
    }

    /// Gives everything but the live connections up to another agent, which is about to start: maps, pins, interfaces. The listeners
    /// go on here, too, until [`Self::stop_accepting`]. Nothing may be applied or enrolled any more.
    pub async fn retire(&self) -> io::Result<Vec<Listening>> {
        self.inner.sweeps.stop();
        // What this process does to the pods' namespaces from now on would be done to the other agent's.
        routes::leave_all();
        for reader in &self.readers {
            reader.abort();
        }
        let slots: Vec<Slot> =
            self.inner.slots.lock().unwrap_or_else(PoisonError::into_inner).values().map(Arc::clone).collect();
        for slot in slots {
            if let Some(enrolled) = &mut *slot.lock().await {
                enrolled.stop_watching().await;
            }
        }
        kept::stop_watching(&self.inner).await;
        let listening = self.pods().iter().map(|pod| pod.listening()).collect();
        drop(self.inner.lock().take());
        listening
    }

    /// Ends all accept loops: another agent accepts. Connections go on.
    pub fn stop_accepting(&self) {
        let kept = self.inner.kept().values().filter_map(kept::Held::pod).collect::<Vec<_>>();
        for pod in self.pods().into_iter().chain(kept) {
            pod.signal_unenrolled();
        }
    }

    /// The pods enrolled now.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.inner.registry().entries.values().map(|e| Arc::clone(&e.pod)).collect()
    }

    /// How the interfaces of a pod are guarded from the node's side, by the pod's number.
    pub fn interfaces(&self, pod_id: u32) -> Vec<InterfaceGuard> {
        self.inner.node_guard.interfaces(pod_id)
    }

    /// The configured probe cgroups, and how they stand.
    pub fn probe_cgroups(&self) -> Vec<ProbeCgroup> {
        self.inner.probes.cgroups()
    }

    /// The addresses from which declared probe ports take plaintext; none unless the configuration
    /// asks for it.
    pub fn probe_node_addresses(&self) -> Vec<IpAddr> {
        self.inner.maps.tables().node_addresses().map(|a| Ipv6Addr::from(*a).to_canonical()).collect()
    }

    /// Takes over what earlier agents left: pods that are not enrolled now are kept, pins of older
    /// versions and of interfaces that are gone are removed. Called once after the first
    /// configuration was applied.
    pub async fn collect_garbage(&self) {
        let inner = Arc::clone(&self.inner);
        run(async move {
            garbage::collect(&inner).await;
            inner.prepare();
        })
        .await;
    }

    /// Consumes the original destination of a connection accepted on an outbound listener.
    pub fn take_original_destination(&self, pod: &Pod, client: SocketAddr, listener: SocketAddr) -> Option<SocketAddr> {
        self.inner.maps.flows.consume(pod.netns_cookie, client, listener).unwrap_or_else(|e| {
            tracing::error!(pod = %pod.key, %client, error = %e, "cannot read map FLOWS");
            None
        })
    }

    /// Flags a socket as the agent's own, so that it is neither captured nor guarded.
    pub fn mark_own(&self, socket: &impl AsFd) -> std::io::Result<()> {
        self.inner.maps.mark_own(socket)
    }

    /// How full the maps are that the agent writes: name, entries, room.
    pub fn map_sizes(&self) -> Vec<(&'static str, usize, usize)> {
        self.inner.maps.tables().sizes()
    }

    /// The BPF counters by name, and `bare_interfaces`: failures to attach to interfaces of enrolled pods.
    pub fn counters(&self) -> BTreeMap<String, u64> {
        let mut counters = self.inner.maps.counters().unwrap_or_else(|e| {
            tracing::error!(error = %e, "no BPF counters");
            BTreeMap::new()
        });
        counters.insert("bare_interfaces".to_owned(), self.inner.bare_interfaces.load(Relaxed));
        counters
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        for reader in &self.readers {
            reader.abort();
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Option<lock::PinLock>> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Never held across an await, and taken before [`maps::Maps::tables`].
    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<u64, kept::Held>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, key: &WorkloadKey) -> Slot {
        Arc::clone(self.slots.lock().unwrap_or_else(PoisonError::into_inner).entry(key.clone()).or_default())
    }

    /// Loads programs for the pods that come next.
    fn prepare(&self) {
        let (objects, numbers) = (Arc::clone(&self.objects), self.registry().next_ids(loader::SPARES));
        // Without the rest of it: this must not keep the lock of an agent that has ended.
        tokio::task::spawn_blocking(move || objects.prepare(&numbers));
    }

    /// Drops the slots of workloads that are neither enrolled nor being worked on.
    fn prune_slots(&self) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.retain(|_, slot| Arc::strong_count(slot) > 1 || slot.try_lock().is_ok_and(|s| s.is_some()));
    }

    fn marker(&self) -> Marker {
        let maps = Arc::clone(&self.maps);
        Arc::new(move |socket| maps.mark_own(socket))
    }

    fn attacher(&self, netns: &Arc<Netns>, pod_id: u32) -> Attacher {
        Attacher {
            objects: Arc::clone(&self.objects),
            netns: Arc::clone(netns),
            method: self.method,
            pod_id,
            node_guard: Arc::clone(&self.node_guard),
            failures: Arc::clone(&self.bare_interfaces),
        }
    }

    /// Writes the mesh-wide part, and what it changes for every pod. What cannot be written of the
    /// mesh's addresses is captured all the same, with all that pods send.
    fn apply(&self, snapshot: &Snapshot) -> Written {
        let mut registry = self.registry();
        let mut tables = self.maps.tables();
        // Unknown until all is written.
        let before = registry.applied.take();
        let changes = before.and_then(|before| desired::mesh_changes(&before, snapshot));
        if changes.is_some_and(|changes| tables.change_mesh(&changes).is_ok()) {
            registry.applied = Some(snapshot.clone());
            // Addresses alone change nothing of what a pod refuses.
            return Written { tighter: Vec::new(), result: write_pods(&mut tables, &mut registry, false) };
        }
        let state = desired::mesh(snapshot);
        // First: no rule for everybody may open a port of a kept pod.
        let closed = kept::close_for(&self.kept(), &mut tables, &state.rules);
        let config = |tables: &maps::Tables, e: &Entry| tables.pods().get(&e.pod.netns_cookie).copied();
        let before: Vec<_> = registry
            .entries
            .values()
            .filter_map(|e| {
                let pod = (e.pod.key.clone(), Arc::clone(&e.netns));
                Some((pod, tables.strictness(&config(&tables, e)?)))
            })
            .collect();
        let result = write_mesh(&mut tables, &mut registry, &state);
        if result.is_ok() && registry.everywhere == state.everywhere {
            registry.applied = Some(snapshot.clone());
        }
        let after = registry.entries.values().filter_map(|e| Some(tables.strictness(&config(&tables, e)?)));
        let tighter = before
            .into_iter()
            .zip(after)
            .filter(|((_, before), after)| after.tightens(before))
            .map(|((pod, _), _)| pod)
            .collect();
        Written { tighter, result: closed.and(result) }
    }

    /// Turns capture on for a pod, or applies a change to it. Returns whether it refuses more than
    /// before.
    fn capture(&self, mut entry: Entry) -> Result<bool, CaptureError> {
        let mut registry = self.registry();
        let mut tables = self.maps.tables();
        let before = tables.pod(entry.pod.id).copied().map(|config| tables.strictness(&config));
        let config = write_pod(&mut tables, &mut entry, registry.everywhere)?;
        let after = tables.strictness(&config);
        registry.entries.insert(entry.workload.key.clone(), entry);
        Ok(before.is_some_and(|before| after.tightens(&before)))
    }
}

/// What became of a snapshot.
struct Written {
    /// Pods in which more is refused than before.
    tighter: Vec<(WorkloadKey, Arc<Netns>)>,
    /// What could not be written.
    result: Result<(), CaptureError>,
}

/// Writes the mesh-wide part. Every step is tried, whatever became of those before, in an order that leaves nothing open: as
/// long as an address of the mesh may be missing in `MESH`, all that pods send is captured.
fn write_mesh(
    tables: &mut maps::Tables,
    registry: &mut Registry,
    state: &desired::MeshState,
) -> Result<(), CaptureError> {
    let mut problems = Vec::new();
    let mesh = match tables.apply_mesh(state) {
        Err(CaptureError::Capacity { capacity, needed, .. }) => {
            problems.push(format!(
                "{needed} addresses and networks of the mesh are more than fit (room for {capacity}): every connection of \
                 this node's pods goes through the agent until they fit; raise --mesh-entries, or give the node more memory"
            ));
            Some(Ok(()))
        }
        Err(e) => Some(Err(e)),
        Ok(()) => None,
    };
    let capture_all = state.everywhere.capture_all || mesh.is_some();
    let everywhere = desired::Everywhere { capture_all, ..state.everywhere };
    let captured = if mesh.is_some() { tables.capture_everything() } else { Ok(()) };
    let rules = tables.apply_mesh_rules(state).map(|overflow| {
        problems.extend((!overflow.is_none()).then(|| overflow.of_mesh().to_string()));
    });
    let addresses = tables.apply_node_addresses(state).map(|overflow| {
        problems.extend(overflow.map(|(needed, kept)| {
            format!("{needed} addresses of the node are more than fit: probes from {kept} of them are known by their address")
        }));
    });
    let all = std::mem::replace(&mut registry.everywhere, everywhere) != everywhere;
    let pods = write_pods(tables, registry, all);
    for problem in problems.iter().filter(|problem| !registry.problems.contains(problem)) {
        tracing::error!("{problem}");
    }
    registry.problems = problems;
    mesh.unwrap_or(Ok(())).and(captured).and(rules).and(addresses).and(pods)
}

/// Writes enrolled pods again: all, or those that have not fitted before and may now.
fn write_pods(tables: &mut maps::Tables, registry: &mut Registry, all: bool) -> Result<(), CaptureError> {
    let everywhere = registry.everywhere;
    let wanted = registry.entries.values_mut().filter(|entry| all || !entry.overflow.is_none());
    let mut result = Ok(());
    for entry in wanted {
        // One that fails does not keep the others from being written.
        result = result.and(write_pod(tables, entry, everywhere).map(drop));
    }
    result
}

/// Writes everything about an entry to the maps; returns its configuration.
fn write_pod(
    tables: &mut maps::Tables,
    entry: &mut Entry,
    everywhere: desired::Everywhere,
) -> Result<underpass_abi::PodConfig, CaptureError> {
    let Some(local) = &entry.workload.local else {
        unreachable!("only local workloads become entries");
    };
    let state = desired::pod(entry.pod.id, &entry.workload, local, entry.plaintext.as_ref(), everywhere);
    let (config, overflow) = tables.apply_pod(state)?;
    if overflow != entry.overflow && !overflow.is_none() {
        tracing::warn!(workload = %entry.workload.key, "{}", overflow.of_pod());
    }
    entry.overflow = overflow;
    tables.capture(entry.pod.netns_cookie, config)?;
    Ok(config)
}

/// Runs to the end in a task of its own, whether or not the caller goes on waiting.
async fn run<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    joined(tokio::spawn(work).await)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    joined(tokio::task::spawn_blocking(work).await)
}

fn joined<T>(result: Result<T, tokio::task::JoinError>) -> T {
    match result {
        Ok(value) => value,
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(e) => unreachable!("nobody aborts this task: {e}"),
        },
    }
}

#[cfg(test)]
mod tests;
