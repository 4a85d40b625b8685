//! BPF hooks, maps and helpers, tried with programs of two instructions.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd as _,
    path::PathBuf,
    thread,
};

use aya::{
    maps::MapType,
    programs::{ProgramType, tc::qdisc_add_clsact},
    sys::{BpfHelper, is_helper_supported, is_map_supported},
};
use nix::sched::{CloneFlags, unshare};

use super::row::{Check, Row};
use crate::{
    cli::cgroup::Hierarchy,
    sys::bpf_probe::{AttachKind, ProgramKind, Target, attach, load},
};

/// Index of `lo` in every network namespace (`LOOPBACK_IFINDEX` of the kernel).
const LOOPBACK: u32 = 1;

/// How a tc probe that worked was done.
const DONE: &str = "tried in a namespace of its own, ingress and egress";

/// What to do about a kernel that lacks a hook.
const UPGRADE: &str = "use Linux 6.1 or newer with CONFIG_CGROUP_BPF and CONFIG_BPF_SYSCALL";

/// An empty cgroup to attach to; removed when dropped.
struct ProbeCgroup(PathBuf);

impl ProbeCgroup {
    fn new() -> Result<Self, String> {
        let mount = Hierarchy::find().map_err(|e| e.to_string())?.mount;
        let path = mount.join(format!("underpass-check-{}", std::process::id()));
        fs::create_dir(&path).map_err(|e| format!("creating {}: {e}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for ProbeCgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

pub(super) fn hooks() -> Vec<Row> {
    use AttachKind::{
        Inet4Connect, Inet4GetPeerName, Inet4GetSockName, Inet6Connect, Inet6GetPeerName, Inet6GetSockName, SockOps,
    };
    let cgroup = ProbeCgroup::new().and_then(|c| match File::open(&c.0) {
        Ok(f) => Ok((f, c)),
        Err(e) => Err(format!("opening {}: {e}", c.0.display())),
    });
    let addr = ProgramKind::CgroupSockAddr;
    [
        (Check("connect-hooks", true), addr, &[Inet4Connect, Inet6Connect][..], "connect4, connect6"),
        (
            Check("name-hooks", true),
            addr,
            &[Inet4GetPeerName, Inet6GetPeerName, Inet4GetSockName, Inet6GetSockName],
            "getpeername, getsockname, IPv4 and IPv6",
        ),
        (Check("sockops", true), ProgramKind::SockOps, &[SockOps], "TCP events"),
    ]
    .into_iter()
    .map(|(check, kind, attachments, names)| {
        for &a in attachments {
            let program = match load(kind, a) {
                Ok(p) => p,
                Err(e) => return check.failed(format!("loading a program for {a:?}"), &e, UPGRADE),
            };
            if let Ok((file, _)) = &cgroup
                && let Err(e) = attach(&program, Target::Cgroup(file.as_fd()), a)
            {
                return check.failed(format!("attaching a program for {a:?}"), &e, UPGRADE);
            }
        }
        match &cgroup {
            Ok(_) => check.ok(format!("{names}: loaded and attached")),
            Err(why) => check.degraded(format!("{names}: loaded, attaching not tried ({why})"), "`run` finds out"),
        }
    })
    .collect()
}

pub(super) fn maps() -> Vec<Row> {
    [("socket-storage", MapType::SkStorage), ("ring-buffer", MapType::RingBuf), ("lpm-trie", MapType::LpmTrie)]
        .into_iter()
        .map(|(name, kind)| {
            let check = Check(name, true);
            match is_map_supported(kind) {
                Ok(true) => check.ok("map created"),
                Ok(false) => check.missing("the kernel refuses the map type", UPGRADE),
                Err(e) => check.failed("creating a map", &e.io_error, UPGRADE),
            }
        })
        .collect()
}

pub(super) fn helpers() -> Vec<Row> {
    [
        ("netns-cookie", ProgramType::SockOps, BpfHelper::BPF_FUNC_get_netns_cookie, "bpf_get_netns_cookie in sockops"),
        ("sk-assign", ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_sk_assign, "bpf_sk_assign in tc"),
    ]
    .into_iter()
    .map(|(name, kind, helper, what)| {
        let check = Check(name, true);
        match is_helper_supported(kind, helper) {
            Ok(true) => check.ok(format!("{what}: known")),
            Ok(false) => check.missing(format!("{what}: unknown to the kernel"), UPGRADE),
            Err(e) => check.missing(format!("{what}: {e}"), "run as root, or with the capabilities listed below"),
        }
    })
    .collect()
}

/// tcx and clsact, on `lo` of a network namespace that exists only for this.
pub(super) fn tc() -> [Row; 2] {
    let tried = thread::spawn(|| -> io::Result<(io::Result<()>, io::Result<()>)> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let program = load(ProgramKind::SchedCls, AttachKind::TcxIngress)?;
        let tcx = [AttachKind::TcxIngress, AttachKind::TcxEgress]
            .into_iter()
            .try_for_each(|a| attach(&program, Target::Interface(LOOPBACK), a).map(drop));
        let clsact = qdisc_add_clsact("lo").map_err(|e| io::Error::other(e.to_string()));
        Ok((tcx, clsact))
    })
    .join()
    .unwrap_or_else(|_| Err(io::Error::other("the probe panicked")));

    let (tcx, clsact) = match tried {
        Ok(tried) => tried,
        Err(e) => {
            let what = "a tc program in a namespace of its own";
            return [Check("tcx", true).failed(what, &e, UPGRADE), Check("clsact", false).failed(what, &e, UPGRADE)];
        }
    };
    // One of the two is needed; whichever is missing is required only when the other is too.
    match (tcx, clsact) {
        (Ok(()), Ok(())) => {
            [Check("tcx", false).ok(DONE), Check("clsact", false).ok("tried in a namespace of its own")]
        }
        (Ok(()), Err(e)) => [
            Check("tcx", false).ok(DONE),
            Check("clsact", false).degraded(format!("adding the qdisc: {e}"), "tcx, which is there"),
        ],
        (Err(e), Ok(())) => [
            Check("tcx", false).degraded(format!("attaching: {e} (it came with Linux 6.6)"), "clsact filters"),
            Check("clsact", true).ok("tried in a namespace of its own"),
        ],
        (Err(t), Err(c)) => [
            Check("tcx", true)
                .missing(format!("attaching: {t}"), "use Linux 6.6 or newer, or load sch_ingress for clsact"),
            Check("clsact", true)
                .missing(format!("adding the qdisc: {c}"), "load the module: modprobe sch_ingress cls_bpf"),
        ],
    }
}
