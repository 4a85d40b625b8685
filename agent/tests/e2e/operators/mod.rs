//! What operators have: every verb of the command line against a live and a dead agent, archives, `top` in a terminal.

mod bundle;
mod pins;
mod top;
mod verbs;

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use regex::Regex;
use serde_json::Value;
use testbed::{Agent, Process, underpass_path};

/// How long a command may take.
const SOON: Duration = Duration::from_secs(20);

/// A command about this agent, without what the caller's environment would add.
fn command(agent: &Agent, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(underpass_path()?);
    command.args(arguments);
    match arguments {
        ["bpf", ..] => {
            command.arg("--pin-root").arg(agent.pin_root()).arg("--state-dir").arg(agent.state_dir()?);
        }
        ["debug", ..] => {
            command.arg("--pin-root").arg(agent.pin_root()).arg("--state-dir").arg(agent.state_dir()?);
            command.arg("--run-dir").arg(agent.run_dir()?);
        }
        _ => {
            command.arg("--run-dir").arg(agent.run_dir()?);
        }
    }
    for variable in ["RUST_LOG", "UNDERPASS_CGROUP", "UNDERPASS_RUN_DIR"] {
        command.env_remove(variable);
    }
    Ok(command)
}

/// Runs it; exit code, standard output and standard error.
fn run(agent: &Agent, arguments: &[&str]) -> Result<(i32, String, String)> {
    let output = Process::spawn(&mut command(agent, arguments)?)?.output(SOON)?;
    let code = output.status.code().with_context(|| format!("{arguments:?} was killed: {}", output.stderr))?;
    Ok((code, output.stdout, output.stderr))
}

/// Runs it and requires success.
fn printed(agent: &Agent, arguments: &[&str]) -> Result<String> {
    let (code, stdout, stderr) = run(agent, arguments)?;
    ensure!(code == 0, "{arguments:?} exited with {code}: {stdout}{stderr}");
    ensure!(stderr.is_empty(), "{arguments:?} complained: {stderr}");
    Ok(stdout)
}

/// Runs it with `-o json`.
fn json(agent: &Agent, arguments: &[&str]) -> Result<Value> {
    let text = printed(agent, &[arguments, &["-o", "json"]].concat())?;
    serde_json::from_str(&text).with_context(|| format!("{arguments:?} printed {text}"))
}

/// The text without what differs from run to run and from kernel to kernel.
fn redacted(text: &str) -> String {
    let mut text = text.to_owned();
    for (pattern, replacement) in [
        (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "[time]"),
        (r"\b[0-9a-f]{24,64}\b", "[hex]"),
        (r"CN=cluster\.local [0-9a-f]{8}\b", "CN=cluster.local [root]"),
        (r"(user \([a-z -]+\)|ktls)", "[path]"),
        (r"\b(\d+m \d+s|\d+m|\d+s)( |$)", "[age]$2"),
        // Ports that the kernel chose.
        (r":(3[2-9]|[45]\d|6[0-5])\d{3}\b", ":[port]"),
        (r"/run/netns/\S+", "[netns]"),
        // Columns are as wide as what is in them.
        (r" {2,}", "  "),
    ] {
        text = Regex::new(pattern).expect("a constant").replace_all(&text, replacement).into_owned();
    }
    text
}
