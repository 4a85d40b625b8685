//! Taking the taint off the node that kept pods away until the agent was there.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::admin::http::Health;

/// How often it is looked whether the agent serves.
const LOOK: Duration = Duration::from_millis(200);
/// Pause after an attempt that failed.
const AGAIN: Duration = Duration::from_secs(5);

/// Removes every taint with this key once the agent is ready. Tries until it has succeeded.
pub(super) async fn remove(client: Client, node: String, key: String, health: Arc<Health>) {
    // Conditions are judged when they are asked for: nothing announces that they hold.
    while health.readiness().is_err() {
        sleep(LOOK).await;
    }
    let nodes = Api::<Node>::all(client);
    loop {
        match remove_once(&nodes, &node, &key).await {
            Ok(true) => return info!(node, key, "took the taint off the node"),
            Ok(false) => return,
            Err(error) => warn!(node, key, %error, "cannot take the taint off the node; trying again"),
        }
        sleep(AGAIN).await;
    }
}

/// `false` when there was none.
async fn remove_once(nodes: &Api<Node>, node: &str, key: &str) -> kube::Result<bool> {
    let now = nodes.get(node).await?;
    let taints = now.spec.and_then(|spec| spec.taints).unwrap_or_default();
    let kept: Vec<_> = taints.iter().filter(|taint| taint.key != key).collect();
    if kept.len() == taints.len() {
        return Ok(false);
    }
    // The version makes it fail when somebody else changes the list at the same time.
    let patch = json!({ "metadata": { "resourceVersion": now.metadata.resource_version }, "spec": { "taints": kept } });
    nodes.patch(node, &PatchParams::default(), &Patch::Merge(patch)).await?;
    Ok(true)
}
