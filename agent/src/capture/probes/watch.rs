//! Noticing that cgroups come and go.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _, event::ModifyKind};
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};

use super::Probes;

/// Where the system offers no events, cgroups are looked at this often: a kubelet that was restarted begins with its
/// probes a few seconds later.
const POLL_ONLY: Duration = Duration::from_secs(2);
/// The cgroups are looked at this often without any event. Nothing is known to lose one, but a lost one would fail probes
/// for ever, and a look costs a few microseconds.
const POLL: Duration = Duration::from_secs(30);

/// Watches the directories above cgroups, and has [`Probes::refresh`] called when something in them comes or goes.
pub(super) struct Watch {
    watcher: Option<RecommendedWatcher>,
    watched: BTreeSet<(PathBuf, u64)>,
    task: JoinHandle<()>,
}

impl Watch {
    /// Must be called within a Tokio runtime.
    pub(super) fn start(probes: &Arc<Probes>) -> Self {
        // One slot is enough: an event only says "look again".
        let (wake, events) = mpsc::channel(1);
        let sender = wake.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.map_or(true, |event| is_coming_or_going(&event)) {
                let _ = sender.try_send(());
            }
        })
        .inspect_err(|reason| {
            tracing::warn!(%reason, "no file events (raise fs.inotify.max_user_instances); probe cgroups are polled instead");
        })
        .ok();
        let poll = if watcher.is_some() { POLL } else { POLL_ONLY };
        let task = tokio::spawn(follow(Arc::downgrade(probes), events, wake, poll));
        Self { watcher, watched: BTreeSet::new(), task }
    }

    /// Watches every directory from `top` down to the parents of `directories`, as far as they exist: when one of them appears,
    /// its parent says so.
    pub(super) fn follow(&mut self, top: &Path, directories: &[PathBuf]) {
        let Some(watcher) = &mut self.watcher else { return };
        let mut wanted = BTreeSet::new();
        for directory in directories {
            let above = directory.ancestors().skip(1).take_while(|above| above.starts_with(top));
            for above in above.collect::<Vec<_>>().into_iter().rev() {
                // Looked at before it is watched: one that is replaced in between is known by the wrong inode and watched
                // again, which the event of its parent sees to.
                let Ok(found) = fs::metadata(above) else { break };
                let known = (above.to_owned(), found.ino());
                if wanted.contains(&known) {
                    continue;
                }
                if !self.watched.contains(&known) {
                    // Of a directory that was here before.
                    let _ = watcher.unwatch(above);
                    if watcher.watch(above, RecursiveMode::NonRecursive).is_err() {
                        break;
                    }
                }
                wanted.insert(known);
            }
        }
        for (gone, _) in self.watched.difference(&wanted) {
            if !wanted.iter().any(|(path, _)| path == gone) {
                // Fails when the directory itself is gone; then so is the watch.
                let _ = watcher.unwatch(gone);
            }
        }
        self.watched = wanted;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Reading and writing a cgroup's files, which the kubelet and the container runtime do all the time, is no news.
fn is_coming_or_going(event: &notify::Event) -> bool {
    let news =
        matches!(event.kind, EventKind::Create(_) | EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)));
    news || event.need_rescan()
}

/// `_wake` keeps the channel open when there is no watcher.
async fn follow(probes: Weak<Probes>, mut events: mpsc::Receiver<()>, _wake: mpsc::Sender<()>, poll: Duration) {
    loop {
        let _ = timeout(poll, events.recv()).await;
        let Some(probes) = probes.upgrade() else { return };
        probes.refresh();
    }
}
