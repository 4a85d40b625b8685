//! The roots in a `ConfigMap`: what agents verify this server with.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
    core::ObjectMeta,
};
use serde_json::json;
use tokio::{sync::watch, time::timeout};
use tracing::{info, warn};

use super::signer::Current;

/// Key in the `ConfigMap`.
pub const KEY: &str = "ca.crt";
/// Somebody else's change is put right after this long.
const CHECK: Duration = Duration::from_mins(5);
/// Pause after a failure.
const RETRY: Duration = Duration::from_secs(5);
/// Longest time for one request to the API server.
const API_TIMEOUT: Duration = Duration::from_secs(10);

/// Keeps the `ConfigMap` `name` in these namespaces equal to the signer's roots, until it is dropped.
pub(super) async fn run(client: Client, namespaces: &[String], name: &str, mut signer: watch::Receiver<Current>) {
    loop {
        let current = signer.borrow_and_update().clone();
        let mut failed = false;
        if let Some(current) = current {
            let roots: Arc<str> = current.roots_pem().into();
            for namespace in namespaces {
                let api = Api::namespaced(client.clone(), namespace);
                match timeout(API_TIMEOUT, publish(&api, name, &roots)).await {
                    Ok(Ok(false)) => {}
                    Ok(Ok(true)) => info!(namespace, name, roots = current.roots().len(), "published the roots"),
                    Ok(Err(error)) => {
                        failed = true;
                        warn!(namespace, name, %error, "the roots are not published; a Role needs the verbs get and patch on this ConfigMap, and create where it does not exist");
                    }
                    Err(_) => {
                        failed = true;
                        warn!(namespace, name, "the roots are not published: no answer from the API server");
                    }
                }
            }
        }
        // An error means that nobody signs any more, and then the process ends.
        let _ = timeout(if failed { RETRY } else { CHECK }, signer.changed()).await;
    }
}

/// Returns whether something had to be changed.
async fn publish(api: &Api<ConfigMap>, name: &str, roots: &str) -> kube::Result<bool> {
    let Some(found) = api.get_opt(name).await? else {
        let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
        let data = Some(BTreeMap::from([(KEY.to_owned(), roots.to_owned())]));
        return match api.create(&PostParams::default(), &ConfigMap { metadata, data, ..ConfigMap::default() }).await {
            // Another replica was faster, with the same roots or with others: the next round looks.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            created => created.map(|_| true),
        };
    };
    if found.data.as_ref().and_then(|data| data.get(KEY)).is_some_and(|published| published == roots) {
        return Ok(false);
    }
    let patch = json!({ "data": { KEY: roots } });
    api.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await.map(|_| true)
}
