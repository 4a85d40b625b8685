//! What one testbed has created, and how all of it is found again and removed.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context, Result, ensure};
use nix::unistd::geteuid;

use crate::{
    bpffs, cgroup, mounts,
    namespace::{self, NETNS_DIR},
};

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// Shared by everything of one testbed.
#[derive(Debug)]
pub(crate) struct Shared {
    /// `<label>-<pid>-<counter>`.
    pub(crate) id: String,
    /// Directory in the cgroup v2 hierarchy.
    pub(crate) cgroup: PathBuf,
    /// Directory for files.
    pub(crate) dir: PathBuf,
    /// Held while something is created, so that nothing appears during the removal.
    removed: Mutex<bool>,
}

impl Shared {
    pub(crate) fn new(label: &str) -> Result<std::sync::Arc<Self>> {
        ensure!(
            (1..=8).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()),
            "a testbed's label is 1 to 8 characters of a-z0-9, not {label:?}"
        );
        ensure!(geteuid().is_root(), "a testbed makes network namespaces and cgroups: run as root");
        let id = format!("{label}-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let shared = Self {
            cgroup: cgroup::mount_point()?.join(format!("underpass-{id}")),
            dir: std::env::temp_dir().join(format!("underpass-{id}")),
            id,
            removed: Mutex::new(false),
        };
        fs::create_dir(&shared.dir).with_context(|| format!("creating {}", shared.dir.display()))?;
        fs::create_dir(&shared.cgroup).with_context(|| format!("creating cgroup {}", shared.cgroup.display()))?;
        Ok(std::sync::Arc::new(shared))
    }

    /// Runs a step that creates kernel objects; refused once the testbed is gone.
    pub(crate) fn exclusively<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let removed = self.removed.lock().expect("not poisoned: nothing panics under it");
        ensure!(!*removed, "testbed {} has been removed", self.id);
        // iproute2 prepares its directory on first use, which races between processes.
        bpffs::locked(f)
    }

    /// Removes everything; says what could not be removed on stderr, because drops have no other way.
    pub(crate) fn remove(&self) {
        let Ok(mut removed) = self.removed.lock() else { return };
        *removed = true;
        if let Err(error) = remove_where(|found| found.id == self.id) {
            eprintln!("testbed {}: {error:#}", self.id);
        }
    }
}

/// What a [`Testbed::sweep`](crate::Testbed::sweep) removed.
#[derive(Debug, Default)]
pub struct AppliedCleanup {
    /// Namespaces, cgroups, pin directories and directories that are gone now.
    pub removed: Vec<PathBuf>,
}

/// Something whose name says that a testbed made it.
pub(crate) struct Found {
    /// The testbed.
    pub(crate) id: String,
    /// The process that the testbed belonged to.
    pid: u32,
    path: PathBuf,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    // In the order of removal: processes first, then what they use.
    Cgroup,
    Namespace,
    Pins,
    Directory,
}

/// Removes what testbeds of dead processes left.
pub(crate) fn sweep() -> Result<AppliedCleanup> {
    remove_where(|found| !Path::new("/proc").join(found.pid.to_string()).exists())
}

/// Removes everything of every testbed of this process, for the moment before a signal ends it.
pub fn cleanup_own() -> Result<AppliedCleanup> {
    remove_where(|found| found.pid == std::process::id())
}

/// Paths of the objects that `which` selects.
pub(crate) fn objects_of(which: impl Fn(&Found) -> bool) -> Result<Vec<PathBuf>> {
    Ok(list()?.into_iter().filter(which).map(|found| found.path).collect())
}

fn remove_where(which: impl Fn(&Found) -> bool) -> Result<AppliedCleanup> {
    let mut done = AppliedCleanup::default();
    let mut failures = BTreeSet::new();
    for found in list()?.into_iter().filter(which) {
        let result = match found.kind {
            Kind::Cgroup => cgroup::remove(&found.path),
            Kind::Namespace => namespace::delete(&file_name(&found.path)),
            Kind::Pins => fs::remove_dir_all(&found.path).map_err(Into::into),
            Kind::Directory => mounts::remove_dir_all(&found.path),
        };
        match result {
            Ok(()) => done.removed.push(found.path),
            // Another sweep may have been faster.
            Err(_) if !found.path.exists() => {}
            Err(error) => {
                failures.insert(format!("{}: {error:#}", found.path.display()));
            }
        }
    }
    ensure!(
        failures.is_empty(),
        "not everything could be removed: {}",
        failures.into_iter().collect::<Vec<_>>().join("; ")
    );
    Ok(done)
}

/// Everything that has a testbed's name, in the order of removal.
fn list() -> Result<Vec<Found>> {
    let places = [
        (Kind::Cgroup, cgroup::mount_point()?, "underpass-"),
        (Kind::Namespace, PathBuf::from(NETNS_DIR), "up-"),
        (Kind::Pins, bpffs::directory().to_path_buf(), "underpass-"),
        (Kind::Directory, std::env::temp_dir(), "underpass-"),
    ];
    let mut all = Vec::new();
    for (kind, place, prefix) in places {
        let Ok(entries) = fs::read_dir(&place) else { continue };
        for entry in entries.flatten() {
            let path = entry.path();
            if let Some((id, pid)) = file_name(&path).strip_prefix(prefix).and_then(parse_id) {
                all.push(Found { id, pid, path, kind });
            }
        }
    }
    all.sort_by_key(|found| found.kind);
    Ok(all)
}

/// `<label>-<pid>-<counter>` at the start of `rest`, which may go on with `-…`.
fn parse_id(rest: &str) -> Option<(String, u32)> {
    let mut parts = rest.split('-');
    let (label, pid, counter) = (parts.next()?, parts.next()?, parts.next()?);
    let (pid, counter) = (pid.parse::<u32>().ok()?, counter.parse::<u32>().ok()?);
    Some((format!("{label}-{pid}-{counter}"), pid))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::parse_id;

    #[test]
    fn names_give_their_testbed_back() {
        assert_eq!(parse_id("e2e-77-0-a-web"), Some(("e2e-77-0".into(), 77)));
        assert_eq!(parse_id("e2e-77-10"), Some(("e2e-77-10".into(), 77)));
        assert_eq!(parse_id("testbed.lock"), None);
        assert_eq!(parse_id("v1-abc-0"), None);
    }
}
