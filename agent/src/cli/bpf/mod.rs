//! `underpass bpf`: what is in force in the kernel, with or without an agent.

mod dump;
mod maps;
mod programs;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Subcommand};

use super::{DEFAULT_PIN_ROOT, DEFAULT_STATE_DIR, exit::EXIT_CODES, show::ShowArgs};
use crate::{capture::inspect::Names, mesh::Snapshot, sources::file};

/// Exit codes of commands that show something without asking an agent.
const EXIT_CODES_PINS: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage, 4 problems were found (--check).";

/// Arguments of `underpass bpf`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES}

Everything is read from what is pinned, so it works while no agent runs. Reading changes
nothing. Needs root.

Examples:
  underpass bpf programs
  underpass bpf maps
  underpass bpf dump PORT_RULES"))]
pub(super) struct BpfArgs {
    #[command(subcommand)]
    command: BpfCommand,
}

#[derive(Debug, Subcommand)]
enum BpfCommand {
    /// List the pinned programs, where they are attached, and what is missing.
    Programs(programs::ProgramsArgs),
    /// List the pinned maps, and how full they are.
    Maps(maps::MapsArgs),
    /// Show what a map holds, with names.
    Dump(dump::DumpArgs),
}

/// Where to look.
#[derive(Debug, Clone, Args)]
pub(super) struct PinArgs {
    /// Directory on bpffs that the agent pins under.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_PIN_ROOT)]
    pub(super) pin_root: PathBuf,
    /// The agent's directory with its last good configuration, where the names of pods come from.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_STATE_DIR)]
    pub(super) state_dir: PathBuf,
    #[command(flatten)]
    show: ShowArgs,
}

impl PinArgs {
    /// The pods' names. Without a configuration there are none, and numbers have to do.
    fn names(&self) -> Names {
        names(&self.pin_root, &self.state_dir)
    }
}

/// The pods' names, as far as pins and the last good configuration tell.
pub(super) fn names(pin_root: &Path, state_dir: &Path) -> Names {
    last_good(state_dir).map(|mesh| Names::read(pin_root, &mesh)).unwrap_or_default()
}

/// What an agent last accepted.
pub(super) fn last_good(state_dir: &Path) -> Option<Snapshot> {
    let text = file::last_good(state_dir).ok()?;
    Some(file::parse("last-good.yaml", &text).ok()?.snapshot)
}

pub(super) fn bpf(args: &BpfArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        BpfCommand::Programs(args) => programs::programs(args),
        BpfCommand::Maps(args) => maps::maps(args),
        BpfCommand::Dump(args) => dump::dump(args),
    }
}

/// For whoever finds nothing.
fn nothing_pinned(pin_root: &str) -> String {
    format!(
        "nothing is pinned under {pin_root}: no agent has run with this --pin-root, or `underpass cleanup` removed it"
    )
}
