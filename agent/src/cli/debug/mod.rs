//! `underpass debug bundle`: everything that helps to find out what is wrong, in one file without secrets.

mod archive;
mod host;
mod parts;
mod redact;
#[cfg(test)]
mod tests;

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::SystemTime,
};

use clap::{Args, Subcommand};
use serde::Serialize;

use self::archive::{Archive, Part};
use super::{
    DEFAULT_PIN_ROOT, DEFAULT_STATE_DIR,
    agent::AgentArgs,
    exit::EXIT_CODES,
    output::{OutputArgs, Style, View, bytes, shown},
};

/// Arguments of `underpass debug`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES}

Examples:
  underpass debug bundle"))]
pub(super) struct DebugArgs {
    #[command(subcommand)]
    command: DebugCommand,
}

#[derive(Debug, Subcommand)]
enum DebugCommand {
    /// Write what is known of this node, its agent and its pods into one archive, without keys and other secrets.
    Bundle(BundleArgs),
}

/// Arguments of `underpass debug bundle`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES}

What is in it: versions, `underpass check`, status, workloads, services, policies,
certificates (no keys), connections, the configuration, BPF programs and maps, kernel
settings, and the network of each pod. It also works while no agent runs. A part that
cannot be had is a file that says why. Names and addresses are in it: look before you
share. Private keys, tokens and values whose names say that they are secret are replaced.

Examples:
  underpass debug bundle
  underpass debug bundle --file /tmp/node-a.tar.gz --log-file /var/log/underpass.log"))]
pub(super) struct BundleArgs {
    #[command(flatten)]
    agent: AgentArgs,
    /// Where to write the archive; must not exist yet [default: underpass-debug-TIME.tar.gz here].
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The agent's log, the end of which is put in.
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Directory on bpffs that the agent pins under.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_PIN_ROOT)]
    pin_root: PathBuf,
    /// The agent's directory with its last good configuration.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// cgroup v2 directory that the agent attaches to.
    #[arg(long, value_name = "PATH", env = "UNDERPASS_CGROUP")]
    cgroup: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

/// What was written.
#[derive(Debug, Serialize)]
struct Report {
    /// The archive.
    file: PathBuf,
    /// Its size in bytes.
    size: u64,
    /// What is in it, in order; also in the archive as `manifest.json`.
    parts: Vec<Part>,
}

pub(super) fn debug(args: &DebugArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        DebugCommand::Bundle(args) => bundle(args),
    }
}

fn bundle(args: &BundleArgs) -> anyhow::Result<ExitCode> {
    // Without colons, which some programs take for a host's name.
    let time = humantime::format_rfc3339_seconds(SystemTime::now()).to_string().replace(':', "");
    let name = format!("underpass-debug-{time}");
    let file = args.file.clone().unwrap_or_else(|| Path::new(&name).with_extension("tar.gz"));
    let mut archive = Archive::create(&file, &name)?;
    parts::collect(args, &mut archive)?;
    let (parts, size) = archive.finish()?;
    args.output.print(&Report { file, size, parts })?;
    Ok(ExitCode::SUCCESS)
}

impl View for Report {
    fn table(&self, _: Style) -> String {
        let mut text =
            format!("{} ({}, {} parts)\n", shown(&self.file.to_string_lossy()), bytes(self.size), self.parts.len());
        for part in &self.parts {
            if let Some(error) = &part.error {
                let name = part.name.trim_end_matches(archive::ERROR);
                let _ = writeln!(text, "  without {name}: {}", shown(error));
            }
        }
        text
    }
}
