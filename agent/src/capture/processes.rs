//! Processes of a pod, as `/proc` shows them.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Component, Path, PathBuf},
};

use super::{EnrollError, netns::Netns};

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
    let mounts =
        fs::read_to_string("/proc/self/mountinfo").map_err(|error| setup("read /proc/self/mountinfo", &error))?;
    let attach_real = fs::canonicalize(attach).map_err(|error| EnrollError::Setup {
        action: "find the attach point",
        reason: format!("{}: {error}", attach.display()),
    })?;
    let below = cgroup_of(&mounts, &attach_real)?;
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

/// The cgroup v2 path of a directory on a cgroup2 mount, as `/proc/PID/cgroup` would write it.
fn cgroup_of(mountinfo: &str, directory: &Path) -> Result<PathBuf, EnrollError> {
    let refuse = |reason: String| EnrollError::Setup { action: "find the attach point", reason };
    let mount = mountinfo
        .lines()
        .filter_map(cgroup2_mount)
        .filter(|(_, point)| directory.starts_with(point))
        .max_by_key(|(_, point)| point.components().count());
    let (root, point) = mount.ok_or_else(|| {
        refuse(format!("{} is not on a cgroup v2 file system; give --cgroup a directory of one", directory.display()))
    })?;
    // Both are shown relative to the cgroup namespace of the reader, and a path that leads out of it cannot be compared.
    if root.components().any(|component| component == Component::ParentDir) {
        return Err(refuse(format!(
            "{} lies outside the agent's cgroup namespace; run the agent in the host's (privileged)",
            directory.display()
        )));
    }
    Ok(root.join(directory.strip_prefix(&point).unwrap_or(Path::new(""))))
}

/// Root and mount point of a cgroup2 line of mountinfo (`proc_pid_mountinfo(5)`).
fn cgroup2_mount(line: &str) -> Option<(PathBuf, PathBuf)> {
    let (mount, super_block) = line.split_once(" - ")?;
    if super_block.split(' ').next() != Some("cgroup2") {
        return None;
    }
    let mut fields = mount.split(' ').skip(3);
    Some((unescape(fields.next()?), unescape(fields.next()?)))
}

/// Undoes the octal escapes of mountinfo: space, tab, newline and backslash.
fn unescape(field: &str) -> PathBuf {
    let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    escapes.iter().fold(field.to_owned(), |text, (escape, character)| text.replace(escape, character)).into()
}

fn setup(action: &'static str, error: &dyn std::error::Error) -> EnrollError {
    EnrollError::Setup { action, reason: error.to_string() }
}

#[cfg(test)]
#[path = "netns_tests/processes.rs"]
mod tests;
