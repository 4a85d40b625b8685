//! The BPF file system, where agents pin what has to outlive them.

use std::{
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

/// Where it is mounted by convention.
const MOUNT_POINT: &str = "/sys/fs/bpf";

/// Runs `f` while holding the lock that all testbeds of this machine share, for short steps that race between processes: making a network
/// namespace (iproute2 prepares its directory on first use), or directories that several use.
pub fn locked<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    let path = std::env::temp_dir().join("underpass-testbed.lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("opening the lock file {}", path.display()))?;
    file.lock().with_context(|| format!("locking {}", path.display()))?;
    f()
}

/// Mounts the BPF file system if it is not.
pub(crate) fn ensure_mounted() -> Result<()> {
    // Two mounts over one another would hide the pins of the first.
    locked(|| {
        let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
        let mounted = mounts.lines().any(|line| {
            let mut fields = line.split(' ').skip(1);
            fields.next() == Some(MOUNT_POINT) && fields.next() == Some("bpf")
        });
        if mounted {
            return Ok(());
        }
        mount(Some("bpf"), MOUNT_POINT, Some("bpf"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting bpffs at {MOUNT_POINT}"))
    })
}

/// The pin directory of an agent on node `node` of testbed `id`.
pub(crate) fn pin_root(id: &str, node: &str) -> PathBuf {
    Path::new(MOUNT_POINT).join(format!("underpass-{id}-{node}"))
}

/// Where pin directories are.
pub(crate) fn directory() -> &'static Path {
    Path::new(MOUNT_POINT)
}
