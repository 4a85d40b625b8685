//! The command line.

mod agent;
mod assemble;
pub mod cgroup;
pub mod check;
mod cleanup;
mod connections;
mod memory;
mod output;
mod policy;
mod ports;
mod run;
mod status;
#[cfg(test)]
mod tests;

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

pub use run::RunArgs;

use crate::telemetry::logging::{self, LogFormat, printable};

/// Directory for the admin socket and certificates; a tmpfs on every distribution.
const DEFAULT_RUN_DIR: &str = "/run/underpass";
/// Directory on bpffs for pins.
const DEFAULT_PIN_ROOT: &str = "/sys/fs/bpf/underpass";

/// Exit codes, in every command's help.
const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage.";

/// The admin socket of the agent with this run directory.
pub fn admin_socket(run_dir: &Path) -> PathBuf {
    run_dir.join("admin.sock")
}

#[derive(Debug, Parser)]
#[command(
    name = "underpass",
    version,
    about = "Mutual TLS between pods, without sidecars and without the applications knowing",
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage.
`underpass check` exits with 0 when the agent can run on this host, with 1 when it cannot.

Examples:
  underpass check                               what this host offers
  underpass run --config /etc/underpass/node.yaml
  underpass status
  underpass connections -o json
  underpass policy explain --from spiffe://cluster.local/ns/default/sa/client --to 10.77.0.2:8080",
    propagate_version = true,
    disable_help_subcommand = true
)]
struct Cli {
    /// What is logged to standard error: a level (error, warn, info, debug, trace), or levels per module, e.g.
    /// `info,underpass::tunnel=debug`.
    #[arg(long, global = true, value_name = "FILTER", default_value = "info", env = "RUST_LOG", display_order = 1000)]
    log: String,
    /// How log lines look.
    #[arg(long, global = true, value_enum, value_name = "FORMAT", default_value_t, display_order = 1000)]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent of this node.
    Run(Box<RunArgs>),
    /// Say what this host offers, and whether the agent can run.
    Check(check::CheckArgs),
    /// List the live connections of a running agent, or reset one.
    Connections(connections::ConnectionsArgs),
    /// Show a running agent: its pods, certificates, configuration and counters.
    Status(status::StatusArgs),
    /// List the authorization policies, and whether they are enforced as written.
    Policies(policy::PoliciesArgs),
    /// Ask about single connections.
    Policy(policy::PolicyArgs),
    /// Remove what a stopped agent left: programs, pins, rules. Gives the pods plain traffic back.
    Cleanup(cleanup::CleanupArgs),
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let log = match logging::init(&cli.log, cli.log_format) {
        Ok(guard) => guard,
        Err(e) => {
            report(&e.into());
            return ExitCode::from(2);
        }
    };
    let result = match cli.command {
        Command::Run(args) => assemble::run(*args, cli.log_format).map(|()| ExitCode::SUCCESS),
        Command::Check(args) => check::check(&args),
        Command::Connections(args) => connections::connections(&args).map(|()| ExitCode::SUCCESS),
        Command::Status(args) => status::status(&args).map(|()| ExitCode::SUCCESS),
        Command::Policies(args) => policy::policies(&args).map(|()| ExitCode::SUCCESS),
        Command::Policy(args) => policy::policy(&args).map(|()| ExitCode::SUCCESS),
        Command::Cleanup(args) => cleanup::cleanup(&args).map(|()| ExitCode::SUCCESS),
    };
    // Before the error, so that it is the last thing on the screen.
    drop(log);
    result.unwrap_or_else(|e| {
        report(&e);
        ExitCode::FAILURE
    })
}

/// `error: ...` and its causes, one per line.
fn report(error: &anyhow::Error) {
    let mut text = String::new();
    for (i, cause) in error.chain().enumerate() {
        let cause = cause.to_string();
        let mut lines = cause.lines().map(printable);
        text.push_str(if i == 0 { "error: " } else { "  caused by: " });
        text.push_str(&lines.next().unwrap_or_default());
        for line in lines {
            text.push_str("\n  ");
            text.push_str(&line);
        }
        text.push('\n');
    }
    // Nowhere left to say that standard error is closed.
    let _ = io::stderr().write_all(text.as_bytes());
}
