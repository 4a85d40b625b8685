//! What container runtimes keep from containers that are not privileged, for an agent that has the capabilities anyway.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::Path,
    sync::OnceLock,
};

use nix::sched::{CloneFlags, setns};
use rustix::{
    fs::{Mode, OFlags, openat},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
};

/// Process 1 is the host's when the container shares its process numbers; otherwise this is the container's own namespace. Some let
/// nobody look at it: then the kernel's own process, which comes second.
const HOSTS: [&str; 2] = ["/proc/1/ns/cgroup", "/proc/2/ns/cgroup"];
const OURS: &str = "/proc/thread-self/ns/cgroup";

/// Puts the calling thread, and those that it starts, into the host's cgroup namespace: runtimes give containers one of their own with
/// cgroup v2, in which the pods' cgroups have no path. Whether it was in another one.
///
/// # Errors
///
/// Without `CAP_SYS_ADMIN`, or `CAP_SYS_PTRACE` where process 1 may do more than the agent.
pub fn join_hosts_cgroup_namespace() -> io::Result<bool> {
    let [first, second] = HOSTS;
    let hosts = File::open(first).or_else(|error| File::open(second).map_err(|_| error))?;
    let id = |meta: fs::Metadata| (meta.dev(), meta.ino());
    if id(fs::metadata(OURS)?) == id(hosts.metadata()?) {
        return Ok(false);
    }
    setns(hosts, CloneFlags::CLONE_NEWCGROUP)?;
    Ok(true)
}

/// Writes a setting of the kernel, a file below `/proc` or `/sys`, also where these are mounted read-only as runtimes do: then through a
/// mount of the same file system that only this process has. For `/proc/sys/net` the calling thread's network namespace counts.
///
/// # Errors
///
/// Those of writing, and those of mounting: without `CAP_SYS_ADMIN` what is read-only stays so.
pub fn write_setting(path: &Path, value: &str) -> io::Result<()> {
    match fs::write(path, value) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            let (mount, below) = own_mount(path)?.ok_or(error)?;
            let file = openat(mount, below, OFlags::WRONLY | OFlags::TRUNC | OFlags::CLOEXEC, Mode::empty())?;
            File::from(file).write_all(value.as_bytes())
        }
        written => written,
    }
}

/// The mount for a path, made when it is needed first, and the path below it. `None` elsewhere than below `/proc` and `/sys`.
fn own_mount(path: &Path) -> io::Result<Option<(&'static OwnedFd, &Path)>> {
    static PROC: OnceLock<OwnedFd> = OnceLock::new();
    static SYS: OnceLock<OwnedFd> = OnceLock::new();
    for (prefix, kind, mount) in [("/proc", "proc", &PROC), ("/sys", "sysfs", &SYS)] {
        let Ok(below) = path.strip_prefix(prefix) else { continue };
        if mount.get().is_none() {
            // Two threads at once make two, of which one is used.
            let _ = mount.set(make(kind)?);
        }
        return Ok(mount.get().map(|mount| (mount, below)));
    }
    Ok(None)
}

/// Mounts a file system nowhere: it goes with its descriptor.
fn make(kind: &str) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let harmless =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, harmless)?)
}

#[cfg(test)]
mod tests {
    use nix::{
        mount::{MsFlags, mount},
        sched::unshare,
    };

    use super::*;

    /// On a thread of its own, which takes its namespaces along when it ends.
    fn alone(test: impl FnOnce() + Send + 'static) {
        std::thread::spawn(test).join().expect("the test on its thread");
    }

    #[test]
    fn the_hosts_cgroup_namespace_is_joined_once() {
        alone(|| {
            unshare(CloneFlags::CLONE_NEWCGROUP).expect("root");
            assert!(join_hosts_cgroup_namespace().expect("joining"));
            assert!(!join_hosts_cgroup_namespace().expect("joined already"));
        });
    }

    #[test]
    fn settings_are_written_where_they_are_mounted_read_only() {
        alone(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("root");
            let none: Option<&str> = None;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("mounts of our own");
            let sysctls = "/proc/sys";
            mount(Some(sysctls), sysctls, none, MsFlags::MS_BIND, none).expect("bind mount");
            let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(none, sysctls, none, read_only, none).expect("read-only");

            let setting = Path::new("/proc/sys/net/ipv4/tcp_fwmark_accept");
            let value = || fs::read_to_string(setting).expect("readable");
            assert_eq!(value(), "0\n", "a new network namespace");
            let error = fs::write(setting, "1").expect_err("read-only");
            assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
            write_setting(setting, "1").expect("written");
            assert_eq!(value(), "1\n");
            // Neither is invented: what the kernel refuses, and what it does not have.
            assert!(write_setting(setting, "no number").is_err());
            assert!(write_setting(Path::new("/proc/sys/net/ipv4/no_such_setting"), "1").is_err());
            assert_eq!(value(), "1\n");
        });
        let elsewhere = fs::read_to_string("/proc/sys/net/ipv4/tcp_fwmark_accept").expect("readable");
        assert_eq!(elsewhere, "0\n", "the namespace of others");
    }
}
