//! One Secret.

use std::{collections::BTreeMap, pin::Pin, time::Duration};

use futures_util::{Stream, StreamExt as _};
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{
    Api, Client,
    api::PostParams,
    core::ObjectMeta,
    runtime::{WatchStreamExt as _, watcher},
};
use tokio::time::timeout;
use tracing::debug;

use super::API_TIMEOUT;

/// Why a Secret could not be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum SecretError {
    /// Somebody else changed or created it meanwhile: read it again.
    #[error("Secret {0} was changed by somebody else at the same time")]
    Conflict(String),
    /// It is not there, or a part of it is missing or broken.
    #[error("Secret {name}: {problem}")]
    Content { name: String, problem: String },
    /// The API server refused or was not reached.
    #[error("{action} Secret {name}: {reason}")]
    Api { action: &'static str, name: String, reason: String },
}

/// A Secret by its name.
pub(super) struct Secrets {
    api: Api<Secret>,
    namespace: String,
    name: String,
}

/// Resolves when a Secret may have changed.
pub(super) type Changes = Pin<Box<dyn Stream<Item = ()> + Send>>;

impl Secrets {
    pub(super) fn new(client: Client, namespace: &str, name: &str) -> Self {
        Self { api: Api::namespaced(client, namespace), namespace: namespace.to_owned(), name: name.to_owned() }
    }

    pub(super) fn content(&self, problem: impl Into<String>) -> SecretError {
        SecretError::Content { name: self.path(), problem: problem.into() }
    }

    pub(super) async fn get(&self) -> Result<Option<Secret>, SecretError> {
        let got = timeout(API_TIMEOUT, self.api.get_opt(&self.name)).await;
        got.map_err(|_| self.late("reading"))?.map_err(|e| self.error("reading", "get", &e))
    }

    /// Replaces its data, unless it changed since it was read.
    pub(super) async fn replace(&self, secret: &Secret) -> Result<(), SecretError> {
        let put = timeout(API_TIMEOUT, self.api.replace(&self.name, &PostParams::default(), secret)).await;
        put.map_err(|_| self.late("writing"))?.map(drop).map_err(|e| self.error("writing", "update", &e))
    }

    /// Creates it, unless somebody else did.
    pub(super) async fn create(&self, data: BTreeMap<String, ByteString>) -> Result<(), SecretError> {
        let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
        let secret = Secret { metadata, data: Some(data), ..Secret::default() };
        let post = timeout(API_TIMEOUT, self.api.create(&PostParams::default(), &secret)).await;
        post.map_err(|_| self.late("creating"))?.map(drop).map_err(|e| match e {
            kube::Error::Api(status) if status.code == 403 => self.content(format!(
                "it is missing, and this ServiceAccount may not create it; create an empty one with kubectl -n {} \
                 create secret generic {}",
                self.namespace, self.name
            )),
            e => self.error("creating", "create", &e),
        })
    }

    /// Items mean that it may have changed; they come at least that often.
    pub(super) fn changes(&self) -> Changes {
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.name));
        let name = self.path();
        let events = watcher::watcher(self.api.clone(), config).default_backoff();
        Box::pin(events.filter_map(move |event| {
            let changed = match event {
                Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => None,
                Ok(_) => Some(()),
                Err(error) => {
                    debug!(secret = name, %error, "the watch broke; it is started again");
                    None
                }
            };
            std::future::ready(changed)
        }))
    }

    fn path(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    fn late(&self, action: &'static str) -> SecretError {
        let reason = format!("no answer from the API server within {API_TIMEOUT:?}");
        SecretError::Api { action, name: self.path(), reason }
    }

    fn error(&self, action: &'static str, verb: &str, error: &kube::Error) -> SecretError {
        match error {
            kube::Error::Api(status) if status.code == 409 => SecretError::Conflict(self.path()),
            kube::Error::Api(status) if status.code == 403 => SecretError::Api {
                action,
                name: self.path(),
                reason: format!("{}; its Role needs the verb {verb} on this Secret", status.message),
            },
            error => SecretError::Api { action, name: self.path(), reason: error.to_string() },
        }
    }
}

/// The next change, or the end of `limit`.
pub(super) async fn next(changes: &mut Changes, limit: Duration) {
    // The watcher never ends; if it did, the limit would be what is left.
    if let Ok(None) = timeout(limit, changes.next()).await {
        tokio::time::sleep(limit).await;
    }
}
