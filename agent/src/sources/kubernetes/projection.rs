//! What the CNI plugin has to know when there is no agent to ask: the namespaces whose pods must not start then.

use std::{
    collections::BTreeMap,
    fs::DirBuilder,
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tracing::warn;
use underpass_cni::projection::{Projection, Treatment, VERSION};

use super::{
    cluster::Cluster,
    records::{Choice, PodRecord},
};

/// Shortest time between two files: looking through all pods has its price, too.
const PAUSE: Duration = Duration::from_millis(250);

/// Keeps the file.
#[derive(Debug)]
pub(super) struct Projector {
    file: PathBuf,
    /// Since when something may be different from the file, and whether it was tried before.
    dirty: Option<Instant>,
    written: Option<(Instant, Projection)>,
}

impl Projector {
    pub(super) fn new(file: PathBuf) -> Self {
        Self { file, dirty: Some(Instant::now()), written: None }
    }

    /// Pods or namespaces are different.
    pub(super) fn changed(&mut self) {
        self.dirty.get_or_insert_with(Instant::now);
    }

    /// When the file is to be written.
    pub(super) fn due(&self) -> Option<Instant> {
        let dirty = self.dirty?;
        Some(self.written.as_ref().map_or(dirty, |(last, _)| dirty.max(*last + PAUSE)))
    }

    /// Writes what is different. A file that cannot be written is tried again with the next change: the old one holds pods of
    /// namespaces that it does not know.
    pub(super) fn write(&mut self, cluster: &Cluster) {
        self.dirty = None;
        let now = Instant::now();
        let projection = project(cluster);
        if let Some((last, written)) = &mut self.written
            && *written == projection
        {
            *last = now;
            return;
        }
        let directory = self.file.parent().map_or(Ok(()), private);
        match directory.and_then(|()| projection.write(&self.file)) {
            Ok(()) => self.written = Some((now, projection)),
            Err(error) => warn!(file = %self.file.display(), %error, "cannot tell the CNI plugin which pods to hold"),
        }
    }
}

/// The directory may not be there yet, or be gone with a tmpfs.
fn private(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

fn project(cluster: &Cluster) -> Projection {
    let mut namespaces: BTreeMap<String, Treatment> = cluster
        .namespaces
        .iter()
        .map(|(key, namespace)| {
            let held = namespace.choice == Some(Choice::In) && !cluster.leaving;
            (key.name.to_string(), if held { Treatment::Held } else { Treatment::Free })
        })
        .collect();
    // Where single pods take part, so may the next one.
    let possible = |pod: &PodRecord| !pod.host_network && pod.unvouched.is_none();
    let own = cluster.pods.iter().filter(|(_, pod)| pod.choice == Some(Choice::In) && possible(pod));
    let mut last = None;
    for (key, _) in own.filter(|_| !cluster.leaving) {
        // They are in order, so each namespace is noted once.
        if last.replace(&key.namespace) != Some(&key.namespace) {
            namespaces.insert(key.namespace.to_string(), Treatment::Held);
        }
    }
    Projection { version: VERSION, namespaces }
}
