//! The current snapshot, readable without a lock.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::Snapshot;

/// Holds the current [`Snapshot`]. Readers never wait; whoever has to act on changes watches the generation.
#[derive(Debug)]
pub struct MeshStore {
    current: ArcSwap<Snapshot>,
    generation: watch::Sender<u64>,
}

impl MeshStore {
    /// A store that starts with `snapshot`.
    pub fn new(snapshot: Snapshot) -> Self {
        let generation = watch::Sender::new(snapshot.generation);
        Self { current: ArcSwap::from_pointee(snapshot), generation }
    }

    /// The current snapshot.
    pub fn load(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Replaces the snapshot, gives it the next generation and wakes the watchers.
    pub fn replace(&self, mut snapshot: Snapshot) -> Arc<Snapshot> {
        let mut stored = None;
        self.generation.send_modify(|g| {
            *g += 1;
            snapshot.generation = *g;
            let snapshot = Arc::new(snapshot);
            self.current.store(Arc::clone(&snapshot));
            stored = Some(snapshot);
        });
        stored.expect("send_modify always calls its closure")
    }

    /// Wakes on every change.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }
}
