//! Processes of a pod, as `/proc` shows them.

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Instant,
};

use tokio::{sync::Mutex, task::spawn_blocking};

use super::{EnrollError, hierarchy::Mount, netns::Netns};

/// Processes by the device and inode of their network namespace.
type ByNamespace = HashMap<(u64, u64), Vec<i32>>;

/// Goes through `/proc` for all who want to know at the same time: on a node with a thousand pods, doing so for each of them alone is
/// most of what enrolling them costs.
#[derive(Default)]
pub struct Census {
    latest: Mutex<Option<Taken>>,
    /// Who wants one that is begun from now on, or the one that is being taken.
    waiting: AtomicUsize,
}

struct Taken {
    begun: Instant,
    processes: Arc<ByNamespace>,
}

/// One of those waiting. Nobody keeps the census when the last one has it.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, SeqCst);
        Self(waiting)
    }

    fn is_last(&self) -> bool {
        self.0.load(SeqCst) == 1
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Census {
    /// All processes, looked for after this was called.
    async fn take(&self) -> io::Result<Arc<ByNamespace>> {
        let asked = Instant::now();
        let waiting = Waiting::new(&self.waiting);
        let mut latest = self.latest.lock().await;
        let processes = match &*latest {
            Some(taken) if taken.begun >= asked => Arc::clone(&taken.processes),
            _ => {
                let begun = Instant::now();
                let processes = Arc::new(spawn_blocking(by_namespace).await.map_err(io::Error::other)??);
                *latest = Some(Taken { begun, processes: Arc::clone(&processes) });
                processes
            }
        };
        if waiting.is_last() {
            *latest = None;
        }
        Ok(processes)
    }
}

fn by_namespace() -> io::Result<ByNamespace> {
    let mut all = ByNamespace::new();
    for pid in pids()? {
        // Gone, a zombie, or a kernel thread without a namespace.
        let Ok(namespace) = fs::metadata(format!("/proc/{pid}/ns/net")) else { continue };
        all.entry((namespace.dev(), namespace.ino())).or_default().push(pid);
    }
    Ok(all)
}

/// Checks that every process in the pod's namespace has its cgroup at or below `attach`, where the connect hooks are: others would
/// connect past them (and be stopped by the egress guard). Processes that end meanwhile do not count. Only processes visible in
/// the agent's PID namespace are seen, and each by its main thread.
pub async fn check_below(census: &Census, netns: &Netns, attach: &Path) -> Result<(), EnrollError> {
    let processes = census.take().await.map_err(|error| setup("look for the pod's processes in /proc", &error))?;
    let (netns, attach) = (netns.clone(), attach.to_owned());
    spawn_blocking(move || check(&netns, &attach, processes.get(&netns.id()).map_or(&[], Vec::as_slice)))
        .await
        .unwrap_or_else(|error| Err(setup("look at the pod's processes", &error)))
}

fn check(netns: &Netns, attach: &Path, pids: &[i32]) -> Result<(), EnrollError> {
    let refuse = |reason| EnrollError::Setup { action: "find the attach point", reason };
    let attach_real = fs::canonicalize(attach).map_err(|error| refuse(format!("{}: {error}", attach.display())))?;
    let below = Mount::of(&attach_real).map_err(refuse)?.cgroup(&attach_real);
    for &pid in pids {
        let process = Path::new("/proc").join(pid.to_string());
        let Ok(cgroups) = fs::read_to_string(process.join("cgroup")) else { continue };
        let cgroup = v2_path(&cgroups);
        if cgroup.is_some_and(|cgroup| Path::new(cgroup).starts_with(&below)) {
            continue;
        }
        // A zombie keeps its cgroup line and loses its namespaces; one that died since makes no connections, and its number may be
        // another's.
        if !fs::metadata(process.join("ns/net")).is_ok_and(|namespace| netns.is(&namespace)) {
            continue;
        }
        return Err(EnrollError::OutsideCgroup {
            pid,
            command: command(&process),
            cgroup: cgroup.unwrap_or("(no cgroup v2)").to_owned(),
            attach: attach.to_owned(),
        });
    }
    Ok(())
}

/// Some process that has one of these sockets open, with its name.
pub(super) fn holder_of_any(inodes: &BTreeSet<u32>) -> Option<(i32, String)> {
    let wanted: BTreeSet<String> = inodes.iter().map(|inode| format!("socket:[{inode}]")).collect();
    pids().ok()?.into_iter().find_map(|pid| {
        let process = Path::new("/proc").join(pid.to_string());
        let open = fs::read_dir(process.join("fd")).ok()?;
        open.flatten()
            .filter_map(|descriptor| fs::read_link(descriptor.path()).ok())
            .any(|target| target.to_str().is_some_and(|target| wanted.contains(target)))
            .then(|| (pid, command(&process)))
    })
}

fn pids() -> io::Result<Vec<i32>> {
    Ok(fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

fn command(process: &Path) -> String {
    fs::read_to_string(process.join("comm")).map_or_else(|_| "?".to_owned(), |name| name.trim_end().to_owned())
}

/// The `0::` line of `/proc/PID/cgroup`, which also the hybrid hierarchy has.
fn v2_path(cgroups: &str) -> Option<&str> {
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
    // A cgroup that was removed under its last zombie.
    Some(path.strip_suffix(" (deleted)").unwrap_or(path))
}

fn setup(action: &'static str, error: &dyn std::error::Error) -> EnrollError {
    EnrollError::Setup { action, reason: error.to_string() }
}

#[cfg(test)]
#[path = "netns_tests/processes.rs"]
mod tests;
