//! What this process may do. The agent has the same rights when it is started the same way.

use aya::util::KernelVersion;
use caps::{CapSet, Capability};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::row::{Check, Row};

/// Without these the agent cannot work.
const NEEDED: [(Capability, &str); 3] = [
    (Capability::CAP_BPF, "programs and maps"),
    (Capability::CAP_NET_ADMIN, "tc, cgroup hooks, routes, transparent sockets"),
    (Capability::CAP_SYS_ADMIN, "entering the pods' network namespaces"),
];
/// Without these it works, with less.
const WANTED: [(Capability, &str); 3] = [
    (Capability::CAP_PERFMON, "log lines of the BPF programs"),
    (
        Capability::CAP_SYS_PTRACE,
        "naming the process that holds an agent port, and seeing processes outside a pod's cgroup",
    ),
    (Capability::CAP_SYS_RESOURCE, "raising the limit of open files"),
];

/// Open files per connection: two sockets and, while bulk data moves, two pipes.
const FILES_PER_CONNECTION: u64 = 6;
/// Below this many connections at once a node is likely to notice.
const COMFORTABLE: u64 = 40_000;

pub(super) fn capabilities() -> Row {
    let check = Check("capabilities", true);
    let have = match caps::read(None, CapSet::Effective) {
        Ok(have) => have,
        Err(e) => return check.missing(format!("cannot be read: {e}"), "mount /proc and run as root"),
    };
    let lacking = |list: &[(Capability, &str)]| -> Vec<String> {
        list.iter()
            .filter(|(c, _)| !have.contains(c))
            // CAP_SYS_ADMIN includes what CAP_BPF and CAP_PERFMON were split from.
            .filter(|(c, _)| {
                !(matches!(c, Capability::CAP_BPF | Capability::CAP_PERFMON)
                    && have.contains(&Capability::CAP_SYS_ADMIN))
            })
            .map(|(c, what)| format!("{c} ({what})"))
            .collect()
    };
    let (needed, wanted) = (lacking(&NEEDED), lacking(&WANTED));
    if !needed.is_empty() {
        return check.missing(
            format!("missing: {}", needed.join(", ")),
            "run as root, or add them to the container's securityContext",
        );
    }
    if !wanted.is_empty() {
        return check.degraded(format!("missing: {}", wanted.join(", ")), "the agent without what they are for");
    }
    check.ok("all that the agent uses")
}

pub(super) fn memlock() -> Row {
    let check = Check("memlock", true);
    // Since 5.11 BPF memory is charged to the cgroup instead.
    if KernelVersion::current().is_ok_and(|v| v >= KernelVersion::new(5, 11, 0)) {
        return check.ok("not limited: BPF memory is charged to the agent's cgroup");
    }
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((_, RLIM_INFINITY)) => check.ok("RLIMIT_MEMLOCK can be unlimited"),
        Ok((soft, hard)) => {
            check.missing(format!("RLIMIT_MEMLOCK is {soft} bytes, at most {hard}"), "start with: ulimit -l unlimited")
        }
        Err(e) => check.missing(format!("RLIMIT_MEMLOCK: {e}"), "start with: ulimit -l unlimited"),
    }
}

pub(super) fn open_files() -> Row {
    let check = Check("open-files", false);
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) => {
            let connections = hard / FILES_PER_CONNECTION;
            let found = format!("RLIMIT_NOFILE {soft}, at most {hard}: about {connections} connections at once");
            if connections >= COMFORTABLE {
                check.ok(found)
            } else {
                check.degraded(found, "connections beyond that are refused; raise it with ulimit -n or LimitNOFILE=")
            }
        }
        Err(e) => check.degraded(format!("RLIMIT_NOFILE: {e}"), "whatever it is"),
    }
}
