//! `underpass cleanup`.

use std::path::{Path, PathBuf};

use clap::Args;

use super::{DEFAULT_PIN_ROOT, EXIT_CODES};

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

/// The one call into capture: `capture::cleanup::cleanup(pin_root, pods, force).await`, and its report printed.
fn remove(pin_root: &Path, pods: &[PathBuf], force: bool) -> anyhow::Result<()> {
    let _ = (pin_root, pods, force);
    todo!()
}
