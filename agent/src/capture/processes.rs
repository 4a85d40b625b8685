//! Processes of a pod, as `/proc` shows them.

use std::{collections::BTreeSet, fs, io, path::Path};

use super::{EnrollError, hierarchy::Mount, netns::Netns};

/// Checks that every process in the pod's namespace has its cgroup at or below `attach`, where the connect hooks are: others would
/// connect past them (and be stopped by the egress guard). Processes that end meanwhile do not count. Only processes visible in
/// the agent's PID namespace are seen, and each by its main thread.
pub async fn check_below(netns: &Netns, attach: &Path) -> Result<(), EnrollError> {
    let (netns, attach) = (netns.clone(), attach.to_owned());
    tokio::task::spawn_blocking(move || check(&netns, &attach))
        .await
        .unwrap_or_else(|error| Err(setup("look for the pod's processes in /proc", &error)))
}

fn check(netns: &Netns, attach: &Path) -> Result<(), EnrollError> {
    let refuse = |reason| EnrollError::Setup { action: "find the attach point", reason };
    let attach_real = fs::canonicalize(attach).map_err(|error| refuse(format!("{}: {error}", attach.display())))?;
    let below = Mount::of(&attach_real).map_err(refuse)?.cgroup(&attach_real);
    for pid in pids().map_err(|error| setup("list /proc", &error))? {
        let process = Path::new("/proc").join(pid.to_string());
        // Gone, a zombie, or a kernel thread without a namespace.
        let Ok(namespace) = fs::metadata(process.join("ns/net")) else { continue };
        if !netns.is(&namespace) {
            continue;
        }
        let Ok(cgroups) = fs::read_to_string(process.join("cgroup")) else { continue };
        let cgroup = v2_path(&cgroups);
        if cgroup.is_some_and(|cgroup| Path::new(cgroup).starts_with(&below)) {
            continue;
        }
        // A zombie keeps its cgroup line and loses its namespaces; one that died between the two reads makes no connections.
        if fs::metadata(process.join("ns/net")).is_err() {
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
