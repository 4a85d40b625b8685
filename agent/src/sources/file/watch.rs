//! Noticing that the file changed, however it was changed.
//!
//! Editors rename a new file over the old one and Kubernetes swaps a symbolic link beside it, so the directories are
//! watched, not the file; after every event only the file's metadata is compared, so a busy directory costs little.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};
use tracing::warn;

use super::{ConfigError, FileSource};
use crate::mesh::MeshStore;

/// A change is read when nothing more happened for this long: a writer is then most likely done.
const QUIET: Duration = Duration::from_millis(100);
/// Longest wait for quiet.
const QUIET_LIMIT: Duration = Duration::from_secs(1);
/// The file is looked at this often without any event: network file systems send none.
const POLL: Duration = Duration::from_secs(30);
/// The same when the system offers no events at all.
const POLL_ONLY: Duration = Duration::from_secs(2);

impl FileSource {
    /// Puts every valid change of the file into `store`; an invalid one is logged and counted, the old one stays. Runs
    /// until dropped. Starts with a look at the file, so a change since [`open`](Self::open) is not missed.
    pub async fn watch(mut self, store: Arc<MeshStore>) -> Result<(), ConfigError> {
        // One slot is enough: an event only says "look again".
        let (wake, mut events) = mpsc::channel::<()>(1);
        let mut directories = Directories::new(wake.clone());
        let mut last = None;
        loop {
            directories.follow(&self.path);
            let now = Signature::of(&self.path);
            if last.as_ref() != Some(&now) {
                last = Some(now);
                let store = Arc::clone(&store);
                let path = self.path.clone();
                self = tokio::task::spawn_blocking(move || {
                    self.reload(&store);
                    self
                })
                .await
                .map_err(|e| ConfigError(format!("watching {}: reading it failed: {e}", path.display())))?;
            }
            // `wake` is kept here, so the channel cannot close.
            if timeout(directories.poll(), events.recv()).await.is_ok() {
                settle(&mut events).await;
            }
        }
    }
}

async fn settle(events: &mut mpsc::Receiver<()>) {
    let limit = Instant::now() + QUIET_LIMIT;
    while Instant::now() < limit {
        if timeout_at(limit.min(Instant::now() + QUIET), events.recv()).await.is_err() {
            return;
        }
    }
}

/// What changes whenever the file's content may have changed.
#[derive(Debug, PartialEq, Eq)]
struct Signature(Option<(u64, u64, u64, i64, i64, i64, i64)>);

impl Signature {
    fn of(path: &Path) -> Self {
        Self(
            fs::metadata(path)
                .ok()
                .map(|m| (m.dev(), m.ino(), m.size(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec())),
        )
    }
}

/// The watched directories: the one that holds the name, and the one that holds the file behind a symbolic link.
struct Directories {
    watcher: Option<RecommendedWatcher>,
    watched: BTreeSet<(PathBuf, u64)>,
}

impl Directories {
    fn new(wake: mpsc::Sender<()>) -> Self {
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading the file is an access too: reacting to it would never end.
            if !event.is_ok_and(|e| matches!(e.kind, EventKind::Access(_))) {
                let _ = wake.try_send(());
            }
        });
        let watcher = watcher
            .inspect_err(|reason| {
                warn!(%reason, "no file events (raise fs.inotify.max_user_instances); the configuration is polled instead");
            })
            .ok();
        Self { watcher, watched: BTreeSet::new() }
    }

    /// Watches what `path` needs now: a directory that was replaced is a new one under an old name.
    fn follow(&mut self, path: &Path) {
        let Some(watcher) = &mut self.watcher else { return };
        let parent = |p: &Path| match p.parent() {
            Some(d) if !d.as_os_str().is_empty() => d.to_owned(),
            _ => PathBuf::from("."),
        };
        let wanted: BTreeSet<_> = [Some(parent(path)), fs::canonicalize(path).ok().map(|p| parent(&p))]
            .into_iter()
            .flatten()
            .filter_map(|d| fs::canonicalize(&d).ok())
            .filter_map(|d| fs::metadata(&d).ok().map(|m| (d, m.ino())))
            .collect();
        for (gone, _) in self.watched.difference(&wanted) {
            // Fails when the directory itself is gone; then so is the watch.
            let _ = watcher.unwatch(gone);
        }
        let mut kept = BTreeSet::new();
        for (directory, inode) in wanted {
            let known = self.watched.contains(&(directory.clone(), inode));
            if known || watcher.watch(&directory, RecursiveMode::NonRecursive).is_ok() {
                kept.insert((directory, inode));
            }
        }
        self.watched = kept;
    }

    fn poll(&self) -> Duration {
        if self.watched.is_empty() { POLL_ONLY } else { POLL }
    }
}
