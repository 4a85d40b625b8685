//! What `--cni` adds.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context as _, bail};
use tokio::task::JoinSet;
use underpass_cni::install::{Entry, Installer};

use crate::{
    cli::RunArgs,
    cni::{self, installer, server},
    proxy::Reconciler,
    sources::kubernetes::{Attachments, KubernetesSource},
};

/// File name of the plugin, beside this program.
const PROGRAM: &str = "underpass-cni";

/// Tells the source whom it works with.
pub(super) fn wired(mut source: KubernetesSource, args: &RunArgs) -> KubernetesSource {
    if args.cni {
        source = source.with_projection(cni::projection(&args.run_dir));
    }
    if let Some(notice) = &args.uninstall_configmap {
        source = source.with_notice(notice.namespace.clone(), notice.name.clone());
    }
    source
}

/// Without pods' names there is nothing to tell the plugin.
pub(super) fn refuse_without_kubernetes(args: &RunArgs) -> anyhow::Result<()> {
    let given = [
        ("--cni", args.cni),
        ("--uninstall-configmap", args.uninstall_configmap.is_some()),
        ("--node-taint", args.node_taint.is_some()),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((option, _)) => {
            bail!("{option} needs a configuration with `kubernetes`: the file's pods are known by their namespaces")
        }
        None => Ok(()),
    }
}

/// Answers the plugin, then puts it on the node: in this order, because from then on pods wait for answers.
pub(super) async fn start(
    tasks: &mut JoinSet<()>,
    args: &RunArgs,
    attachments: Attachments,
    reconciler: &Arc<Reconciler>,
) -> anyhow::Result<()> {
    if !args.cni {
        return Ok(());
    }
    let installer = installer(args)?;
    let server = server::serve(&args.run_dir, attachments, Arc::clone(reconciler))
        .await
        .with_context(|| format!("opening the CNI plugin's socket {}", cni::socket(&args.run_dir).display()))?;
    tasks.spawn(server);
    tasks.spawn(installer::keep(installer));
    Ok(())
}

/// The plugin as it is on this node.
pub(super) fn installer(args: &RunArgs) -> anyhow::Result<Installer> {
    let program = match &args.cni_plugin {
        Some(program) => program.clone(),
        None => beside()?,
    };
    anyhow::ensure!(
        program.is_file(),
        "--cni-plugin: {} is no file; name the program {PROGRAM}, which belongs beside this one",
        program.display()
    );
    let own = args.namespace.iter();
    let mut exempt: Vec<String> = args.cni_exempt.iter().chain(own).cloned().collect();
    exempt.sort_unstable();
    exempt.dedup();
    Ok(Installer {
        program,
        bin_dir: args.cni_bin_dir.clone(),
        conf_dir: args.cni_conf_dir.clone(),
        conf_name: args.cni_conf_name.clone(),
        entry: Entry {
            socket: cni::socket(&args.run_dir),
            projection: cni::projection(&args.run_dir),
            exempt_namespaces: exempt,
        },
    })
}

fn beside() -> anyhow::Result<PathBuf> {
    Ok(std::env::current_exe().context("finding this program's own file")?.with_file_name(PROGRAM))
}
