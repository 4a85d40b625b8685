//! The way to the host.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    sync::Mutex,
};

use anyhow::{Context, Result};
use vm_guest::{CHANNEL, Report};

/// The serial port that the host reads.
pub(crate) struct Channel {
    port: Mutex<File>,
}

impl Channel {
    pub(crate) fn open() -> Result<Self> {
        let port = OpenOptions::new().write(true).open(CHANNEL).with_context(|| format!("opening {CHANNEL}"))?;
        Ok(Self { port: Mutex::new(port) })
    }

    /// Writes one line; blocks while the port is busy.
    pub(crate) fn send(&self, report: &Report) -> Result<()> {
        let mut line = serde_json::to_vec(report).context("writing a report as JSON")?;
        line.push(b'\n');
        let mut port = self.port.lock().expect("nothing panics while holding it");
        port.write_all(&line).with_context(|| format!("writing to {CHANNEL}"))
    }
}
