//! Runs the plan: every test in a process group of its own, some at a time.

use std::{
    fs,
    io::{self, pipe},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc::channel,
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use vm_guest::{PLAN, Plan, Report, Test};

use crate::{channel::Channel, output::Tail, program};

pub(crate) fn run() -> Result<()> {
    let text = fs::read(PLAN).with_context(|| format!("reading {PLAN}"))?;
    let plan: Plan = serde_json::from_slice(&text).with_context(|| format!("reading {PLAN}"))?;
    let channel = Channel::open()?;
    channel.send(&ready()?)?;

    let next = AtomicUsize::new(0);
    // What failed, and may be tried again.
    let failed = Mutex::new(Vec::new());
    let worker = || -> Result<()> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(test) = plan.tests.get(number) else { return Ok(()) };
            channel.send(&Report::Started { test: number })?;
            if !run_test(&plan, number, test, test.retries > 0, &channel)? && test.retries > 0 {
                failed.lock().expect("nothing panics while holding it").push((number, test));
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..plan.jobs.max(1)).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))
    })?;
    // With nothing beside it that could have been in its way.
    for (number, test) in failed.into_inner().expect("nothing panics while holding it") {
        for left in (0..test.retries).rev() {
            if run_test(&plan, number, test, left > 0, &channel)? {
                break;
            }
        }
    }
    if let Some(program) = &plan.program {
        let failure = program::run(&plan, program, &channel).unwrap_or_else(|error| Some(format!("{error:#}")));
        channel.send(&Report::Finished { failure })?;
    }
    channel.send(&Report::Done)
}

fn ready() -> Result<Report> {
    let line = |path: &str| fs::read_to_string(path).with_context(|| format!("reading {path}"));
    let uptime = line("/proc/uptime")?;
    Ok(Report::Ready {
        kernel: line("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        uptime: uptime.split(' ').next().unwrap_or_default().parse().context("reading /proc/uptime")?,
        lsm: line("/sys/kernel/security/lsm")?.trim().to_owned(),
    })
}

/// Tries a test and tells how that went; whether it passed. `again`: it will be tried again if not.
fn run_test(plan: &Plan, number: usize, test: &Test, again: bool, channel: &Channel) -> Result<bool> {
    let start = Instant::now();
    let (failure, output) = match try_once(plan, test) {
        Ok(tried) => tried,
        Err(error) => (Some(format!("{error:#}")), String::new()),
    };
    let passed = failure.is_none();
    channel.send(&Report::Ended {
        test: number,
        failure,
        again: again && !passed,
        seconds: start.elapsed().as_secs_f64(),
        output: if passed { String::new() } else { output },
    })?;
    Ok(passed)
}

/// Why it failed, if it did, and what it printed.
fn try_once(plan: &Plan, test: &Test) -> Result<(Option<String>, String)> {
    let (reader, writer) = pipe().context("making a pipe")?;
    let mut command = Command::new(&test.program);
    // A name may be that of an ignored test, which the host has asked for then.
    command.args(["--exact", &test.name, "--nocapture", "--include-ignored"]).current_dir(&test.directory);
    command.env_clear().envs(&plan.environment).stdin(Stdio::null()).process_group(0);
    command.stdout(writer.try_clone().context("copying a pipe")?).stderr(writer);
    let child = command.spawn().with_context(|| format!("starting {}", test.program.display()))?;
    // The command holds the pipe's other end.
    drop(command);
    let tail = Tail::of(reader);
    Ok((wait(child, test.limit), tail.text()))
}

/// Waits for the leader of a process group, and ends the group; why it failed, if it did.
pub(crate) fn wait(mut child: Child, limit: u64) -> Option<String> {
    let group = Pid::from_raw(i32::try_from(child.id()).expect("process ids are positive"));
    let (send, ended) = channel();
    std::thread::spawn(move || send.send(child.wait()));
    let status: Option<io::Result<ExitStatus>> = ended.recv_timeout(Duration::from_secs(limit)).ok();
    // What it started and left in its group ends with it. Usually there is nothing.
    let _ = killpg(group, Signal::SIGKILL);
    match status {
        Some(Ok(status)) if status.success() => None,
        Some(Ok(status)) => Some(match status.signal() {
            Some(signal) => format!("killed by signal {signal}"),
            None => format!("exit status {}", status.code().unwrap_or_default()),
        }),
        Some(Err(error)) => Some(format!("waiting for it: {error}")),
        None => {
            // The signal above ends it: the thread that waits has an answer soon.
            let _ = ended.recv();
            Some(format!("still running after {limit} s"))
        }
    }
}
