//! Keeps the plugin on the node, and chained behind whatever network the node has.

use std::{path::PathBuf, time::Duration};

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::{
    sync::mpsc,
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tracing::{info, warn};
use underpass_cni::install::{Installer, State};

/// How often the node is looked at although nothing was seen to change.
const LOOK: Duration = Duration::from_secs(10);
/// A network's installer writes more than once: it is let finish.
const SETTLE: Duration = Duration::from_millis(50);

/// Installs, and repairs whenever something else writes into the directories, until dropped. The plugin stays.
pub async fn keep(installer: Installer) {
    // One slot is enough: an event only says "look again".
    let (wake, mut events) = mpsc::channel(1);
    let directories = [installer.conf_dir.clone(), installer.bin_dir.clone()];
    let _watcher = watch(&directories, wake.clone());
    let mut said = None;
    loop {
        let again = installer.clone();
        let result = spawn_blocking(move || again.ensure()).await;
        let (line, skipped) = match result.map_err(std::io::Error::other) {
            Ok(Ok(State::Chained { file, changed, skipped })) => {
                if changed && said.is_some() {
                    info!(file = %file.display(), "the CNI plugin is in the node's configuration again");
                }
                (Ok(format!("the CNI plugin is chained in {}", file.display())), skipped)
            }
            Ok(Ok(State::NoNetwork { skipped })) => {
                let place = directories[0].display();
                (Ok(format!("no network is configured in {place} yet; waiting for one to chain to")), skipped)
            }
            Ok(Err(error)) => (Err(error.to_string()), Vec::new()),
            Err(error) => (Err(error.to_string()), Vec::new()),
        };
        let problems: Vec<String> = skipped.iter().map(ToString::to_string).collect();
        // Said once per change, not once per look.
        let now = (line, problems);
        if said.as_ref() != Some(&now) {
            match &now.0 {
                Ok(line) => info!("{line}"),
                Err(error) => warn!(%error, "the CNI plugin is not installed; trying again"),
            }
            for problem in &now.1 {
                warn!(%problem, "a network configuration that is passed over");
            }
            said = Some(now);
        }
        // `wake` is kept here, so the channel cannot close.
        if timeout(LOOK, events.recv()).await.is_ok() {
            sleep(SETTLE).await;
            while events.try_recv().is_ok() {}
        }
    }
}

fn watch(directories: &[PathBuf], wake: mpsc::Sender<()>) -> Option<RecommendedWatcher> {
    let on_event = move |event: notify::Result<notify::Event>| {
        // Reading a file is an event, too.
        if event.is_ok_and(|e| !matches!(e.kind, EventKind::Access(_))) {
            // Full means that a look is due already.
            let _ = wake.try_send(());
        }
    };
    let watcher = notify::recommended_watcher(on_event).and_then(|mut watcher| {
        for directory in directories {
            watcher.watch(directory, RecursiveMode::NonRecursive)?;
        }
        Ok(watcher)
    });
    watcher
        .inspect_err(
            |error| warn!(%error, seconds = LOOK.as_secs(), "the CNI directories are looked at now and then only"),
        )
        .ok()
}
