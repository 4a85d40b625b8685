//! What was handed over, on a tmpfs: an agent that starts again knows pods that have no process yet, and keeps them captured.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;
use tracing::{debug, warn};
use underpass_cni::protocol::{self, PodName};

use crate::{mesh::WorkloadKey, sources::kubernetes::Attachment, sys::file::removed};

/// Longest number of a sandbox; runtimes use 64 hexadecimal digits.
const MAX_NUMBER: usize = 128;
/// Largest file; one has a few hundred bytes.
const MAX_FILE: u64 = 64 * 1024;
/// More sandboxes than a node has pods: kubelets allow some hundred.
const MAX_FILES: usize = 8192;

/// Directory with a file per sandbox.
#[derive(Debug, Clone)]
pub(super) struct Store(PathBuf);

/// One file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    attachment: protocol::Attachment,
    /// Device and inode number of the namespace: its name may be given to another.
    id: (u64, u64),
}

impl Store {
    pub(super) fn open(directory: PathBuf) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        Ok(Self(directory))
    }

    fn file(&self, container: &str) -> io::Result<PathBuf> {
        // A file name: CNI allows letters, digits and these.
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        let plain = container.starts_with(|c: char| c.is_ascii_alphanumeric()) && container.chars().all(allowed);
        if !plain || container.len() > MAX_NUMBER {
            let problem = format!("container id {container:?}: letters, digits, '_', '.' and '-', up to {MAX_NUMBER}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        }
        Ok(self.0.join(container))
    }

    /// Remembers a sandbox.
    pub(super) fn keep(&self, attachment: &protocol::Attachment, namespace: &File) -> io::Result<()> {
        let path = self.file(&attachment.container)?;
        if fs::read_dir(&self.0)?.take(MAX_FILES).count() == MAX_FILES {
            return Err(io::Error::other(format!(
                "{} has {MAX_FILES} files already; the runtime does not tell of pods that are gone",
                self.0.display()
            )));
        }
        let meta = namespace.metadata()?;
        let kept = Kept { attachment: attachment.clone(), id: (meta.dev(), meta.ino()) };
        let mut file = NamedTempFile::with_prefix_in(".", &self.0)?;
        file.write_all(&serde_json::to_vec(&kept)?)?;
        // On a tmpfs: nothing to flush.
        file.persist(path)?;
        Ok(())
    }

    /// Forgets a sandbox; one that is not known is no error.
    pub(super) fn forget(&self, container: &str) -> io::Result<()> {
        removed(fs::remove_file(self.file(container)?))
    }

    /// What is there and still true. Files that are not are removed.
    pub(super) fn recall(&self) -> Vec<Attachment> {
        let files = fs::read_dir(&self.0).into_iter().flatten().flatten().map(|entry| entry.path());
        files
            .take(MAX_FILES)
            .filter_map(|path| match recall(&path) {
                Ok(attachment) => Some(attachment),
                Err(error) => {
                    debug!(file = %path.display(), %error, "of no use any more");
                    if let Err(error) = fs::remove_file(&path) {
                        warn!(file = %path.display(), %error, "cannot be removed");
                    }
                    None
                }
            })
            .collect()
    }
}

/// What the source of the mesh is told of a pod that was handed over.
pub(super) fn handed(attachment: protocol::Attachment, namespace: File) -> Attachment {
    let protocol::Attachment { pod, container, addresses, .. } = attachment;
    Attachment { pod: key(&pod), uid: pod.uid, container, namespace, addresses }
}

/// The workload that a pod is.
pub(super) fn key(pod: &PodName) -> WorkloadKey {
    WorkloadKey { namespace: pod.namespace.as_str().into(), name: pod.name.as_str().into() }
}

fn recall(path: &Path) -> io::Result<Attachment> {
    if fs::metadata(path)?.len() > MAX_FILE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "too long"));
    }
    let kept: Kept = serde_json::from_slice(&fs::read(path)?)?;
    let netns = File::open(&kept.attachment.netns)?;
    let meta = netns.metadata()?;
    if (meta.dev(), meta.ino()) != kept.id {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the namespace is another one now"));
    }
    Ok(handed(kept.attachment, netns))
}

#[cfg(test)]
mod tests {
    use std::{fs, fs::File, path::Path};

    use underpass_cni::protocol::{Attachment, PodName};

    use super::Store;

    fn attachment(container: &str, netns: &Path) -> Attachment {
        Attachment {
            container: container.into(),
            interface: "eth0".into(),
            netns: netns.into(),
            pod: PodName { namespace: "shop".into(), name: "web".into(), uid: Some("u".into()) },
            addresses: vec!["10.0.0.1".parse().unwrap()],
        }
    }

    #[test]
    fn what_is_kept_comes_back_while_the_namespace_is_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().join("a")).unwrap();
        // Any file has a device and an inode number.
        let netns = directory.path().join("netns");
        let file = File::create(&netns).unwrap();
        store.keep(&attachment("c1", &netns), &file).unwrap();
        store.keep(&attachment("c2", &netns), &file).unwrap();
        store.forget("c2").unwrap();
        store.forget("c2").unwrap();
        fs::write(directory.path().join("a/garbage"), "{").unwrap();
        let recalled = store.recall();
        assert_eq!(recalled.len(), 1);
        assert_eq!(
            (&*recalled[0].container, &*recalled[0].pod.namespace, &*recalled[0].pod.name),
            ("c1", "shop", "web")
        );
        assert!(!directory.path().join("a/garbage").exists());

        let other = directory.path().join("other");
        File::create(&other).unwrap();
        fs::rename(&other, &netns).unwrap();
        assert!(store.recall().is_empty(), "another namespace under the old name");
        assert_eq!(fs::read_dir(directory.path().join("a")).unwrap().count(), 0);
    }

    #[test]
    fn numbers_are_no_paths() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().to_owned()).unwrap();
        let file = File::open("/proc/self/ns/net").unwrap();
        for bad in ["", ".", "../x", "a/b", "-a", &"a".repeat(129)] {
            let error = store.keep(&attachment(bad, Path::new("/proc/self/ns/net")), &file).unwrap_err();
            assert!(error.to_string().contains("container id"), "{error}");
            assert!(store.forget(bad).is_err());
        }
    }
}
