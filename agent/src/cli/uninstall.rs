//! `underpass uninstall`: asks every agent to give its node back, and waits until they have.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use clap::Args;
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{ConfigMap, Pod},
};
use kube::{
    Api, Client, Config,
    api::{ListParams, Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{exit::EXIT_CODES, run::ObjectName};
use crate::sources::kubernetes::UNINSTALL;

/// How often the agents are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Readiness that an agent lost is in the API server's books after the kubelet's probes: so long the first look waits for it.
const SETTLE: Duration = Duration::from_secs(2);

/// Arguments of `underpass uninstall`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES}

Helm runs this before it deletes the release. Every agent un-enrols its pods, which keep running and talk plain TCP from
then on, and removes programs, pins, routes and the CNI plugin from its node.

Examples:
  underpass uninstall --configmap underpass-system/underpass-uninstall --daemonset underpass-system/underpass-agent"))]
pub(super) struct UninstallArgs {
    /// The `ConfigMap` that the agents watch (their --uninstall-configmap).
    #[arg(long, value_name = "NAMESPACE/NAME")]
    configmap: ObjectName,
    /// The agents' `DaemonSet`.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    daemonset: ObjectName,
    /// How long to wait, e.g. 2m.
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// How to reach the API server [default: as a pod].
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

/// Runs it.
pub(super) fn uninstall(args: &UninstallArgs) -> anyhow::Result<()> {
    super::runtime::small()?.block_on(ask_and_wait(args))
}

async fn ask_and_wait(args: &UninstallArgs) -> anyhow::Result<()> {
    let config = match &args.kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path).with_context(|| format!("--kubeconfig {}", path.display()))?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .with_context(|| format!("--kubeconfig {}", path.display()))?
        }
        None => Config::incluster().context("this is no pod with a service account; name a --kubeconfig")?,
    };
    let client = Client::try_from(config).context("making a client")?;

    let ObjectName { namespace, name } = &args.configmap;
    let maps = Api::<ConfigMap>::namespaced(client.clone(), namespace);
    let now = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
    let patch = json!({ "data": { UNINSTALL: now } });
    maps.patch(name, &PatchParams::default(), &Patch::Merge(patch))
        .await
        .with_context(|| format!("writing `{UNINSTALL}` into the ConfigMap {namespace}/{name}"))?;
    println!("asked the agents to give their nodes back");

    let ObjectName { namespace, name } = &args.daemonset;
    let sets = Api::<DaemonSet>::namespaced(client.clone(), namespace);
    let end = Instant::now() + args.timeout;
    sleep(SETTLE).await;
    let mut last = None;
    loop {
        let set = sets.get_opt(name).await.with_context(|| format!("reading the DaemonSet {namespace}/{name}"))?;
        let Some(set) = set else {
            println!("there is no DaemonSet {namespace}/{name}: no agent runs");
            return Ok(());
        };
        let ready = set.status.as_ref().map_or(0, |status| status.number_ready);
        if ready == 0 {
            println!("every agent that runs has given its node back");
            return Ok(());
        }
        if last.replace(ready) != Some(ready) {
            println!("{ready} agents are not done yet");
        }
        if Instant::now() >= end {
            let labels = set.spec.and_then(|spec| spec.selector.match_labels).unwrap_or_default();
            bail!(
                "after {:?} these nodes are not done: {}; see the logs of their agents, or run `underpass cleanup` there",
                args.timeout,
                nodes(client, namespace, &labels).await
            );
        }
        sleep(LOOK).await;
    }
}

/// The nodes with an agent that is ready, for people.
async fn nodes(client: Client, namespace: &str, labels: &std::collections::BTreeMap<String, String>) -> String {
    let selector: Vec<String> = labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let pods = Api::<Pod>::namespaced(client, namespace);
    let pods = match pods.list(&ListParams::default().labels(&selector.join(","))).await {
        Ok(pods) => pods,
        Err(error) => return format!("(their names cannot be read: {error})"),
    };
    let ready = |pod: &Pod| {
        let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
        conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
    };
    let mut names: Vec<String> = pods.items.into_iter().filter(ready).filter_map(|pod| pod.spec?.node_name).collect();
    names.sort_unstable();
    names.join(", ")
}
