//! Runs the plan's program, telling what it prints while it does.

use std::{
    io::{BufRead, BufReader, Read},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

use anyhow::{Context, Result};
use vm_guest::{Plan, Program, Report};

use crate::{channel::Channel, run::wait};

/// Longest line that is passed on, bytes; the rest of it is another one.
const LINE: u64 = 64 << 10;

/// Why it failed, if it did.
pub(crate) fn run(plan: &Plan, program: &Program, channel: &Channel) -> Result<Option<String>> {
    let mut child = Command::new(&program.path)
        .args(&program.arguments)
        .env_clear()
        .envs(&plan.environment)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting {}", program.path.display()))?;
    let (out, aside) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    std::thread::scope(|scope| {
        let out = scope.spawn(|| pass_on(out, false, channel));
        let aside = scope.spawn(|| pass_on(aside, true, channel));
        let failure = wait(child, program.limit);
        for reader in [out, aside] {
            reader.join().expect("a reader does not panic")?;
        }
        Ok(failure)
    })
}

fn pass_on(from: impl Read, aside: bool, channel: &Channel) -> Result<()> {
    let mut from = BufReader::new(from);
    loop {
        let mut line = Vec::new();
        if from.by_ref().take(LINE).read_until(b'\n', &mut line).context("reading what it prints")? == 0 {
            return Ok(());
        }
        let line = String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned();
        channel.send(&Report::Said { line, aside })?;
    }
}
