//! Which modules of a kernel go into the test machine.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::exec;

/// Directories and files below `kernel/`, without the ending. What a kernel has built in or calls otherwise is not missing:
/// tests show what is.
const WANTED: &[&str] = &[
    // Kernel TLS and every cipher that it can use; the agent loads them itself.
    "net/tls",
    "crypto",
    "arch/x86/crypto",
    "lib",
    // Networks of the testbed.
    "drivers/net/veth",
    "drivers/net/dummy",
    "drivers/net/macvlan",
    "drivers/net/tun",
    "net/bridge/bridge",
    "net/802",
    "net/8021q/8021q",
    "net/llc",
    "net/sched/sch_ingress",
    "net/sched/cls_bpf",
    "net/sched/act_bpf",
    "net/sched/sch_netem",
    // Listing sockets.
    "net/ipv4/inet_diag",
    "net/ipv4/tcp_diag",
    "net/ipv4/udp_diag",
    "net/mptcp/mptcp_diag",
    "net/unix/unix_diag",
    "net/netlink/netlink_diag",
    // What benchmarks compare with.
    "drivers/net/wireguard",
    "net/ipv4/udp_tunnel",
    "net/ipv6/ip6_udp_tunnel",
];
/// Lists that depmod and modprobe read.
const LISTS: &[&str] = &["modules.builtin", "modules.builtin.modinfo", "modules.order"];

/// What is appended to the version of a prepared kernel, so that one prepared with other modules is not taken for it.
pub(super) fn edition() -> String {
    let mut hasher = DefaultHasher::new();
    WANTED.hash(&mut hasher);
    format!("-modules-{:08x}", hasher.finish() as u32)
}

/// Copies the wanted modules of a release to `<root>/lib/modules/<name>`, decompressed.
pub(super) fn select(release: &Path, root: &Path, name: &str) -> Result<()> {
    let into = root.join("lib/modules").join(name);
    let mut compressed = Vec::new();
    for wanted in WANTED {
        let path = Path::new("kernel").join(wanted);
        let endings = ["", ".ko", ".ko.xz"].map(|ending| PathBuf::from(format!("{}{ending}", path.display())));
        for path in endings.iter().filter(|path| release.join(path).exists()) {
            copy(&release.join(path), &into.join(path), &mut compressed)?;
        }
    }
    for list in LISTS.iter().filter(|list| release.join(list).exists()) {
        copy(&release.join(list), &into.join(list), &mut compressed)?;
    }
    if !compressed.is_empty() {
        exec::output(Command::new("xz").arg("--decompress").args(&compressed))?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path, compressed: &mut Vec<PathBuf>) -> Result<()> {
    if from.is_dir() {
        for entry in fs::read_dir(from).with_context(|| format!("listing {}", from.display()))?.flatten() {
            copy(&entry.path(), &to.join(entry.file_name()), compressed)?;
        }
        return Ok(());
    }
    fs::create_dir_all(to.parent().context("a file is in a directory")?)?;
    fs::copy(from, to).with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
    if to.extension().is_some_and(|ending| ending == "xz") {
        compressed.push(to.to_path_buf());
    }
    Ok(())
}
