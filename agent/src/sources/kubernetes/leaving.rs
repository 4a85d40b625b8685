//! Un-enrolling everything because Underpass is removed: a `ConfigMap` asks for it, whoever takes the agent apart waits for it.

use std::pin::pin;

use futures_util::TryStreamExt as _;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use tokio::sync::{mpsc, watch};
use tracing::warn;

use super::cluster::News;

/// Key in the `ConfigMap` that asks for it, whatever its value.
pub const UNINSTALL: &str = "uninstall";

/// How far the way out of the mesh has been gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Step {
    /// Nobody asks for it.
    #[default]
    Staying,
    /// Pods are on their way out.
    Going,
    /// The snapshot has no pod of this node any more.
    Gone,
}

/// Announces the steps.
#[derive(Debug, Default)]
pub struct Leaving(watch::Sender<Step>);

impl Leaving {
    pub(super) fn say(&self, asked: bool, gone: bool) {
        let step = match (asked, gone) {
            (false, _) => Step::Staying,
            (true, false) => Step::Going,
            (true, true) => Step::Gone,
        };
        self.0.send_if_modified(|now| std::mem::replace(now, step) != step);
    }

    /// Resolves when the snapshots say that nobody takes part any more.
    pub async fn gone(&self) {
        // The sender is part of self.
        let _ = self.0.subscribe().wait_for(|step| *step == Step::Gone).await;
    }
}

/// Follows the `ConfigMap` for ever. Not being able to see it is no reason to leave.
pub(super) async fn follow(client: Client, namespace: String, name: String, news: mpsc::Sender<News>) {
    let api = Api::<ConfigMap>::namespaced(client, &namespace);
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut events = pin!(watcher(api, config).default_backoff());
    let mut said = None;
    loop {
        let asked = match events.try_next().await {
            Ok(Some(Event::Apply(map) | Event::InitApply(map))) => {
                map.data.is_some_and(|data| data.contains_key(UNINSTALL))
            }
            Ok(Some(Event::Delete(_))) => false,
            Ok(Some(Event::Init | Event::InitDone)) => continue,
            Ok(None) => return,
            Err(error) => {
                let text = error.to_string();
                if said.replace(text.clone()) != Some(text) {
                    warn!(%error, configmap = %format!("{namespace}/{name}"), "it cannot be seen whether Underpass is being removed");
                }
                continue;
            }
        };
        said = None;
        if news.send(News::Leaving(asked)).await.is_err() {
            return;
        }
    }
}
