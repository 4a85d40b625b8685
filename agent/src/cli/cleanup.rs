//! `underpass cleanup`.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;

use underpass_cni::install::Installer;

use super::{DEFAULT_PIN_ROOT, DEFAULT_RUN_DIR, exit::EXIT_CODES, output::shown};
use crate::{capture, cni, identity::kept};

/// Arguments of `underpass cleanup`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES}

Pods that were enrolled talk in plaintext afterwards.
A running agent is not disturbed unless --force is given.

Examples:
  underpass cleanup
  underpass cleanup --cni
  underpass cleanup --netns /run/netns/web --netns /run/netns/db"))]
pub struct CleanupArgs {
    /// Directory on bpffs that the agent pinned under.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_PIN_ROOT)]
    pub pin_root: PathBuf,
    /// A pod's network namespace to remove tc programs, rules and routes from; can be given more than once.
    #[arg(long, value_name = "PATH")]
    pub netns: Vec<PathBuf>,
    /// Remove the CNI plugin, too: its entry in the node's network configuration, and its program.
    #[arg(long)]
    pub cni: bool,
    /// The node's directory for CNI plugins.
    #[arg(long, value_name = "PATH", default_value = "/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,
    /// The node's directory for CNI configurations.
    #[arg(long, value_name = "PATH", default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,
    /// Directory of the agent's sockets, and of certificates that it kept for a restart.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_RUN_DIR, env = "UNDERPASS_RUN_DIR")]
    pub run_dir: PathBuf,
    /// Clean up although an agent seems to be running.
    #[arg(long)]
    pub force: bool,
}

pub(super) fn cleanup(args: &CleanupArgs) -> anyhow::Result<()> {
    // First: while an agent runs nothing is touched, the plugin neither.
    remove(&args.pin_root, &args.netns, args.force)?;
    kept::remove_all(&args.run_dir)
        .with_context(|| format!("removing the certificates that are kept in {}", args.run_dir.display()))?;
    if args.cni { remove_plugin(args) } else { Ok(()) }
}

fn remove_plugin(args: &CleanupArgs) -> anyhow::Result<()> {
    let installer = Installer {
        // Only installing needs these.
        program: PathBuf::new(),
        conf_name: None,
        entry: cni::entry(&args.run_dir, Vec::new()),
        bin_dir: args.cni_bin_dir.clone(),
        conf_dir: args.cni_conf_dir.clone(),
    };
    let removed = installer.remove().context("removing the CNI plugin")?;
    cni::remove(&args.run_dir)
        .with_context(|| format!("removing what the plugin needs in {}", args.run_dir.display()))?;
    for file in &removed.files {
        println!("took the CNI plugin out of {}", shown(&file.display().to_string()));
    }
    if removed.program {
        println!("removed the CNI plugin from {}", shown(&args.cni_bin_dir.display().to_string()));
    }
    let skipped: Vec<_> = removed.skipped.iter().map(|file| shown(&file.to_string()).to_string()).collect();
    anyhow::ensure!(skipped.is_empty(), "these cannot be read and were left alone:\n{}", skipped.join("\n"));
    Ok(())
}

/// Removes, prints what was removed, and fails when something is left.
fn remove(pin_root: &Path, pods: &[PathBuf], force: bool) -> anyhow::Result<()> {
    let report = super::runtime::small()?.block_on(capture::cleanup::cleanup(pin_root, pods, force))?;
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
