//! How a command ends: exit codes for scripts, and the next command for people.

use std::{io, process::ExitCode};

use nix::errno::Errno;

use super::output::shown;
use crate::admin::client::ClientError;

/// Exit codes, in every command's help.
pub const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage.";
/// Exit codes of commands that ask an agent.
pub const EXIT_CODES_AGENT: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no agent answers.";
/// Exit codes of commands that show something and take `--check`.
pub const EXIT_CODES_CHECK: &str =
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no agent answers, 4 problems were found (--check).";

/// No agent answers.
pub const UNREACHABLE: u8 = 3;
/// `--check` found problems.
pub const PROBLEMS: u8 = 4;
/// What the kernel says to those who may not.
const DENIED: [Errno; 2] = [Errno::EACCES, Errno::EPERM];
/// Longest message on standard error, in lines; each is cut as a table's cell is.
const LINES: usize = 200;

/// The exit code for an error.
pub fn code(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::NotRunning { .. } | ClientError::Connect { .. } | ClientError::Timeout { .. }) => {
            ExitCode::from(UNREACHABLE)
        }
        _ => ExitCode::FAILURE,
    }
}

/// What to run next.
fn next(error: &anyhow::Error) -> Option<&'static str> {
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::NotRunning { .. }) => {
            return Some(
                "`underpass bpf programs` shows what holds the pods without an agent, `underpass check` whether one can run here",
            );
        }
        Some(ClientError::Timeout { .. }) => {
            return Some("`underpass debug bundle` collects what is known without the agent's answer");
        }
        Some(ClientError::Refused { status: 404, .. }) => {
            return Some("`underpass connections` and `underpass workloads` list what there is");
        }
        Some(ClientError::Answer { .. }) => return Some("`underpass --version`, and the same of the agent's binary"),
        _ => {}
    }
    // aya's errors are texts by the time they arrive here.
    let denied = |cause: &(dyn std::error::Error + 'static)| {
        let text = cause.to_string();
        DENIED.iter().any(|errno| text.contains(&io::Error::from(*errno).to_string()))
    };
    error.chain().any(denied).then_some("the same command as root, e.g. with sudo")
}

/// `error: ...` and its causes, one per line, and what to run next.
pub fn message(error: &anyhow::Error) -> String {
    let mut lines = Vec::new();
    for (i, cause) in error.chain().enumerate() {
        let cause = cause.to_string();
        for (j, line) in cause.lines().enumerate() {
            let start = match (i, j) {
                (0, 0) => "error: ",
                (_, 0) => "  caused by: ",
                _ => "  ",
            };
            lines.push(format!("{start}{}\n", shown(line)));
        }
    }
    lines.truncate(LINES);
    lines.extend(next(error).map(|next| format!("  next: {next}\n")));
    lines.concat()
}
