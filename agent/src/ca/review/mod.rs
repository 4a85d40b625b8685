//! Who asks: a token becomes an agent on a node.
//!
//! The API server says whose token it is and for whom it was made; the node is the one that the API server has the
//! agent's pod on, never one that the agent or its token names.

mod cache;
mod token;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus},
    core::v1::Pod,
};
use kube::{Api, Client, api::PostParams};
use tokio::time::timeout;
use tonic::Code;
use tracing::debug;

use self::cache::Cache;
use crate::pod_identity::{self, NoIdentity};

/// Longest time for one question to the API server.
const API_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an answer is believed: as long as an agent whose pod is gone, or whose token was withdrawn, is still served.
pub(super) const BELIEVED: Duration = Duration::from_secs(30);
/// Longest token, bytes: those of the API server have some 1,200.
const MAX_TOKEN: usize = 12 * 1024;
/// Names in a reviewed token's `extra`.
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
/// From Kubernetes 1.30 on.
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// Namespace and name of a `ServiceAccount`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl ServiceAccount {
    fn username(&self) -> String {
        format!("system:serviceaccount:{}:{}", self.namespace, self.name)
    }
}

/// Whoever asks, once that is proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Agent {
    pub(super) node: String,
    pub(super) namespace: String,
    pub(super) service_account: String,
    pub(super) pod: String,
}

/// Why a token is not accepted. What is said reaches whoever sent it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum ReviewError {
    #[error("no bearer token; send one of the agent's ServiceAccount in the header authorization")]
    NoToken,
    #[error("the token is not valid: expired, withdrawn, or of another cluster")]
    Invalid,
    #[error("the token is not for the audience {0}")]
    Audience(String),
    #[error("{0} is no ServiceAccount of an agent")]
    ServiceAccount(String),
    #[error("the token is bound to no pod; use a projected one")]
    Unbound,
    #[error("the token's pod {0} is gone")]
    PodGone(String),
    #[error("the token's pod {0} runs on no node")]
    NotRunning(String),
    #[error("the token was made for pod {pod} on node {token}, and the pod is on another node")]
    OtherNode { pod: String, token: String },
    #[error("the token's pod {pod}: {why}")]
    NoIdentity { pod: String, why: NoIdentity },
    #[error("the API server does not answer; try again")]
    Api,
}

impl ReviewError {
    pub(super) fn code(&self) -> Code {
        if matches!(self, Self::Api) { Code::Unavailable } else { Code::Unauthenticated }
    }

    /// A word for logs and metrics.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::NoToken => "no-token",
            Self::Invalid => "invalid-token",
            Self::Audience(_) => "wrong-audience",
            Self::ServiceAccount(_) => "wrong-service-account",
            Self::Unbound => "unbound-token",
            Self::PodGone(_) => "pod-gone",
            Self::NotRunning(_) => "pod-not-running",
            Self::OtherNode { .. } => "other-node",
            Self::NoIdentity { .. } => "pod-without-identity",
            Self::Api => "api-unavailable",
        }
    }
}

/// Asks the API server about tokens.
pub(super) struct Reviewer {
    client: Client,
    audience: String,
    agents: Vec<ServiceAccount>,
    cache: Cache,
}

impl Reviewer {
    pub(super) fn new(client: Client, audience: String, agents: Vec<ServiceAccount>) -> Self {
        Self { client, audience, agents, cache: Cache::default() }
    }

    /// Whose token is it?
    pub(super) async fn agent(&self, token: &str) -> Result<Arc<Agent>, ReviewError> {
        if token.is_empty() || token.len() > MAX_TOKEN {
            return Err(ReviewError::Invalid);
        }
        let now = SystemTime::now();
        let key = token::digest(token);
        if let Some(agent) = self.cache.get(&key, now) {
            return Ok(agent);
        }
        let (pod, account) = self.review(token).await?;
        let agent = Arc::new(self.locate(pod, account).await?);
        // Tokens that do not say when they end are asked about every time.
        if let Some(end) = token::end(token) {
            self.cache.put(key, Arc::clone(&agent), end.min(now + BELIEVED), now);
        }
        Ok(agent)
    }

    pub(super) fn tidy(&self) {
        self.cache.tidy(SystemTime::now());
    }

    async fn review(&self, token: &str) -> Result<(PodRef, &ServiceAccount), ReviewError> {
        let spec = TokenReviewSpec { token: Some(token.to_owned()), audiences: Some(vec![self.audience.clone()]) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let reviewed = match timeout(API_TIMEOUT, api.create(&PostParams::default(), &review)).await {
            Ok(Ok(reviewed)) => reviewed,
            Ok(Err(error)) => {
                debug!(%error, "reviewing a token");
                return Err(ReviewError::Api);
            }
            Err(_) => return Err(ReviewError::Api),
        };
        let status = reviewed.status.unwrap_or_default();
        self.judge(&status)
    }

    fn judge(&self, status: &TokenReviewStatus) -> Result<(PodRef, &ServiceAccount), ReviewError> {
        if status.authenticated != Some(true) {
            // The API server only says so in words.
            let audience = status.error.as_deref().is_some_and(|e| e.contains("audience"));
            return Err(if audience { ReviewError::Audience(self.audience.clone()) } else { ReviewError::Invalid });
        }
        // A server that knows nothing of audiences answers without any.
        if !status.audiences.iter().flatten().any(|a| *a == self.audience) {
            return Err(ReviewError::Audience(self.audience.clone()));
        }
        let user = status.user.as_ref().ok_or(ReviewError::Invalid)?;
        let username = user.username.as_deref().unwrap_or_default();
        let account = self.agents.iter().find(|agent| agent.username() == username);
        let account = account.ok_or_else(|| ReviewError::ServiceAccount(username.chars().take(300).collect()))?;
        let extra = |name: &str| match user.extra.as_ref()?.get(name)?.as_slice() {
            [one] if !one.is_empty() => Some(one.clone()),
            _ => None,
        };
        let (Some(name), Some(uid)) = (extra(POD_NAME), extra(POD_UID)) else { return Err(ReviewError::Unbound) };
        // One that is there but names no node, or several, fits no pod.
        let named = user.extra.as_ref().is_some_and(|extra| extra.contains_key(NODE_NAME));
        let node = named.then(|| extra(NODE_NAME).unwrap_or_default());
        Ok((PodRef { name, uid, node }, account))
    }

    async fn locate(&self, pod: PodRef, account: &ServiceAccount) -> Result<Agent, ReviewError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &account.namespace);
        let found = match timeout(API_TIMEOUT, api.get_opt(&pod.name)).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                debug!(pod = pod.name, %error, "getting an agent's pod");
                return Err(ReviewError::Api);
            }
            Err(_) => return Err(ReviewError::Api),
        };
        // Another pod of the name has another uid.
        let found = found.filter(|p| p.metadata.uid.as_deref() == Some(&pod.uid));
        let found = found.ok_or_else(|| ReviewError::PodGone(pod.name.clone()))?;
        let spec = found.spec.unwrap_or_default();
        let phase = found.status.and_then(|s| s.phase).unwrap_or_default();
        if matches!(phase.as_str(), "Succeeded" | "Failed") {
            return Err(ReviewError::NotRunning(pod.name));
        }
        match pod_identity::account(&found.metadata, spec.service_account_name.as_deref()) {
            Ok(named) if *named == account.name => {}
            Ok(named) => return Err(ReviewError::ServiceAccount(named.to_owned())),
            Err(why) => return Err(ReviewError::NoIdentity { pod: pod.name, why }),
        }
        match (spec.node_name, pod.node) {
            (Some(node), Some(token)) if token != node => Err(ReviewError::OtherNode { pod: pod.name, token }),
            (Some(node), _) if !node.is_empty() => Ok(Agent {
                node,
                namespace: account.namespace.clone(),
                service_account: account.name.clone(),
                pod: pod.name,
            }),
            _ => Err(ReviewError::NotRunning(pod.name)),
        }
    }
}

/// The pod that a token is bound to.
struct PodRef {
    name: String,
    uid: String,
    /// The node that it was made for, where the API server says so.
    node: Option<String>,
}
