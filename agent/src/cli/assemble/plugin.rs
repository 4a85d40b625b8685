//! What `--cni` adds.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use futures_util::future::join_all;
use tokio::{
    task::{JoinSet, spawn_blocking},
    time::timeout,
};
use underpass_cni::install::Installer;

use crate::{
    cli::RunArgs,
    cni::{self, installer, server},
    proxy::Reconciler,
    sources::kubernetes::{Attachment, Attachments, KubernetesSource},
};

/// File name of the plugin, beside this program.
const PROGRAM: &str = "underpass-cni";
/// How long pods that were handed over last may take to be part of a snapshot; making one takes milliseconds.
const JUDGED: Duration = Duration::from_secs(1);

/// Tells the source whom it works with, and which pods were handed to agents before this one.
pub(super) async fn wired(mut source: KubernetesSource, args: &RunArgs) -> anyhow::Result<KubernetesSource> {
    if args.cni {
        source = source.with_projection(cni::projection(&args.run_dir)).with_attached(recall(args).await?);
    }
    if let Some(notice) = &args.uninstall_configmap {
        source = source.with_notice(notice.namespace.clone(), notice.name.clone());
    }
    Ok(source)
}

/// Without pods' names there is nothing to tell the plugin.
pub(super) fn refuse_without_kubernetes(args: &RunArgs) -> anyhow::Result<()> {
    let given = [("--cni", args.cni), ("--uninstall-configmap", args.uninstall_configmap.is_some())];
    match given.iter().find(|(_, given)| *given) {
        Some((option, _)) => {
            bail!("{option} needs a configuration with `kubernetes`: the file's pods are known by their namespaces")
        }
        None => Ok(()),
    }
}

async fn recall(args: &RunArgs) -> anyhow::Result<Vec<Attachment>> {
    let run_dir = args.run_dir.clone();
    spawn_blocking(move || server::recall(&run_dir))
        .await
        .context("recalling pods")?
        .with_context(|| format!("recalling pods that were handed over before, below {}", args.run_dir.display()))
}

/// Takes in what was handed to the agent before while this one started. That one answers the plugin no more.
pub(super) async fn recall_latest(args: &RunArgs, attachments: &Attachments) -> anyhow::Result<()> {
    if !args.cni {
        return Ok(());
    }
    let known = attachments.containers();
    let mut added = Vec::new();
    for attachment in recall(args).await?.into_iter().filter(|pod| !known.contains(&pod.container)) {
        added.push(attachment.container.clone());
        attachments.add(attachment).await;
    }
    // The snapshot that is enrolled first has them; one that the API server has not told of has not started.
    let judged = added.iter().map(|container| attachments.verdict(container));
    let _ = timeout(JUDGED, join_all(judged)).await;
    Ok(())
}

/// Answers the plugin, then puts it on the node: in this order, because from then on pods wait for answers.
pub(super) fn start(
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
        entry: cni::entry(&args.run_dir, exempt),
    })
}

fn beside() -> anyhow::Result<PathBuf> {
    Ok(std::env::current_exe().context("finding this program's own file")?.with_file_name(PROGRAM))
}
