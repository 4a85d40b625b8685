//! The first process of a test machine: mounts what tests expect, runs them, and turns the machine off.
//!
//! Process 1 only collects orphans. The tests are run by a child of it, so that waiting for tests and waiting for orphans do not
//! get into each other's way.

#![forbid(unsafe_code)]

mod boot;
mod channel;
mod output;
mod program;
mod run;

use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    sys::{
        reboot::{RebootMode, reboot},
        wait::{WaitStatus, wait},
    },
    unistd::Pid,
};
use vm_guest::Report;

/// Tells the child of process 1 apart.
const RUN: &str = "run";

fn main() {
    if std::env::args().nth(1).as_deref() == Some(RUN) {
        if let Err(error) = run::run() {
            broken(&error);
        }
        return;
    }
    if Pid::this().as_raw() != 1 {
        eprintln!("this is the first process of a test machine; `cargo xtask vm` starts it");
        std::process::exit(2);
    }
    if let Err(error) = boot::prepare().and_then(|()| run_and_reap()) {
        broken(&error);
    }
    // When this fails process 1 ends, the kernel panics, and that ends the machine too.
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    eprintln!("turning the machine off: {error}");
}

/// Starts the runner and collects whatever ends until it ends too.
fn run_and_reap() -> Result<()> {
    let runner = Command::new("/proc/self/exe").arg(RUN).spawn().context("starting the runner")?;
    let runner = Pid::from_raw(i32::try_from(runner.id()).context("process ids are positive")?);
    loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, status)) if pid == runner => {
                ensure!(status == 0, "the runner ended with status {status}; its message is on the console");
                return Ok(());
            }
            Ok(status @ WaitStatus::Signaled(pid, ..)) if pid == runner => {
                anyhow::bail!("the runner was killed: {status:?}");
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("waiting for the runner"),
        }
    }
}

fn broken(error: &anyhow::Error) {
    eprintln!("{error:#}");
    if let Ok(channel) = channel::Channel::open()
        && let Err(error) = channel.send(&Report::Broken { reason: format!("{error:#}") })
    {
        eprintln!("{error:#}");
    }
}
