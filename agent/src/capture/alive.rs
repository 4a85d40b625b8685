//! Whether the pod in a namespace is still there, although nobody lists it.
//!
//! The agent's own descriptors and listeners keep a namespace alive, so the kernel cannot be asked
//! whether it is gone. What can be seen is who could still use it: a process in it, a name to enter
//! it by, or a process in the pod's cgroup (which may be in a namespace of its own below, and hold
//! sockets of this one).

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::{netns::Netns, records::Record};

/// Directories in which namespaces have names.
const NAMED: [&str; 2] = ["/run/netns", "/var/run/netns"];
/// Mount tables in which namespaces are mounted under other names: the host's and the agent's.
const MOUNTS: [&str; 2] = ["/proc/1/mountinfo", "/proc/self/mountinfo"];

/// All that was there at one moment. One look answers for every pod.
pub struct Sighting {
    /// Device and inode of the namespaces that have a process or a name.
    namespaces: HashSet<(u64, u64)>,
    /// Inodes of those that are mounted somewhere.
    mounted: HashSet<u64>,
    /// Uids of the pods whose cgroups have processes.
    pods: HashSet<String>,
}

/// Looks at every process once. Blocks.
pub fn look() -> io::Result<Sighting> {
    let mut seen = Sighting { namespaces: HashSet::new(), mounted: HashSet::new(), pods: HashSet::new() };
    let mut cgroups = HashSet::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        if entry.file_name().to_str().is_none_or(|name| !name.bytes().all(|b| b.is_ascii_digit())) {
            continue;
        }
        let process = entry.path();
        // A zombie has no namespace any more. Its threads may: the cgroup tells.
        if let Ok(meta) = fs::metadata(process.join("ns/net")) {
            seen.namespaces.insert((meta.dev(), meta.ino()));
        }
        if let Ok(text) = fs::read_to_string(process.join("cgroup")) {
            cgroups.insert(text);
        }
    }
    let components = cgroups.iter().flat_map(|text| text.split(['/', '\n']));
    seen.pods.extend(components.filter_map(pod_uid));
    for directory in NAMED {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if let Ok(meta) = fs::metadata(entry.path()) {
                seen.namespaces.insert((meta.dev(), meta.ino()));
            }
        }
    }
    for table in MOUNTS {
        let table = fs::read_to_string(table).unwrap_or_default();
        seen.mounted.extend(table.lines().filter_map(mounted_namespace));
    }
    Ok(seen)
}

/// The uid in the name of the cgroup that the kubelet makes for a pod: `pod<uid>`, or
/// `...-pod<uid>.slice` with the systemd driver, which writes underscores.
fn pod_uid(name: &str) -> Option<String> {
    let (before, uid) = name.strip_suffix(".slice").unwrap_or(name).rsplit_once("pod")?;
    ((before.is_empty() || before.ends_with('-')) && !uid.is_empty()).then(|| uid.replace('_', "-"))
}

/// The inode of the network namespace that a line of mountinfo (`proc_pid_mountinfo(5)`) is about.
fn mounted_namespace(line: &str) -> Option<u64> {
    line.split(' ').nth(3)?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}

impl Sighting {
    /// Could the pod still use its namespace? `netns` is the namespace, where it was found.
    pub fn shows(&self, record: &Record, netns: Option<&Netns>) -> bool {
        let named =
            |netns: &Netns| fs::metadata(&record.netns).is_ok_and(|meta| is_foreign(&record.netns, &meta, netns));
        netns.is_some_and(|netns| {
            self.namespaces.contains(&netns.id()) || self.mounted.contains(&netns.inode()) || named(netns)
        }) || record.uid.as_ref().is_some_and(|uid| self.pods.contains(&uid.replace('_', "-")))
            || record.cgroup.as_ref().is_some_and(|cgroup| populated(cgroup))
    }
}

/// Does a path that is not the agent's own descriptor lead to the namespace? Records of older
/// agents have such paths.
fn is_foreign(path: &Path, meta: &fs::Metadata, netns: &Netns) -> bool {
    !path.starts_with("/proc/self") && netns.is(meta)
}

/// Has the cgroup, or one below, a process? One that is gone has none.
fn populated(cgroup: &Path) -> bool {
    let events: PathBuf = cgroup.join("cgroup.events");
    match fs::read_to_string(events) {
        Ok(text) => text.lines().any(|line| line == "populated 1"),
        Err(error) => error.kind() != io::ErrorKind::NotFound && error.raw_os_error() != Some(libc::ENODEV),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_pods_cgroups() {
        let uid = Some("8d2f-1".to_owned());
        assert_eq!((pod_uid("pod8d2f-1"), pod_uid("kubepods-burstable-pod8d2f_1.slice")), (uid.clone(), uid));
        for other in ["kubepods", "kubepods.slice", "tripod1", "pod", "system.slice"] {
            assert_eq!(pod_uid(other).filter(|uid| uid != "s"), None, "{other}");
        }
    }

    #[test]
    fn namespaces_in_a_mount_table() {
        let line = "1024 28 0:4 net:[4026532281] /run/docker/netns/x rw shared:9 - nsfs nsfs rw";
        assert_eq!(mounted_namespace(line), Some(4_026_532_281));
        assert_eq!(mounted_namespace("26 28 0:24 / /sys rw - sysfs sysfs rw"), None);
    }
}
