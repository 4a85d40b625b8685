//! Programs that die with this process, even when it is killed.

use std::{
    process::Command,
    sync::mpsc::{Receiver, Sender, channel},
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result};

use crate::process::Process;

/// A command to start, and where its process goes.
type Job = (Command, Sender<Result<Process>>);

/// Starts programs on a thread of its own and keeps that thread.
///
/// The kernel sends a program's death signal when the *thread* that started it ends, and the thread of a test or of a runtime may end long
/// before its program should. Programs are killed when this value is dropped.
#[derive(Debug)]
pub(super) struct Keeper {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    pub(super) fn new() -> Result<Self> {
        let (jobs, receiver): (_, Receiver<Job>) = channel();
        let work = move || {
            for (mut command, reply) in receiver {
                let process = Process::spawn(&mut command);
                // Who asked is waiting for it.
                let _ = reply.send(process);
            }
        };
        let thread = thread::Builder::new().name("keeper".into()).spawn(work).context("starting a thread")?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Starts a command, which asks for its death signal itself (`setpriv --pdeathsig`).
    pub(super) fn spawn(&self, command: Command) -> Result<Process> {
        let (reply, process) = channel();
        let jobs = self.jobs.as_ref().expect("only a drop takes it");
        jobs.send((command, reply)).ok().context("the thread that starts programs has ended")?;
        process.recv().context("the thread that starts programs has ended")?
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // It only waits for the channel.
            let _ = thread.join();
        }
    }
}
