//! cgroup v2 directories: made, emptied and removed.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::pace::patience;

/// How long killed processes may take to leave their cgroup.
const EMPTY_WITHIN: Duration = Duration::from_secs(10);

/// Where the cgroup v2 hierarchy is mounted, also beside v1 controllers.
pub fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    mounts
        .lines()
        .find_map(|line| {
            let mut fields = line.split(' ');
            let (_, directory, kind) = (fields.next()?, fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(directory))
        })
        .context("no cgroup2 file system in /proc/mounts; mount one: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

/// Kills every process in `root` and below and removes the directories. Nothing there is no error.
pub fn remove(root: &Path) -> Result<()> {
    if !root.exists() {
        return Ok(());
    }
    let kill = root.join("cgroup.kill");
    fs::write(&kill, "1").with_context(|| format!("writing {} (Linux 5.14 or newer)", kill.display()))?;
    wait_empty(root)?;
    remove_tree(root)
}

/// Waits for `cgroup.events` to say that no process is left.
fn wait_empty(root: &Path) -> Result<()> {
    let path = root.join("cgroup.events");
    let mut events = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    let within = patience(EMPTY_WITHIN);
    let deadline = Instant::now() + within;
    loop {
        let mut text = String::new();
        events.seek(SeekFrom::Start(0)).and_then(|_| events.read_to_string(&mut text))?;
        if text.lines().any(|line| line == "populated 0") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("processes in {} survive SIGKILL for {within:?}", root.display());
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)], timeout)?;
    }
}

fn remove_tree(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("listing {}", directory.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(directory).with_context(|| format!("removing cgroup {}", directory.display()))
}
