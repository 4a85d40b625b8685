//! What all connections of a process have in common.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Args;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use testbed::{pace::patience, torture::Side};
use tokio::sync::watch;

/// Arguments of both ends.
#[derive(Args, Clone)]
pub(super) struct Common {
    /// Kill this process (SIGKILL) once it has sent and received this many bytes.
    #[arg(long, value_name = "BYTES")]
    die_after: Option<u64>,
    /// A file that both ends share: each notes what it has sent, so that the other knows it after a kill.
    #[arg(long, value_name = "FILE")]
    progress: Option<PathBuf>,
    /// How long nothing may happen on a connection, beside the pauses of its plan, seconds.
    #[arg(long, default_value_t = patience(Duration::from_secs(40)).as_secs())]
    limit: u64,
}

/// See the module.
pub(super) struct Context {
    die_after: u64,
    moved: AtomicU64,
    progress: Option<File>,
    /// How long nothing may happen on a connection, beside the pauses of its plan.
    pub(super) limit: Duration,
    /// Whether idle connections may go on.
    pub(super) released: watch::Sender<bool>,
    /// How many connections are idle.
    pub(super) resting: watch::Sender<u64>,
}

impl Context {
    pub(super) fn new(common: &Common) -> Result<Self> {
        let open = |path: &PathBuf| {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
            file.with_context(|| format!("opening {}", path.display()))
        };
        Ok(Self {
            die_after: common.die_after.unwrap_or(u64::MAX),
            moved: AtomicU64::new(0),
            progress: common.progress.as_ref().map(open).transpose()?,
            limit: Duration::from_secs(common.limit),
            released: watch::Sender::new(false),
            resting: watch::Sender::new(0),
        })
    }

    /// Whether one of the ends is going to be killed.
    pub(super) fn somebody_dies(&self) -> bool {
        self.progress.is_some()
    }

    /// Takes note of what an end has sent in all.
    pub(super) fn sent(&self, number: u64, side: Side, all: u64, more: usize) -> Result<()> {
        if let Some(file) = &self.progress {
            file.write_all_at(&all.to_ne_bytes(), place(number, side)).context("noting what was sent")?;
        }
        self.moved(more)
    }

    /// What an end has certainly sent.
    pub(super) fn known_sent(&self, number: u64, side: Side) -> Result<u64> {
        let Some(file) = &self.progress else { return Ok(0) };
        let mut bytes = [0; 8];
        match file.read_exact_at(&mut bytes, place(number, side)) {
            // It has noted nothing yet.
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(0),
            result => result.context("reading what was sent").map(|()| u64::from_ne_bytes(bytes)),
        }
    }

    /// Counts bytes, and ends this process when it is time.
    pub(super) fn moved(&self, bytes: usize) -> Result<()> {
        if self.moved.fetch_add(bytes as u64, Relaxed) + bytes as u64 >= self.die_after {
            kill(Pid::this(), Signal::SIGKILL).context("killing this process")?;
        }
        Ok(())
    }
}

/// Eight bytes for each end of each connection.
fn place(number: u64, side: Side) -> u64 {
    number * 16 + side as u64 * 8
}
