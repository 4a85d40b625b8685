//! Enrolling a pod, and the reasons not to.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::{sync::oneshot, task::JoinHandle};
use underpass_abi::PodConfig;

use super::{
    CaptureError, Inner, Marker, desired,
    interfaces::{self, Interface},
    kept::{self, Reason},
    netns::Netns,
    pod::{NewPod, Pod, PodListeners},
    processes,
    records::{self, Record},
    registry::Entry,
    room::Overflow,
    routes, sockets,
    sweep::{Cause, Judge, Sweep},
    tc::{self, Programs},
    watcher,
};
use crate::{
    mesh::{LocalPod, Workload, WorkloadKey},
    policy::PlaintextRules,
};

/// How often and how long to wait for the ports of a pod that is enrolled anew, until its old listeners are closed.
const REBIND: (u32, Duration) = (40, Duration::from_millis(50));

/// How often to begin again when interfaces change while programs are attached to them.
const ATTEMPTS: u32 = 5;

/// Why a pod is not enrolled; nothing of it is left behind, except that a pod which an earlier agent captured stays
/// captured, so that its connections are refused and not sent in plaintext.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// The namespace cannot be opened or is the host's own.
    #[error("network namespace {path}: {reason}")]
    Namespace {
        /// Its path.
        path: PathBuf,
        /// Why not, and what to do.
        reason: String,
    },
    /// Processes of the pod would escape the connect hooks.
    #[error(
        "process {pid} ({command}) of the pod is in cgroup {cgroup}, not below the attach point {attach}; move it, or attach higher with --cgroup"
    )]
    OutsideCgroup {
        /// One of the processes.
        pid: i32,
        /// Its name.
        command: String,
        /// Its cgroup v2 path.
        cgroup: String,
        /// Where the hooks are.
        attach: PathBuf,
    },
    /// An application holds a port the agent needs.
    #[error("port {port} in the pod is already in use by {holder}; the agent needs it")]
    PortTaken {
        /// The port.
        port: u16,
        /// Who, as far as it can be told.
        holder: String,
    },
    /// Two workloads, one namespace.
    #[error("namespace {path} is already enrolled as {other}")]
    Duplicate {
        /// The path.
        path: PathBuf,
        /// The other workload.
        other: String,
    },
    /// Routes, rules or sysctls inside the pod.
    #[error("{action} in the pod's namespace: {reason}")]
    Setup {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        reason: String,
    },
    /// Programs or maps.
    #[error(transparent)]
    Capture(#[from] CaptureError),
}

/// An enrolled pod, as its slot holds it.
pub struct Enrolled {
    /// The pod.
    pub pod: Arc<Pod>,
    /// Its namespace.
    pub netns: Arc<Netns>,
    /// Ends when the other is dropped. None when another agent watches.
    pub watcher: Option<(JoinHandle<()>, oneshot::Sender<()>)>,
}

impl Enrolled {
    /// Leaves the interfaces to another agent.
    pub async fn stop_watching(&mut self) {
        let Some((watcher, stop)) = self.watcher.take() else { return };
        drop(stop);
        if let Err(e) = watcher.await {
            tracing::error!(workload = %self.pod.key, error = %e, "interface watcher failed");
        }
    }
}

/// What an enrolment is to bring about.
#[derive(Clone)]
pub struct Wanted {
    /// The workload, of this node.
    pub workload: Workload,
    /// What modes and policies make of plaintext for it.
    pub plaintext: Option<PlaintextRules>,
}

/// What is known of a pod while it is being enrolled.
struct Candidate<'a> {
    workload: &'a Workload,
    plaintext: Option<&'a PlaintextRules>,
    local: &'a LocalPod,
    netns: Arc<Netns>,
    id: u32,
    /// Its entry of an earlier agent.
    adopted: Option<PodConfig>,
    /// Our own old listeners may still be closing.
    rebind: bool,
}

/// See [`super::Capture::enroll`].
pub async fn enroll(inner: Arc<Inner>, wanted: Wanted) -> Result<Arc<Pod>, EnrollError> {
    let result = enroll_in_slot(&inner, &wanted).await;
    inner.prune_slots();
    result
}

async fn enroll_in_slot(inner: &Arc<Inner>, wanted: &Wanted) -> Result<Arc<Pod>, EnrollError> {
    let Wanted { workload, plaintext } = wanted;
    let slot = inner.slot(&workload.key);
    let mut slot = slot.lock().await;
    let Some(local) = &workload.local else {
        return Err(EnrollError::Namespace {
            path: PathBuf::new(),
            reason: format!(
                "{} runs on node {}, not here; only local workloads can be enrolled",
                workload.key, workload.node
            ),
        });
    };
    let netns = Netns::of(&local.netns)?;
    let mut rebind = false;
    if let Some(enrolled) = &*slot {
        let same_namespace = enrolled.pod.netns_cookie == netns.cookie();
        if same_namespace && enrolled.pod.identity == workload.identity {
            update(inner, enrolled, wanted).await?;
            return Ok(Arc::clone(&enrolled.pod));
        }
        // Another identity needs another `Pod`; the namespace stays captured meanwhile. Another namespace is another
        // pod, and nobody has said that the one before has left.
        let enrolled = slot.take().expect("checked above");
        rebind = same_namespace;
        if same_namespace {
            release(inner, &workload.key, enrolled, true).await;
        } else {
            kept::keep(inner, enrolled, Reason::Replaced).await;
        }
    }
    if let Some(held) = kept::take(inner, netns.cookie()) {
        match held.returned(workload) {
            Ok(enrolled) => return readmit(inner, &mut slot, enrolled, wanted).await,
            Err(held) => {
                rebind = true;
                held.let_go().await;
            }
        }
    }

    let (id, adopted) = {
        let mut registry = inner.registry();
        let adopted = inner.maps.tables().pods().get(&netns.cookie()).copied();
        (registry.claim(&workload.key, &netns, adopted.as_ref())?, adopted)
    };
    let candidate = Candidate { workload, plaintext: plaintext.as_ref(), local, netns, id, adopted, rebind };
    match enroll_new(inner, &candidate).await {
        Ok(enrolled) => {
            let pod = Arc::clone(&enrolled.pod);
            *slot = Some(enrolled);
            // The next pod needs programs, too.
            inner.prepare();
            Ok(pod)
        }
        Err(e) => {
            undo(inner, &candidate).await;
            Err(e)
        }
    }
}

/// In this order: who listens, what brings replies back; then capture, and what guards last. A program of a running pod may be
/// connecting at any moment: were the guard there before capture, it would drop that connection's SYN, and every one that is sent again.
async fn enroll_new(inner: &Arc<Inner>, candidate: &Candidate<'_>) -> Result<Enrolled, EnrollError> {
    let &Candidate { workload, plaintext, local, ref netns, id, adopted, .. } = candidate;
    processes::check_below(&inner.census, netns, &inner.options.cgroup).await?;
    let mark = inner.marker();
    let listeners = match inner.options.inheritance.take(netns.cookie()) {
        Some(inherited) => sockets::inherit(inherited, &mark)?,
        None => listen(candidate, &mark).await?,
    };
    routes::install(netns).await?;
    // From here on the route goes with the pod.
    let pod = Pod::new(NewPod {
        id,
        key: workload.key.clone(),
        identity: workload.identity.clone(),
        netns: Arc::clone(netns),
        listeners,
        mark,
    });

    let state = desired::pod(id, workload, local, plaintext, inner.registry().everywhere);
    let after = {
        let mut tables = inner.maps.tables();
        let (config, _) = tables.apply_pod(state)?;
        tables.strictness(&config)
    };
    let mut watch = interfaces::watch(netns)
        .await
        .map_err(|e| EnrollError::Setup { action: "watch interfaces", reason: e.to_string() })?;
    records::write(inner.objects.layout(), netns.cookie(), &Record::new(workload, local));
    inner.capture(Entry {
        pod: Arc::clone(&pod),
        netns: Arc::clone(netns),
        workload: workload.clone(),
        plaintext: plaintext.cloned(),
        overflow: Overflow::default(),
    })?;
    let present = watcher::present(&mut watch);
    let programs = attach(inner, netns, id, present).await?;
    // Whatever an earlier agent, or nobody, has let in: an agent that failed to end such
    // connections cannot have said so.
    if after.refuses_any() {
        let sweep = strict_sweep(inner, &workload.key, netns);
        if adopted.is_some() { inner.sweeps.run(sweep).await } else { inner.sweeps.start(sweep) }
    }
    let (stop, stopped) = oneshot::channel();
    let watcher = tokio::spawn(watcher::run(inner.attacher(netns, id), programs, watch, stopped));
    Ok(Enrolled { pod, netns: Arc::clone(netns), watcher: Some((watcher, stop)) })
}

/// Attaches to the interfaces of a pod. One that goes away meanwhile does not fail the others.
pub async fn attach(
    inner: &Inner,
    netns: &Netns,
    id: u32,
    mut present: Vec<Interface>,
) -> Result<Programs, EnrollError> {
    let mut programs = Programs::default();
    for attempt in 1..=ATTEMPTS {
        let mut result = tc::attach(&inner.objects, netns, inner.method, id, present.clone(), &mut programs).await;
        if result.is_ok() {
            result = inner.node_guard.attach(netns, id, present.clone()).await;
        }
        let Err(e) = result else { return Ok(programs) };
        let mut now = interfaces::list(netns)
            .await
            .map_err(|e| EnrollError::Setup { action: "list interfaces", reason: e.to_string() })?;
        now.sort_by_key(|i| i.index);
        // A program that an interface still has by a link that was given up was dropped: the next
        // attempt is with another one.
        if now == present && (attempt == ATTEMPTS || programs.cover(&present)) {
            return Err(e.into());
        }
        present = now;
    }
    Err(EnrollError::Setup {
        action: "attach to the interfaces",
        reason: format!("they changed {ATTEMPTS} times meanwhile; try again"),
    })
}

/// Opens the listeners. When the pod was enrolled until now, its accept loops may need a moment to close the old ones.
async fn listen(candidate: &Candidate<'_>, mark: &Marker) -> Result<PodListeners, EnrollError> {
    let mut attempts = if candidate.rebind { REBIND.0 } else { 0 };
    loop {
        match sockets::listen(&candidate.netns, mark).await {
            Err(EnrollError::PortTaken { .. }) if attempts > 0 => attempts -= 1,
            result => return result,
        }
        // Nothing announces that a listener is closed.
        tokio::time::sleep(REBIND.1).await;
    }
}

/// Applies what changed to an enrolled pod.
async fn update(inner: &Arc<Inner>, enrolled: &Enrolled, wanted: &Wanted) -> Result<(), EnrollError> {
    let Enrolled { pod, netns, .. } = enrolled;
    let Wanted { workload, plaintext } = wanted.clone();
    let overflow = Overflow::default();
    let entry = Entry { pod: Arc::clone(pod), netns: Arc::clone(netns), workload, plaintext, overflow };
    let key = entry.workload.key.clone();
    if inner.capture(entry)? {
        inner.sweeps.run(strict_sweep(inner, &key, netns)).await;
    }
    Ok(())
}

/// Ends a pod's plaintext connections on ports that refuse plaintext, by what the maps say when it
/// is done.
pub fn strict_sweep(inner: &Arc<Inner>, key: &WorkloadKey, netns: &Arc<Netns>) -> Sweep {
    let (maps, cookie) = (Arc::clone(&inner.maps), netns.cookie());
    let judge: Judge = Arc::new(move || {
        let tables = maps.tables();
        let config = *tables.pods().get(&cookie)?;
        let strict = tables.strictness(&config);
        Some(Box::new(move |local, _| strict.refuses(local.port())))
    });
    Sweep { key: key.clone(), netns: Arc::clone(netns), cause: Cause::Mode, judge }
}

/// See [`super::Capture::unenroll`].
pub async fn unenroll(inner: Arc<Inner>, key: WorkloadKey) {
    unenroll_slot(&inner, &key).await;
    inner.prune_slots();
}

async fn unenroll_slot(inner: &Inner, key: &WorkloadKey) {
    let slot = inner.slot(key);
    let mut slot = slot.lock().await;
    if let Some(enrolled) = slot.take() {
        release(inner, key, enrolled, false).await;
    }
    kept::release_refused(inner, key).await;
}

/// Ends an enrolment: capture off first, guard and inbound program last. With `stay_captured` only the agent's side
/// ends, and connections are refused until the namespace is enrolled again.
async fn release(inner: &Inner, key: &WorkloadKey, mut enrolled: Enrolled, stay_captured: bool) {
    let (pod, netns) = (Arc::clone(&enrolled.pod), Arc::clone(&enrolled.netns));
    let failed = |what, e: &CaptureError| tracing::error!(workload = %key, error = %e, "{what}");
    inner.registry().entries.remove(key);
    if !stay_captured {
        inner.sweeps.forget(netns.cookie());
        if let Err(e) = inner.maps.tables().release(netns.cookie()) {
            failed("cannot turn capture off", &e);
        }
    }
    pod.signal_unenrolled();
    enrolled.stop_watching().await;
    if !stay_captured {
        match detach(inner, Some(&netns), pod.id).await {
            Ok(()) => inner.registry().free(pod.id),
            // The number stays taken, so that no other pod meets these programs.
            Err(e) => failed("cannot remove the pod's tc programs or rules", &e),
        }
    }
    if !stay_captured {
        records::remove(inner.objects.layout(), netns.cookie());
    }
    inner.registry().unclaim(netns.cookie());
}

/// Removes a pod's programs, then what they read. Without a namespace nothing leads there any more:
/// only what is pinned, or on the node's side, is left.
pub async fn detach(inner: &Inner, netns: Option<&Netns>, id: u32) -> Result<(), CaptureError> {
    tc::unpin(&inner.objects, id)?;
    if let (tc::Method::Clsact, Some(netns)) = (inner.method, netns) {
        tc::detach_filters(netns).await?;
    }
    inner.node_guard.release(id).await?;
    forget(inner, id).await
}

/// Forgets a pod whose programs are gone: its rules, and the connections that nobody has accepted.
pub async fn forget(inner: &Inner, id: u32) -> Result<(), CaptureError> {
    inner.maps.tables().forget(id)?;
    let maps = Arc::clone(&inner.maps);
    super::blocking(move || maps.flows.forget_pod(id)).await
}

/// Takes back what a failed enrolment did.
async fn undo(inner: &Arc<Inner>, candidate: &Candidate<'_>) {
    let &Candidate { workload, ref netns, id, adopted, .. } = candidate;
    let key = &workload.key;
    if adopted.is_some() {
        tracing::warn!(workload = %key, "stays captured, its connections are refused, until it is enrolled or removed");
        {
            let mut registry = inner.registry();
            registry.entries.remove(key);
            registry.unclaim(netns.cookie());
        }
        let record = Record::new(workload, candidate.local);
        let kept = kept::adopt(inner, record, id, netns.cookie(), Some(Arc::clone(netns)), Reason::Refused).await;
        if let Err(error) = kept {
            tracing::error!(workload = %key, %error, "interfaces of a pod that stays captured are not watched");
        }
        return;
    }
    let captured = inner.maps.tables().release(netns.cookie());
    let detached = detach(inner, Some(netns), id).await;
    let mut registry = inner.registry();
    registry.entries.remove(key);
    match captured.and(detached) {
        Ok(()) => registry.free(id),
        Err(e) => {
            tracing::error!(workload = %key, error = %e, "cannot undo a failed enrolment; its number stays taken");
        }
    }
    registry.unclaim(netns.cookie());
    drop(registry);
    records::remove(inner.objects.layout(), netns.cookie());
}

/// Takes a pod that was kept back as it was. It listens all the time, and has never been open.
async fn readmit(
    inner: &Arc<Inner>,
    slot: &mut Option<Enrolled>,
    enrolled: Enrolled,
    wanted: &Wanted,
) -> Result<Arc<Pod>, EnrollError> {
    let pod = Arc::clone(&enrolled.pod);
    let adopted = inner.maps.tables().pods().get(&pod.netns_cookie).copied();
    inner.registry().claim(&pod.key, &enrolled.netns, adopted.as_ref())?;
    if let Some(local) = &wanted.workload.local {
        records::write(inner.objects.layout(), pod.netns_cookie, &Record::new(&wanted.workload, local));
    }
    // Its own again before anything can fail: what fails is tried again, and meanwhile the pod
    // refuses.
    let enrolled = slot.insert(enrolled);
    update(inner, enrolled, wanted).await?;
    pod.keep(None);
    Ok(pod)
}
