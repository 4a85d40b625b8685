//! Which network namespace a pod has.

use std::{
    fmt,
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Serialize, Serializer};

/// Device and inode number of a network namespace on nsfs. They name it while something holds it.
pub type NetnsId = (u64, u64);

/// A pod's network namespace: a name for people, and the namespace itself where the source of the
/// mesh holds it. Paths can be given to other namespaces and descriptors' numbers to other files,
/// so a namespace that is held is never looked for by its name.
#[derive(Clone, Debug)]
pub struct PodNamespace {
    name: PathBuf,
    held: Option<(Arc<File>, NetnsId)>,
}

impl PodNamespace {
    /// A namespace that is looked for at this path (`/run/netns/web`, `/proc/123/ns/net`) when it
    /// is needed.
    pub fn at(path: PathBuf) -> Self {
        Self { name: path, held: None }
    }

    /// A namespace that is held open, and its numbers. Without a name it is called `net:[inode]`,
    /// as in `/proc/PID/ns`.
    pub fn held(file: File, id: NetnsId, name: Option<PathBuf>) -> Self {
        let name = name.unwrap_or_else(|| PathBuf::from(format!("net:[{}]", id.1)));
        Self { name, held: Some((Arc::new(file), id)) }
    }

    /// What people call it. No way to open it where the namespace is [held](Self::file).
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// The namespace itself, and its numbers, where it is held.
    pub fn file(&self) -> Option<(&Arc<File>, NetnsId)> {
        self.held.as_ref().map(|(file, id)| (file, *id))
    }
}

impl PartialEq for PodNamespace {
    fn eq(&self, other: &Self) -> bool {
        // As text: comparing paths by their components takes ten times as long.
        let [ours, theirs] = [self, other].map(|namespace| namespace.held.as_ref().map(|(_, id)| id));
        ours == theirs && self.name.as_os_str() == other.name.as_os_str()
    }
}

impl Eq for PodNamespace {}

impl fmt::Display for PodNamespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.display().fmt(f)
    }
}

impl Serialize for PodNamespace {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.name.serialize(serializer)
    }
}
