//! So many at once to one destination.

use std::{
    collections::HashMap,
    fmt,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, timeout_at},
};

/// What a destination takes at once. Whoever is one too many waits for that destination, and holds
/// nobody else up.
pub struct Lanes<D> {
    share: usize,
    lanes: Mutex<HashMap<D, Arc<State>>>,
}

struct State {
    turns: Semaphore,
    /// When somebody last got through.
    progress: Mutex<Option<Instant>>,
}

impl<D: Hash + Eq + Clone> Lanes<D> {
    /// At most `share` at once to each destination. It has no memory of its own until its first
    /// use.
    pub fn new(share: usize) -> Arc<Self> {
        Arc::new(Self { share, lanes: Mutex::default() })
    }

    /// A way to `destination`; wait in it for a turn.
    pub fn to(self: &Arc<Self>, destination: D) -> Lane<D> {
        let mut lanes = self.lanes();
        let state = lanes.get(&destination).cloned().unwrap_or_else(|| {
            let state = Arc::new(State { turns: Semaphore::new(self.share), progress: Mutex::default() });
            lanes.insert(destination.clone(), Arc::clone(&state));
            state
        });
        drop(lanes);
        Lane { all: Arc::clone(self), destination, state }
    }

    /// Destinations that somebody is on the way to.
    pub fn destinations(&self) -> usize {
        self.lanes().len()
    }

    fn lanes(&self) -> MutexGuard<'_, HashMap<D, Arc<State>>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A way to a destination.
pub struct Lane<D: Hash + Eq + Clone> {
    all: Arc<Lanes<D>>,
    destination: D,
    state: Arc<State>,
}

impl<D: Hash + Eq + Clone> Lane<D> {
    /// Waits for a turn, in the order of asking, for as long as somebody gets through: `None` when
    /// nobody has for `limit`.
    pub async fn turn(&self, limit: Duration) -> Option<SemaphorePermit<'_>> {
        if let Ok(turn) = self.state.turns.try_acquire() {
            return Some(turn);
        }
        let began = Instant::now();
        let turn = self.state.turns.acquire();
        tokio::pin!(turn);
        loop {
            let since = self.state.progress().map_or(began, |progress| progress.max(began));
            match timeout_at(since + limit, turn.as_mut()).await {
                Ok(turn) => return Some(turn.expect("the semaphore is never closed")),
                Err(_) if self.state.progress().is_some_and(|progress| progress > since) => {}
                Err(_) => return None,
            }
        }
    }

    /// The destination has answered.
    pub fn got_through(&self) {
        *self.state.progress.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }
}

impl State {
    fn progress(&self) -> Option<Instant> {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: Hash + Eq + Clone> Drop for Lane<D> {
    fn drop(&mut self) {
        let mut lanes = self.all.lanes();
        // The map's, and this one's.
        if Arc::strong_count(&self.state) <= 2 {
            lanes.remove(&self.destination);
            if lanes.is_empty() {
                lanes.shrink_to_fit();
            }
        }
    }
}

impl<D: Hash + Eq + Clone> fmt::Debug for Lane<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").finish_non_exhaustive()
    }
}
