//! `underpass cleanup`.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;

use super::{DEFAULT_PIN_ROOT, exit::EXIT_CODES, output::shown};
use crate::capture;

/// Arguments of `underpass cleanup`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES}

Pods that were enrolled talk in plaintext afterwards.
A running agent is not disturbed unless --force is given.

Examples:
  underpass cleanup
  underpass cleanup --netns /run/netns/web --netns /run/netns/db"))]
pub struct CleanupArgs {
    /// Directory on bpffs that the agent pinned under.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_PIN_ROOT)]
    pub pin_root: PathBuf,
    /// A pod's network namespace to remove tc programs, rules and routes from; can be given more than once.
    #[arg(long, value_name = "PATH")]
    pub netns: Vec<PathBuf>,
    /// Clean up although an agent seems to be running.
    #[arg(long)]
    pub force: bool,
}

pub(super) fn cleanup(args: &CleanupArgs) -> anyhow::Result<()> {
    remove(&args.pin_root, &args.netns, args.force)
}

/// Removes, prints what was removed, and fails when something is left.
fn remove(pin_root: &Path, pods: &[PathBuf], force: bool) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    let report = runtime.block_on(capture::cleanup::cleanup(pin_root, pods, force))?;
    println!(
        "removed {} links, {} maps, {} filters; cleaned {} namespaces",
        report.links,
        report.maps,
        report.filters,
        report.namespaces.len()
    );
    if report.problems.is_empty() {
        return Ok(());
    }
    let problems: Vec<_> = report.problems.iter().map(|p| shown(p)).collect();
    anyhow::bail!("not everything could be removed; run it again:\n{}", problems.join("\n"))
}
