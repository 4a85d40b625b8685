//! Makes a machine out of an initramfs: file systems, limits, the loopback interface.

use std::{fs, os::unix::fs::symlink, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use nix::{
    mount::{MsFlags, mount},
    sys::{
        resource::{RLIM_INFINITY, Resource, setrlimit},
        stat::{Mode, SFlag, makedev, mknod},
    },
    unistd::sethostname,
};
use vm_guest::PROGRAMS;

/// File systems in the order of mounting: type and mount point. Everything else is in the initramfs, which is a file system in
/// memory already; one over `/tmp` could hide the tests, which are where they were built.
const MOUNTS: &[(&str, &str)] = &[
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("devpts", "/dev/pts"),
    ("tmpfs", "/dev/shm"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("bpf", "/sys/fs/bpf"),
    ("securityfs", "/sys/kernel/security"),
    ("tracefs", "/sys/kernel/tracing"),
];
/// What is udev's work elsewhere: names of a program's own descriptors.
const LINKS: &[(&str, &str)] = &[
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
];
/// Tunnels; the number is in the kernel's list of devices.
const TUN: &str = "/dev/net/tun";
/// Descriptors of a process, as many as container runtimes and services usually give.
const OPEN_FILES: u64 = 100_000;

pub(crate) fn prepare() -> Result<()> {
    for (kind, point) in MOUNTS {
        // Directories of sysfs exist or not; they cannot be made.
        if !Path::new(point).is_dir() {
            fs::create_dir_all(point).with_context(|| format!("creating {point}"))?;
        }
        mount(Some(*kind), *point, Some(*kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting {kind} at {point}"))?;
    }
    for (name, to) in LINKS {
        symlink(to, name).with_context(|| format!("creating {name}"))?;
    }
    fs::create_dir_all("/dev/net").context("creating /dev/net")?;
    // Opening it loads the module, as with the nodes that kmod makes on other machines.
    mknod(TUN, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(10, 200))
        .with_context(|| format!("creating {TUN}"))?;
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES).context("raising the limit of open files")?;
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).context("raising the limit of locked memory")?;
    sethostname("vm").context("setting the host name")?;
    let status = Command::new("ip").args(["link", "set", "lo", "up"]).env("PATH", PROGRAMS).status();
    ensure!(status.context("running ip")?.success(), "`ip link set lo up` failed; its message is on the console");
    Ok(())
}
