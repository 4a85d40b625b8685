//! The command line.

mod agent;
mod assemble;
mod bpf;
mod ca;
mod certificates;
pub mod cgroup;
pub mod check;
mod cleanup;
mod connections;
mod debug;
mod exit;
mod generate;
mod memory;
mod output;
mod policy;
mod ports;
mod run;
mod runtime;
mod self_test;
mod services;
mod show;
mod status;
#[cfg(test)]
mod tests;
mod top;
mod uninstall;
mod workloads;

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

pub use run::RunArgs;

use crate::{
    sys::contained,
    telemetry::logging::{self, LogFormat},
};

/// Directory for the admin socket and certificates; a tmpfs on every distribution.
const DEFAULT_RUN_DIR: &str = "/run/underpass";
/// Directory on bpffs for pins.
const DEFAULT_PIN_ROOT: &str = "/sys/fs/bpf/underpass";
/// Directory for the last good configuration.
const DEFAULT_STATE_DIR: &str = "/var/lib/underpass";

/// The admin socket of the agent with this run directory.
pub fn admin_socket(run_dir: &Path) -> PathBuf {
    run_dir.join("admin.sock")
}

#[derive(Debug, Parser)]
#[command(
    name = "underpass",
    version,
    about = "Mutual TLS between pods, without sidecars and without the applications knowing",
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no agent answers, 4 problems were found (--check).
`underpass check` exits with 0 when the agent can run on this host, with 1 when it cannot.

Examples:
  underpass check                               what this host offers
  underpass run --config /etc/underpass/node.yaml
  underpass status
  underpass top                                 live connections and rates
  underpass connections -o json
  underpass bpf programs                        what is in force, also without an agent
  underpass debug bundle                        everything for a bug report, without secrets
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
    /// Run the certificate authority for a cluster's agents.
    Ca(Box<ca::CaArgs>),
    /// Say what this host offers, and whether the agent can run.
    Check(check::CheckArgs),
    /// Show a running agent: its pods, certificates, configuration and counters.
    Status(status::StatusArgs),
    /// List the workloads of the mesh, and whether those of this node are enrolled.
    Workloads(workloads::WorkloadsArgs),
    /// List the services of the mesh and their endpoints.
    Services(services::ServicesArgs),
    /// List the authorization policies, and whether they are enforced as written.
    Policies(policy::PoliciesArgs),
    /// List the certificates of this node's identities.
    Certificates(certificates::CertificatesArgs),
    /// List the live connections of a running agent, or reset one.
    Connections(connections::ConnectionsArgs),
    /// Watch connections, rates, identities and the data path in the terminal.
    Top(top::TopArgs),
    /// Ask about single connections.
    Policy(policy::PolicyArgs),
    /// Read the pinned BPF programs and maps, with or without an agent.
    Bpf(bpf::BpfArgs),
    /// Collect what helps to find out what is wrong.
    Debug(debug::DebugArgs),
    /// Remove what a stopped agent left: programs, pins, rules. Gives the pods plain traffic back.
    Cleanup(cleanup::CleanupArgs),
    /// In a pod of the mesh: dial oneself by a Service, and see that it was mutual TLS.
    SelfTest(self_test::SelfTestArgs),
    /// Ask the agents of a cluster to give their nodes back, and wait until they have.
    Uninstall(uninstall::UninstallArgs),
    /// Print a script that completes commands and options in a shell.
    Completions(generate::CompletionsArgs),
    /// Write man pages.
    Man(generate::ManArgs),
}

impl Command {
    /// It deals with cgroups as they are called on the host.
    fn is_about_the_node(&self) -> bool {
        matches!(self, Self::Run(_) | Self::Check(_) | Self::Bpf(_) | Self::Debug(_) | Self::Cleanup(_))
    }
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
    if cli.command.is_about_the_node() {
        match contained::join_hosts_cgroup_namespace() {
            Ok(joined) => tracing::debug!(joined, "in the host's cgroup namespace"),
            // Whoever needs it says what cannot be done without.
            Err(error) => tracing::debug!(%error, "not in the host's cgroup namespace"),
        }
    }
    let done = |()| ExitCode::SUCCESS;
    let result = match cli.command {
        Command::Run(args) => assemble::run(*args, cli.log_format).map(done),
        Command::Ca(args) => ca::ca(*args).map(done),
        Command::Check(args) => check::check(&args),
        Command::Status(args) => status::status(&args),
        Command::Workloads(args) => workloads::workloads(&args),
        Command::Services(args) => services::services(&args),
        Command::Policies(args) => policy::policies(&args),
        Command::Certificates(args) => certificates::certificates(&args),
        Command::Connections(args) => connections::connections(&args),
        Command::Top(args) => top::top(&args).map(done),
        Command::Policy(args) => policy::policy(&args),
        Command::Bpf(args) => bpf::bpf(&args),
        Command::Debug(args) => debug::debug(&args),
        Command::Cleanup(args) => cleanup::cleanup(&args).map(done),
        Command::SelfTest(args) => self_test::self_test(&args).map(done),
        Command::Uninstall(args) => uninstall::uninstall(&args).map(done),
        Command::Completions(args) => generate::completions(&args).map(done),
        Command::Man(args) => generate::man(&args).map(done),
    };
    // Before the error, so that it is the last thing on the screen.
    drop(log);
    result.unwrap_or_else(|e| {
        report(&e);
        exit::code(&e)
    })
}

fn report(error: &anyhow::Error) {
    // Nowhere left to say that standard error is closed.
    let _ = io::stderr().write_all(exit::message(error).as_bytes());
}
