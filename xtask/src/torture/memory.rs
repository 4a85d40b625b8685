//! Takes memory away from the agents' sockets.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

/// Memory for the sockets of one agent, bytes. A connection with full buffers can take several times as much.
const LIMIT: u64 = 16 << 20;
/// Where control groups of version 1 count memory, which can limit that of TCP alone.
const MEMORY_V1: &str = "/sys/fs/cgroup/memory";
const LIMIT_V1: &str = "memory.kmem.tcp.limit_in_bytes";
const PEAK_V1: &str = "memory.kmem.tcp.max_usage_in_bytes";
/// Memory of all TCP sockets: without pressure below the first number of pages, none left at the last.
const TCP_MEMORY: &str = "/proc/sys/net/ipv4/tcp_mem";
/// For both agents and both applications: pressure from 4 MiB on, and an end at 12 MiB.
const PAGES: &str = "512 1024 3072";

/// Little memory, until it is dropped.
pub(super) enum Pressure {
    /// A control group for each agent.
    Groups(Vec<PathBuf>),
    /// For everybody on this machine; what was there before.
    Everybody(String),
}

impl Pressure {
    /// Begins. `machine` belongs to nobody else, so all of its sockets may suffer.
    pub(super) fn start(id: &str, agents: &[u32], machine: bool) -> Result<Self> {
        if machine {
            let before = fs::read_to_string(TCP_MEMORY).with_context(|| format!("reading {TCP_MEMORY}"))?;
            write(TCP_MEMORY, PAGES)?;
            return Ok(Self::Everybody(before));
        }
        if !Self::possible(machine) {
            bail!("{MEMORY_V1}/{LIMIT_V1} does not exist: TCP's memory can be limited for the whole machine only");
        }
        let mut groups = Self::Groups(Vec::new());
        for (number, pid) in agents.iter().enumerate() {
            let group = Path::new(MEMORY_V1).join(format!("underpass-{id}-{number}"));
            fs::create_dir(&group).with_context(|| format!("creating {}", group.display()))?;
            if let Self::Groups(all) = &mut groups {
                all.push(group.clone());
            }
            write(group.join(LIMIT_V1), LIMIT.to_string())?;
            write(group.join("cgroup.procs"), pid.to_string())?;
        }
        Ok(groups)
    }

    /// Whether memory can be taken away without everybody suffering.
    pub(super) fn possible(machine: bool) -> bool {
        machine || Path::new(MEMORY_V1).join(LIMIT_V1).exists()
    }

    /// What it does, and how much was used at most where the kernel counts that.
    pub(super) fn how(&self) -> String {
        match self {
            Self::Groups(groups) => {
                let count = |group: &PathBuf| -> Option<u64> {
                    fs::read_to_string(group.join(PEAK_V1)).ok()?.trim().parse().ok()
                };
                let peaks: Vec<_> =
                    groups.iter().filter_map(count).map(|bytes| format!("{} KiB", bytes >> 10)).collect();
                format!("{} KiB for an agent's sockets, of which they used {}", LIMIT >> 10, peaks.join(" and "))
            }
            Self::Everybody(_) => format!("tcp_mem is {PAGES}"),
        }
    }
}

impl Drop for Pressure {
    fn drop(&mut self) {
        match self {
            // The agents are gone by now: a group with processes cannot be removed.
            Self::Groups(groups) => {
                for group in groups {
                    if let Err(error) = fs::remove_dir(&group) {
                        eprintln!("removing {}: {error}", group.display());
                    }
                }
            }
            Self::Everybody(before) => {
                if let Err(error) = write(TCP_MEMORY, before.trim()) {
                    eprintln!("{error:#}");
                }
            }
        }
    }
}

fn write(path: impl AsRef<Path>, text: impl AsRef<str>) -> Result<()> {
    let (path, text) = (path.as_ref(), text.as_ref());
    fs::write(path, text).with_context(|| format!("writing {text:?} to {}", path.display()))
}
