//! The kernel and what is mounted.

use std::{fs, io::ErrorKind, net::TcpListener, path::Path};

use aya::util::KernelVersion;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::row::{Check, Row};
use crate::{
    capture::{
        Reason,
        records::{self, Record},
        unguarded_interfaces,
    },
    cli::cgroup::{self, Hierarchy},
};

/// Oldest kernel with every hook and helper the programs use: `bpf_get_netns_cookie` in sockops came last, with 5.15.
const OLDEST: (u8, u8) = (5, 15);
/// Oldest kernel that is tested.
const OLDEST_TESTED: (u8, u8) = (6, 1);

pub(super) fn kernel() -> Row {
    let check = Check("kernel", true);
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let Ok(version) = KernelVersion::current() else {
        return check.missing(format!("cannot tell the version of {release:?}"), "run on Linux, with /proc mounted");
    };
    let at_least = |(major, minor): (u8, u8)| version >= KernelVersion::new(major, minor, 0);
    if !at_least(OLDEST) {
        check.missing(release, format!("upgrade to Linux {}.{} or newer", OLDEST_TESTED.0, OLDEST_TESTED.1))
    } else if !at_least(OLDEST_TESTED) {
        check.degraded(
            release,
            format!("works as far as the rows below say; tested from {}.{}", OLDEST_TESTED.0, OLDEST_TESTED.1),
        )
    } else {
        check.ok(release)
    }
}

pub(super) fn cgroup() -> Row {
    let check = Check("cgroup", true);
    match Hierarchy::find() {
        Ok(h) => {
            let kind = if h.unified { "unified" } else { "hybrid, beside cgroup v1" };
            check.ok(format!("v2 at {} ({kind})", h.mount.display()))
        }
        Err(e) => check.missing(e, "mount it: mount -t cgroup2 none /sys/fs/cgroup/unified"),
    }
}

/// Pods that vanished without leaving the mesh. Read from what is pinned, so also without an agent.
pub(super) fn kept_pods(pin_root: &Path) -> Row {
    /// Most that are named.
    const NAMED: usize = 5;
    let check = Check("kept-pods", false);
    match records::kept(pin_root) {
        Ok(kept) if kept.is_empty() => check.ok("none"),
        Ok(kept) => {
            let name = |(record, reason): &(Record, Reason)| {
                let name = record.key().map_or_else(|| "unknown".to_owned(), |key| key.to_string());
                format!("{name} ({})", reason.as_str())
            };
            let names: Vec<_> = kept.iter().take(NAMED).map(name).collect();
            let more = if kept.len() > NAMED { ", ..." } else { "" };
            check.degraded(
                format!("{}: {}{more}", kept.len(), names.join(", ")),
                "they stay captured and their connections are refused, until they are taken out of the mesh or are gone",
            )
        }
        Err(e) => check.missing(e, "run as root"),
    }
}

pub(super) fn attach_point(asked: Option<&Path>) -> Row {
    // Not required: `run` can be given another directory than this check was.
    let check = Check("attach-point", asked.is_some());
    match cgroup::attach_point(asked) {
        Ok(path) => check.ok(path.display()),
        Err(e) => check.missing(format!("{e:#}"), "give the directory above the pods' cgroups with --cgroup"),
    }
}

pub(super) fn btf() -> Row {
    const PATH: &str = "/sys/kernel/btf/vmlinux";
    let check = Check("btf", false);
    match fs::metadata(PATH) {
        Ok(m) => check.ok(format!("{PATH}, {} KiB", m.len() / 1024)),
        Err(e) => check.degraded(format!("{PATH}: {e}"), "programs that need no kernel types, which is all of today's"),
    }
}

pub(super) fn bpffs(pin_root: &Path) -> Row {
    let check = Check("bpffs", true);
    let Some(existing) = pin_root.ancestors().find(|p| p.exists()) else {
        return check.missing(format!("{} has no existing parent", pin_root.display()), "give an absolute --pin-root");
    };
    if statfs(existing).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC) {
        return check.ok(format!("{} is on bpffs", pin_root.display()));
    }
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !known.lines().any(|l| l.split_whitespace().last() == Some("bpf")) {
        return check.missing("the kernel has no bpf file system", "use a kernel with CONFIG_BPF_SYSCALL");
    }
    check.degraded(
        format!("{} is not on bpffs, but the kernel has it", pin_root.display()),
        "it has to be mounted first: mount -t bpf bpf /sys/fs/bpf",
    )
}

pub(super) fn lsm() -> Row {
    const PATH: &str = "/sys/kernel/security/lsm";
    const INSTEAD: &str = "the relay, which needs no LSM programs";
    let check = Check("bpf-lsm", false);
    match fs::read_to_string(PATH) {
        Ok(list) if list.trim().split(',').any(|l| l == "bpf") => check.ok(list.trim()),
        Ok(list) => check.degraded(format!("not among the active ones: {}", list.trim()), INSTEAD),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            check.degraded(format!("{PATH} is not there (securityfs not mounted, or no LSM)"), INSTEAD)
        }
        Err(e) => check.degraded(format!("{PATH}: {e}"), INSTEAD),
    }
}

/// Interfaces that no guard on the node's side can be put on.
pub(super) fn node_guard() -> Row {
    const SHOWN: usize = 5;
    let check = Check("node-guard", false);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let (namespaces, bare) = match runtime {
        Ok(runtime) => runtime.block_on(unguarded_interfaces()),
        Err(e) => {
            return check.failed("looking at the network namespaces", &e, "raise the limits of threads and files");
        }
    };
    if bare.is_empty() {
        return check
            .ok(format!("the interfaces of {namespaces} network namespaces have their other end on this node"));
    }
    let mut shown: Vec<_> =
        bare.iter().take(SHOWN).map(|(path, name, kind)| format!("{name} ({kind}) of {}", path.display())).collect();
    if bare.len() > SHOWN {
        shown.push(format!("{} more", bare.len() - SHOWN));
    }
    check.missing(
        format!("no end on this node: {}", shown.join(", ")),
        "a pod with such an interface has only the guard inside the pod, which root in the pod can go around: give pods veth or \
         netkit, or no CAP_NET_ADMIN and CAP_NET_RAW",
    )
}

pub(super) fn ipv6() -> Row {
    let check = Check("ipv6", false);
    match TcpListener::bind("[::1]:0") {
        Ok(_) => check.ok("TCP on ::1 works"),
        Err(e) => check
            .degraded(format!("TCP on ::1: {e}"), "IPv4 only; pods whose namespace has IPv6 keep it where it works"),
    }
}

pub(super) fn fwmark_accept() -> Row {
    const PATH: &str = "/proc/sys/net/ipv4/tcp_fwmark_accept";
    let check = Check("fwmark-accept", true);
    match fs::read_to_string(PATH) {
        Ok(value) => check.ok(format!("net.ipv4.tcp_fwmark_accept is there (here {}; set in each pod)", value.trim())),
        Err(e) => check.missing(
            format!("{PATH}: {e}"),
            "mount /proc, or use Linux 4.1 or newer: replies to preserved client addresses are routed by it",
        ),
    }
}
