//! Control groups: the playground's directory in every hierarchy, of version 1 and 2.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::place::{NODES, Place};

/// Directory of the programs that are not in containers, in the hierarchy of version 2: they are found there even if no record names them.
const PROGRAMS: &str = "programs";
/// Files of a cpuset that have to be filled before a process can be in it (version 1).
const CPUSET: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];
/// How long killed processes may take to end, and how often they are looked at.
const END: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(20);

/// Makes the directories that the kubelets and the programs need.
pub(super) fn create(place: &Place) -> Result<()> {
    for hierarchy in version_1()? {
        make_version_1(&hierarchy, &hierarchy.join(place.cgroup()))?;
    }
    let root = version_2(place)?;
    for directory in [root.clone(), root.join(PROGRAMS)] {
        make(&directory)?;
    }
    // Where version 2 has controllers at all, a kubelet wants them in its own directory.
    let above = root.parent().context("a hierarchy has a root")?;
    for directory in [above, &root] {
        let controllers = fs::read_to_string(directory.join("cgroup.controllers")).unwrap_or_default();
        for controller in controllers.split_whitespace() {
            let path = directory.join("cgroup.subtree_control");
            fs::write(&path, format!("+{controller}")).with_context(|| format!("writing {}", path.display()))?;
        }
    }
    NODES.iter().try_for_each(|node| create_node(place, node))
}

/// Makes the directories of one node: for its pods in all hierarchies, for its programs in that of version 2.
pub(super) fn create_node(place: &Place, node: &str) -> Result<()> {
    for hierarchy in version_1()? {
        make_version_1(&hierarchy, &hierarchy.join(place.cgroup()).join(node))?;
    }
    let root = version_2(place)?;
    make(&root.join(node))?;
    make(&root.join(PROGRAMS).join(node))
}

/// Kills every process of a node and removes its directories.
pub(super) fn remove_node(place: &Place, node: &str) -> Result<()> {
    let root = version_2(place)?;
    // Programs first: they would start containers again.
    testbed::remove_cgroup(&root.join(PROGRAMS).join(node))?;
    testbed::remove_cgroup(&root.join(node))?;
    for hierarchy in version_1()? {
        remove_version_1(&hierarchy.join(place.cgroup()).join(node))?;
    }
    Ok(())
}

/// The file that a program writes its number to: one of a node, or of none.
pub(super) fn entrance(place: &Place, node: Option<&str>) -> Result<PathBuf> {
    Ok(version_2(place)?.join(PROGRAMS).join(node.unwrap_or_default()).join("cgroup.procs"))
}

/// Where the programs that are not in containers are, as `/proc/PID/cgroup` has it.
pub(super) fn programs(place: &Place) -> PathBuf {
    Path::new("/").join(place.cgroup()).join(PROGRAMS)
}

/// Where a node's pods are in the hierarchy of version 2.
pub(super) fn pods(place: &Place, node: &str) -> Result<PathBuf> {
    Ok(version_2(place)?.join(node).join("kubepods"))
}

/// Kills every process of the playground and removes its directories.
pub(super) fn remove(place: &Place) -> Result<()> {
    // Containers are in all hierarchies, so this ends them, too.
    let mut removed = testbed::remove_cgroup(&version_2(place)?);
    for hierarchy in version_1()? {
        removed = removed.and(remove_version_1(&hierarchy.join(place.cgroup())));
    }
    removed
}

/// Makes a directory in a hierarchy of version 1 that processes can be in.
fn make_version_1(hierarchy: &Path, directory: &Path) -> Result<()> {
    make(directory)?;
    for file in CPUSET.iter().filter(|file| hierarchy.join(file).exists()) {
        let value = fs::read_to_string(hierarchy.join(file)).context("reading a cpuset")?;
        let path = directory.join(file);
        fs::write(&path, value.trim()).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn make(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))
}

fn version_2(place: &Place) -> Result<PathBuf> {
    Ok(testbed::cgroup_mount_point()?.join(place.cgroup()))
}

fn version_1() -> Result<Vec<PathBuf>> {
    Ok(hierarchies(&fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?))
}

/// Where hierarchies of version 1 are mounted, each once.
fn hierarchies(mounts: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (directory, kind) = (fields.next()?, fields.next()?);
            (kind == "cgroup").then(|| directory.into())
        })
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

fn remove_version_1(root: &Path) -> Result<()> {
    if !root.exists() {
        return Ok(());
    }
    let deadline = Instant::now() + END;
    loop {
        let processes = processes(root);
        if processes.is_empty() {
            break;
        }
        ensure!(
            Instant::now() < deadline,
            "processes in {} survive SIGKILL for {END:?}: {processes:?}",
            root.display()
        );
        for pid in processes {
            // It may be ending already.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        // Version 1 has no way to wait for a control group to become empty.
        std::thread::sleep(LOOK);
    }
    remove_tree(root)
}

/// Processes in a directory and below.
fn processes(directory: &Path) -> Vec<i32> {
    let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    let mut found: Vec<_> = text.lines().filter_map(|line| line.parse().ok()).collect();
    found.extend(below(directory).iter().flat_map(|directory| processes(directory)));
    found
}

fn remove_tree(directory: &Path) -> Result<()> {
    for directory in below(directory) {
        remove_tree(&directory)?;
    }
    fs::remove_dir(directory).with_context(|| format!("removing control group {}", directory.display()))
}

fn below(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::hierarchies;

    #[test]
    fn hierarchies_of_version_1() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(hierarchies(mounts), ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/systemd"].map(PathBuf::from));
        assert!(hierarchies("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n").is_empty());
    }
}
