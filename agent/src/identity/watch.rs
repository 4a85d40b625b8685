//! Tells when something in a set of directories has changed and settled.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};
use tokio::{sync::Notify, time::timeout};

/// A change has settled when nothing has happened for this long: replacing certificate, key and roots takes several steps.
const SETTLED: Duration = Duration::from_millis(100);
/// A directory in which something happens all the time is read anyway after so many rounds.
const MAX_ROUNDS: usize = 20;

/// Watches directories rather than files: files are replaced by renaming, and Kubernetes swaps a symbolic link beside them.
pub(crate) struct Watch {
    watched: Mutex<(RecommendedWatcher, BTreeSet<PathBuf>)>,
    signal: Arc<Notify>,
}

impl Watch {
    pub(crate) fn new() -> notify::Result<Self> {
        let signal = Arc::new(Notify::new());
        let waker = Arc::clone(&signal);
        let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            // An error may mean lost events.
            if event.map_or(true, |e| e.need_rescan() || is_change(e.kind)) {
                waker.notify_one();
            }
        })?;
        Ok(Self { watched: Mutex::new((watcher, BTreeSet::new())), signal })
    }

    /// Watches exactly these directories. Returns those that could not be, with the reason; asking again tries again.
    pub(crate) fn set(&self, directories: &BTreeSet<PathBuf>) -> Vec<(PathBuf, notify::Error)> {
        let mut guard = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        let (watcher, watched) = &mut *guard;
        for old in watched.difference(directories) {
            // One that has vanished has nothing left to unwatch.
            let _ = watcher.unwatch(old);
        }
        watched.clone_from(directories);
        // Those known before too: the kernel's watch ends when a directory is replaced by another of that name.
        let mut failed = Vec::new();
        for directory in directories {
            if let Err(error) = watcher.watch(directory, RecursiveMode::NonRecursive) {
                failed.push((directory.clone(), error));
            }
        }
        failed
    }

    /// Resolves after a change, once it has settled.
    pub(crate) async fn changed(&self) {
        self.signal.notified().await;
        for _ in 0..MAX_ROUNDS {
            if timeout(SETTLED, self.signal.notified()).await.is_err() {
                return;
            }
        }
    }

    /// Makes [`changed`](Self::changed) resolve.
    pub(crate) fn wake(&self) {
        self.signal.notify_one();
    }
}

/// Reading a file is not a change, and we read them ourselves.
fn is_change(kind: EventKind) -> bool {
    !matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}
