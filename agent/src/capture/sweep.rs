//! Ending plaintext connections that were admitted before and are forbidden now.
//!
//! Every caller comes through here. What fails is remembered and tried again until it succeeds, and
//! shows as long as it is outstanding. An agent that ends meanwhile needs no record of it: its
//! successor sweeps every pod that it adopts.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::task::AbortHandle;

use super::{netns::Netns, sockdiag};
use crate::mesh::WorkloadKey;

/// Pause before the second attempt; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause. An attempt reads all sockets of the pod, which takes milliseconds for thousands
/// of them.
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// Is a connection between this address of the pod and that one outside forbidden?
pub type Forbidden = Box<dyn Fn(SocketAddr, SocketAddr) -> bool + Send>;

/// Says what is forbidden at the moment; `None` when nobody judges the pod any more. Asked for
/// every attempt, so that a late one does not enforce what no longer holds.
pub type Judge = Arc<dyn Fn() -> Option<Forbidden> + Send + Sync>;

type Ending = Pin<Box<dyn Future<Output = io::Result<usize>> + Send>>;

/// What forbids plaintext connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// STRICT mode.
    Mode,
    /// Authorization policies.
    Policy,
}

impl Cause {
    /// `mode` or `policy`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Mode => "mode",
            Self::Policy => "policy",
        }
    }
}

/// A pod whose forbidden connections could not be ended yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unswept {
    /// The pod.
    pub key: WorkloadKey,
    /// What forbids the connections.
    pub cause: Cause,
    /// Attempts so far.
    pub attempts: u32,
    /// What the last attempt ended in.
    pub error: String,
}

/// Ends connections, and knows which pods are outstanding: at most one entry for a pod and cause.
pub struct Sweeps {
    outstanding: Mutex<BTreeMap<(u64, Cause), Outstanding>>,
    end: Box<dyn Fn(Arc<Netns>, Forbidden) -> Ending + Send + Sync>,
}

struct Outstanding {
    unswept: Unswept,
    retry: AbortHandle,
}

/// One pod's connections, and what decides about them.
#[derive(Clone)]
pub struct Sweep {
    /// The pod.
    pub key: WorkloadKey,
    /// Its namespace.
    pub netns: Arc<Netns>,
    /// What forbids its connections.
    pub cause: Cause,
    /// Which ones.
    pub judge: Judge,
}

impl Sweeps {
    /// Ends connections with `SOCK_DESTROY`.
    pub fn new() -> Arc<Self> {
        Self::ending_with(|netns, forbidden| {
            Box::pin(async move { sockdiag::destroy_plaintext(&netns, forbidden).await })
        })
    }

    pub(super) fn ending_with(end: impl Fn(Arc<Netns>, Forbidden) -> Ending + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { outstanding: Mutex::default(), end: Box::new(end) })
    }

    /// Ends what `sweep` says now, and goes on trying in the background when that fails. Must be
    /// called within a Tokio runtime.
    pub async fn run(self: &Arc<Self>, sweep: Sweep) {
        if let Err(error) = self.attempt(&sweep).await {
            tracing::error!(
                workload = %sweep.key, cause = sweep.cause.as_str(), %error,
                "plaintext connections that are forbidden now go on; ending them is tried again"
            );
            self.remember(sweep, &error);
        }
    }

    /// [`run`](Self::run) in the background.
    pub fn start(self: &Arc<Self>, sweep: Sweep) {
        let this = Arc::clone(self);
        tokio::spawn(async move { this.run(sweep).await });
    }

    /// The pod has left the mesh: nothing is forbidden in this namespace any more.
    pub fn forget(&self, netns: u64) {
        self.outstanding().retain(|(of, _), outstanding| {
            if *of == netns {
                outstanding.retry.abort();
            }
            *of != netns
        });
    }

    /// Gives all of it up to another agent, which sweeps what it adopts.
    pub fn stop(&self) {
        for (_, outstanding) in std::mem::take(&mut *self.outstanding()) {
            outstanding.retry.abort();
        }
    }

    /// What is outstanding.
    pub fn unswept(&self) -> Vec<Unswept> {
        self.outstanding().values().map(|outstanding| outstanding.unswept.clone()).collect()
    }

    async fn attempt(&self, sweep: &Sweep) -> io::Result<()> {
        let ended = match (sweep.judge)() {
            Some(forbidden) => (self.end)(Arc::clone(&sweep.netns), forbidden).await?,
            None => 0,
        };
        if ended > 0 {
            let cause = sweep.cause.as_str();
            tracing::info!(workload = %sweep.key, ended, cause, "plaintext connections ended: they are forbidden now");
        }
        // Also when an earlier attempt of another sweep failed: what it left was forbidden to this
        // one as well.
        if let Some(done) = self.outstanding().remove(&sweep.place()) {
            done.retry.abort();
        }
        Ok(())
    }

    fn remember(self: &Arc<Self>, sweep: Sweep, error: &io::Error) {
        let mut outstanding = self.outstanding();
        if let Some(known) = outstanding.get_mut(&sweep.place()) {
            known.unswept.failed(error);
            return;
        }
        let unswept = Unswept { key: sweep.key.clone(), cause: sweep.cause, attempts: 1, error: error.to_string() };
        let place = sweep.place();
        let retry = tokio::spawn(retry(Arc::downgrade(self), sweep)).abort_handle();
        outstanding.insert(place, Outstanding { unswept, retry });
    }

    fn outstanding(&self) -> MutexGuard<'_, BTreeMap<(u64, Cause), Outstanding>> {
        self.outstanding.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sweep {
    fn place(&self) -> (u64, Cause) {
        (self.netns.cookie(), self.cause)
    }
}

impl Unswept {
    fn failed(&mut self, error: &io::Error) {
        self.attempts = self.attempts.saturating_add(1);
        self.error = error.to_string();
    }
}

async fn retry(sweeps: Weak<Sweeps>, sweep: Sweep) {
    let mut pause = FIRST_PAUSE;
    loop {
        tokio::time::sleep(pause).await;
        let Some(sweeps) = sweeps.upgrade() else { return };
        // Success takes the entry out, and with it ends this task.
        let Err(error) = sweeps.attempt(&sweep).await else { return };
        pause = (pause * 2).min(LONGEST_PAUSE);
        tracing::warn!(workload = %sweep.key, cause = sweep.cause.as_str(), %error, ?pause, "still not ended");
        match sweeps.outstanding().get_mut(&sweep.place()) {
            Some(known) => known.unswept.failed(&error),
            None => return,
        }
    }
}
