//! Finds the network namespaces of this node's pods, by the cgroups that the kubelet makes for them.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::records::Key;
use crate::mesh::{NetnsId, PodNamespace};

/// Levels between the attach point and a pod's cgroup: the class of service, and what lies above kubepods on nodes that are
/// containers.
const DEPTH: usize = 5;
/// Levels below a pod's cgroup in which its processes are: container runtimes nest one or two.
const DEPTH_IN_POD: usize = 3;
/// Directories in which container runtimes give namespaces a name.
const NAMED: [&str; 2] = ["/run/netns", "/var/run/netns"];

/// Where a pod is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Its network namespace.
    pub(super) netns: PodNamespace,
    /// Its cgroup, of a pod that was found by it.
    pub(super) cgroup: Option<PathBuf>,
}

/// Remembers where pods are.
#[derive(Debug)]
pub(super) struct Finder {
    /// The cgroup above the pods'.
    root: PathBuf,
    /// By uid.
    known: HashMap<Arc<str>, Place>,
    /// Handed over before they had a process; these come first.
    handed: HashMap<Key, Handed>,
}

#[derive(Debug)]
struct Handed {
    /// Without one, any pod of that name.
    uid: Option<Arc<str>>,
    place: Place,
}

impl Finder {
    /// Looks below the cgroup directory `root`.
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), known: HashMap::new(), handed: HashMap::new() }
    }

    /// Where the pod is, if it was found.
    pub(super) fn place(&self, key: &Key, uid: &str) -> Option<&Place> {
        let handed = self.handed.get(key).filter(|handed| handed.uid.as_deref().is_none_or(|of| of == uid));
        handed.map(|handed| &handed.place).or_else(|| self.known.get(uid))
    }

    /// Takes over the namespace of a pod that has no process yet.
    pub(super) fn hand(&mut self, key: &Key, uid: Option<&str>, namespace: File) -> io::Result<()> {
        let meta = namespace.metadata()?;
        let place = Place { netns: hold(namespace, (meta.dev(), meta.ino())), cgroup: None };
        self.handed.insert(key.clone(), Handed { uid: uid.map(Into::into), place });
        Ok(())
    }

    /// Forgets a namespace that was handed over.
    pub(super) fn take_back(&mut self, key: &Key) {
        self.handed.remove(key);
    }

    /// Forgets all others than these pods and looks for those of them that are not known, by uid. Blocks on the file system.
    pub(super) fn find(&mut self, pods: &[(&Key, Arc<str>)]) {
        let wanted: std::collections::HashSet<_> = pods.iter().map(|(_, uid)| uid).collect();
        self.known.retain(|uid, _| wanted.contains(uid));
        // The systemd cgroup driver writes uids with underscores.
        let mut missing: HashMap<String, Arc<str>> = pods
            .iter()
            .filter(|(key, uid)| !uid.is_empty() && self.place(key, uid).is_none())
            .flat_map(|(_, uid)| [uid.to_string(), uid.replace('-', "_")].map(|name| (name, Arc::clone(uid))))
            .collect();
        if !missing.is_empty() {
            let own = fs::metadata("/proc/self/ns/net").map(|m| (m.dev(), m.ino())).ok();
            let mut found = Vec::new();
            search(&self.root, DEPTH, &mut missing, &mut found);
            for (uid, cgroup) in found {
                if let Some(place) = enter(&cgroup, own) {
                    self.known.insert(uid, place);
                }
            }
        }
    }
}

/// Collects the cgroups of `missing` pods: `pod<uid>`, or `...-pod<uid>.slice` with the systemd driver.
fn search(
    directory: &Path,
    depth: usize,
    missing: &mut HashMap<String, Arc<str>>,
    found: &mut Vec<(Arc<str>, PathBuf)>,
) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        if !entry.file_type().is_ok_and(|t| t.is_dir()) {
            continue;
        }
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let stem = name.strip_suffix(".slice").unwrap_or(name);
        if let Some((before, uid)) = stem.rsplit_once("pod")
            && (before.is_empty() || before.ends_with('-'))
        {
            if let Some(uid) = missing.get(uid) {
                found.push((Arc::clone(uid), entry.path()));
            }
            // Below a pod there is no other.
            if !uid.is_empty() && uid != "s" {
                continue;
            }
        }
        if depth > 1 {
            search(&entry.path(), depth - 1, missing, found);
        }
    }
}

/// The namespace of the pod's processes. `own` is the agent's: a process in it has not entered the pod's yet.
fn enter(cgroup: &Path, own: Option<NetnsId>) -> Option<Place> {
    let mut pids = Vec::new();
    processes(cgroup, DEPTH_IN_POD, &mut pids);
    pids.sort_unstable();
    for pid in pids {
        let Ok(namespace) = File::open(format!("/proc/{pid}/ns/net")) else { continue };
        // Read after the namespace was opened: had the number passed to another process before, this would tell.
        let Ok(cgroups) = fs::read_to_string(format!("/proc/{pid}/cgroup")) else { continue };
        let name = cgroup.file_name()?.to_str()?;
        if !cgroups.lines().filter_map(|l| l.strip_prefix("0::")).any(|path| path.split('/').any(|part| part == name)) {
            continue;
        }
        let Ok(meta) = namespace.metadata() else { continue };
        let id = (meta.dev(), meta.ino());
        if Some(id) == own {
            continue;
        }
        return Some(Place { netns: hold(namespace, id), cgroup: Some(cgroup.to_owned()) });
    }
    None
}

fn processes(cgroup: &Path, depth: usize, pids: &mut Vec<u32>) {
    let listed = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    // 0 is a process of another PID namespace.
    pids.extend(listed.lines().filter_map(|l| l.parse::<u32>().ok()).filter(|pid| *pid > 0));
    if depth == 0 {
        return;
    }
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            processes(&entry.path(), depth - 1, pids);
        }
    }
}

/// Holds the namespace, so that the kernel gives its numbers to no other.
fn hold(namespace: File, id: NetnsId) -> PodNamespace {
    PodNamespace::held(namespace, id, named(id))
}

/// The name that the container runtime gave the namespace: it tells an operator more than a number.
fn named(id: NetnsId) -> Option<PathBuf> {
    NAMED
        .iter()
        .flat_map(fs::read_dir)
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .find(|path| fs::metadata(path).is_ok_and(|meta| (meta.dev(), meta.ino()) == id))
}
