//! What the machine is and how it is set up.

use std::{fmt::Write as _, fs, path::Path};

/// Settings that decide how the agent and its connections fare, below `/proc/sys`.
const SETTINGS: [&str; 22] = [
    "fs/file-max",
    "fs/file-nr",
    "fs/nr_open",
    "kernel/bpf_stats_enabled",
    "kernel/pid_max",
    "kernel/threads-max",
    "kernel/unprivileged_bpf_disabled",
    "net/core/bpf_jit_enable",
    "net/core/rmem_max",
    "net/core/somaxconn",
    "net/core/wmem_max",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/tcp_congestion_control",
    "net/ipv4/tcp_fwmark_accept",
    "net/ipv4/tcp_keepalive_time",
    "net/ipv4/tcp_max_syn_backlog",
    "net/ipv4/tcp_rmem",
    "net/ipv4/tcp_wmem",
    "net/ipv6/conf/all/disable_ipv6",
    "net/ipv6/conf/all/forwarding",
];
/// Files that say what the machine is and what runs into limits.
const FILES: [&str; 12] = [
    "/proc/sys/kernel/osrelease",
    "/proc/version",
    "/etc/os-release",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/pressure/cpu",
    "/proc/pressure/memory",
    "/proc/net/tls_stat",
    "/proc/net/sockstat",
    "/proc/net/netstat",
    "/sys/fs/cgroup/cgroup.controllers",
];

/// The kernel, its load and its statistics.
pub(super) fn kernel() -> String {
    let mut text = String::new();
    for path in FILES {
        let _ = writeln!(text, "# {path}\n{}", read(Path::new(path)));
    }
    text
}

/// Settings as `name = value`.
pub(super) fn settings() -> String {
    let mut text = String::new();
    for name in SETTINGS {
        let _ = writeln!(text, "{name} = {}", read(&Path::new("/proc/sys").join(name)));
    }
    text
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).map_or_else(|e| format!("({e})"), |text| text.trim_end().to_owned())
}
