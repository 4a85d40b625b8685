//! Running other programs.

use std::{
    collections::VecDeque,
    env,
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
    sync::mpsc::channel,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{places, ui::Step};

/// Lines of output shown of a program that failed.
const SHOWN: usize = 60;
/// What cargo sets for a program that it runs.
const OF_A_PACKAGE: [&str; 4] = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"];

/// cargo, in the repository, as if called by hand. `cargo xtask` has variables for this package that others' build scripts look at: with them,
/// half of everything would be built again whenever somebody changes between the two.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut cargo = Command::new("cargo");
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(|name| OF_A_PACKAGE.iter().any(|prefix| name.starts_with(prefix))) {
            cargo.env_remove(name);
        }
    }
    cargo.args(arguments).current_dir(places::repository());
    cargo
}

/// Standard output of a short program that has to succeed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let line = describe(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("running `{line}`"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`{line}` failed ({}): {}", output.status, stderr.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a long program that has to succeed; its latest line is shown as progress, the last lines when it fails.
pub(crate) fn quietly(command: &mut Command, step: &Step) -> Result<()> {
    let mut last = LastLines::new(SHOWN);
    let result = each_line(command, |line| {
        step.now(line.trim());
        last.push(line);
    });
    result.with_context(|| format!("its last lines were:\n    {}", last.text().replace('\n', "\n    ")))
}

/// The end of a text, as many lines of it as wanted.
pub(crate) struct LastLines {
    lines: VecDeque<String>,
    most: usize,
}

impl LastLines {
    pub(crate) fn new(most: usize) -> Self {
        Self { lines: VecDeque::with_capacity(most), most }
    }

    pub(crate) fn push(&mut self, line: &str) {
        if self.lines.len() == self.most {
            self.lines.pop_front();
        }
        self.lines.push_back(line.to_owned());
    }

    pub(crate) fn text(&self) -> String {
        self.lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

/// Runs a program that has to succeed, in front of the user.
pub(crate) fn openly(command: &mut Command) -> Result<()> {
    let line = describe(command);
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("running `{line}`"))?;
    ensure!(status.success(), "`{line}` failed ({status})");
    Ok(())
}

/// Runs a program that has to succeed; `with` gets every line that it prints on either stream.
pub(crate) fn each_line(command: &mut Command, mut with: impl FnMut(&str)) -> Result<()> {
    let name = describe(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("running `{name}`"))?;
    let (send, lines) = channel();
    let pipes: [Box<dyn Read + Send>; 2] =
        [Box::new(child.stdout.take().expect("piped")), Box::new(child.stderr.take().expect("piped"))];
    for pipe in pipes {
        let send = send.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
                if send.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    break;
                }
            }
        });
    }
    drop(send);
    for line in lines {
        with(&line);
    }
    let status = child.wait().with_context(|| format!("waiting for `{name}`"))?;
    if !status.success() {
        bail!("`{name}` failed ({status})");
    }
    Ok(())
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
