//! Sockets made ahead of their use, in batches, by a worker thread inside the pod.
//!
//! Making one socket in a pod costs a hand-over to another thread and back; making 64 costs that once.

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use socket2::Socket;
use tokio::{runtime::Handle, sync::Mutex as AsyncMutex};
use tracing::{debug, warn};

use crate::capture::netns::Netns;

/// Sizes of a batch.
const SMALLEST: usize = 4;
const LARGEST: usize = 64;
/// A refill this soon after the last one doubles the batch, one this late halves it.
const SOON: Duration = Duration::from_secs(1);
const LATE: Duration = Duration::from_secs(10);
/// How often unused pools are looked for, and after how many looks one is emptied to [`KEEP`] sockets: 30 to 45 s.
const SWEEP: Duration = Duration::from_secs(15);
const IDLE_SWEEPS: u32 = 2;
const KEEP: usize = 2;

/// Sockets of one kind in one pod.
pub(super) struct Pool {
    netns: Netns,
    make: Box<dyn Fn() -> io::Result<Socket> + Send + Sync>,
    /// Without memory of its own until the first use: most pods of a node never need all of theirs.
    ready: Mutex<Vec<Socket>>,
    batch: AtomicUsize,
    /// Held by whoever refills, so that one refill is under way at most.
    refill: Arc<AsyncMutex<Option<Instant>>>,
    /// Sweeps since the last use.
    idle: AtomicU32,
}

impl Pool {
    /// A pool that is empty until the first use. `make` runs inside the namespace.
    pub(super) fn new(netns: Netns, make: impl Fn() -> io::Result<Socket> + Send + Sync + 'static) -> Arc<Self> {
        let pool = Arc::new(Self {
            netns,
            make: Box::new(make),
            ready: Mutex::default(),
            batch: AtomicUsize::new(SMALLEST),
            refill: Arc::default(),
            idle: AtomicU32::new(0),
        });
        janitor::register(&pool);
        pool
    }

    /// A socket: at once when one is ready, else after a refill.
    pub(super) async fn take(self: &Arc<Self>) -> io::Result<Socket> {
        self.idle.store(0, Ordering::Relaxed);
        if let Some(socket) = self.pop() {
            self.refill_ahead();
            return Ok(socket);
        }
        let mut last = self.refill.lock().await;
        // Whoever held the lock before may have left some.
        if let Some(socket) = self.pop() {
            return Ok(socket);
        }
        let size = self.next_batch(&mut last);
        let pool = Arc::clone(self);
        // The worker puts the batch into the pool itself: nothing is lost if this future is dropped.
        self.netns
            .try_run(move || {
                let socket = (pool.make)()?;
                if let Err(error) = pool.fill(size - 1) {
                    debug!(%error, "socket pool filled in part");
                }
                Ok(socket)
            })
            .await?
    }

    /// Starts a refill when few are left and none is under way.
    fn refill_ahead(self: &Arc<Self>) {
        let batch = self.batch.load(Ordering::Relaxed);
        if self.ready().len() > batch / 4 {
            return;
        }
        let (Ok(mut last), Ok(runtime)) = (Arc::clone(&self.refill).try_lock_owned(), Handle::try_current()) else {
            return;
        };
        let size = self.next_batch(&mut last);
        let pool = Arc::clone(self);
        runtime.spawn(async move {
            let filled = pool.netns.clone().try_run(move || pool.fill(size)).await;
            if let Err(error) = filled.flatten() {
                // Whoever finds the pool empty tries again and gets the error.
                debug!(%error, "socket pool not refilled ahead");
            }
            drop(last);
        });
    }

    /// Size of the refill that begins now, by how long ago the last one was.
    fn next_batch(&self, last: &mut Option<Instant>) -> usize {
        let now = Instant::now();
        let batch = self.batch.load(Ordering::Relaxed);
        let batch = match last.map(|last| now - last) {
            Some(pause) if pause < SOON => batch * 2,
            Some(pause) if pause > LATE => batch / 2,
            _ => batch,
        };
        let batch = batch.clamp(SMALLEST, LARGEST);
        *last = Some(now);
        self.batch.store(batch, Ordering::Relaxed);
        batch
    }

    /// Makes sockets until the pool is full or `size` were made.
    fn fill(&self, size: usize) -> io::Result<()> {
        for _ in 0..size {
            let socket = (self.make)()?;
            let mut ready = self.ready();
            if ready.len() >= LARGEST {
                break;
            }
            ready.push(socket);
        }
        Ok(())
    }

    fn pop(&self) -> Option<Socket> {
        self.ready().pop()
    }

    fn ready(&self) -> MutexGuard<'_, Vec<Socket>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a look by the janitor, and empties a pool that nobody used for long.
    fn sweep(&self) {
        if self.idle.fetch_add(1, Ordering::Relaxed) + 1 < IDLE_SWEEPS {
            return;
        }
        self.batch.store(SMALLEST, Ordering::Relaxed);
        let mut ready = self.ready();
        let kept = ready.len().min(KEEP);
        let surplus = ready.split_off(kept);
        ready.shrink_to_fit();
        drop(ready);
        // Closed without holding the lock.
        drop(surplus);
    }
}

mod janitor {
    //! One thread that looks after all pools; it ends with the last of them.

    use super::{Arc, Duration, Mutex, PoisonError, Pool, SWEEP, Weak, thread, warn};

    static POOLS: Mutex<Vec<Weak<Pool>>> = Mutex::new(Vec::new());

    pub(super) fn register(pool: &Arc<Pool>) {
        let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
        // The thread runs exactly while the list is not empty.
        if pools.is_empty()
            && let Err(error) = thread::Builder::new().name("socket-pools".to_owned()).spawn(|| run(SWEEP))
        {
            warn!(%error, "idle socket pools will not shrink: no thread");
            return;
        }
        pools.push(Arc::downgrade(pool));
    }

    fn run(interval: Duration) {
        loop {
            thread::sleep(interval);
            let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
            pools.retain(|pool| {
                let Some(pool) = pool.upgrade() else { return false };
                pool.sweep();
                true
            });
            if pools.is_empty() {
                return;
            }
        }
    }
}

#[cfg(test)]
#[path = "../netns_tests/pool.rs"]
mod tests;
