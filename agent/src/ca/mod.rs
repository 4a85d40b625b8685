//! `underpass ca`: a certificate authority for node agents.
//!
//! It signs for pods, and believes nobody about which: the API server says whose token a request carries (`review`),
//! on which node that agent's pod is, and which pods are on that node (`pods`). Of the signing request only the public
//! key is taken ([`csr`]); the name in the certificate is the identity that was checked. The key that signs lives in a
//! Secret that several replicas share, or is somebody else's (`roots`).

pub mod csr;
mod limits;
mod metrics;
mod pods;
mod publish;
mod review;
mod roots;
mod server;
mod service;
mod signer;
#[cfg(test)]
pub(crate) mod tests;

use std::{sync::Arc, time::Duration};

use kube::Client;
use tokio::{net::TcpListener, sync::watch, task::JoinSet};

pub use limits::Rates;
pub use review::ServiceAccount;
pub use roots::RootSource;
pub use service::{AUDIT, impersonated};

use self::{limits::Limits, metrics::Metrics, pods::Pods, review::Reviewer, server::Serving, service::Service};
use crate::{bounds::Bound, identity::authority::Rules, mesh::TrustDomain};

/// Old entries of limits and caches are dropped this often.
const TIDY: Duration = Duration::from_mins(1);

/// What the server is told.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Identities are of this trust domain.
    pub trust_domain: TrustDomain,
    /// Namespace of the server: its Secret and `ConfigMap` are there.
    pub namespace: String,
    /// Audience that agents' tokens must be for.
    pub audience: String,
    /// Whose tokens are accepted.
    pub agents: Vec<ServiceAccount>,
    /// Where the root comes from.
    pub root: RootSource,
    /// Longest lifetime of a certificate; also how long a new root is distributed before it signs.
    pub lifetime: Duration,
    /// Validity of a root that the server makes.
    pub root_lifetime: Duration,
    /// A root that the server made is replaced when less than this is left of it.
    pub root_replaced_before: Duration,
    /// Names in the serving certificate.
    pub dns_names: Vec<String>,
    /// `ConfigMap` with the roots; none with an empty name.
    pub config_map: String,
    /// Namespaces that it is kept in.
    pub publish_to: Vec<String>,
    /// Limits.
    pub rates: Rates,
    /// Pods that are remembered; others are asked for one by one.
    pub max_pods: usize,
}

/// Serves certificates on `listener`, and health and metrics on `health`, until it is dropped. Returns only with an error.
pub async fn run(
    settings: Settings,
    client: Client,
    listener: TcpListener,
    health: Option<TcpListener>,
) -> anyhow::Result<()> {
    let (current, signer) = watch::channel(None);
    let pods = Arc::new(Pods::new(client.clone(), settings.max_pods));
    let reviewer = Arc::new(Reviewer::new(client.clone(), settings.audience, settings.agents));
    let limits = Arc::new(Limits::new(&settings.rates));
    let metrics = Arc::new(Metrics::default());
    let serving = Arc::new(Serving::default());
    let rules = Rules {
        organisation: "Underpass",
        common_name: settings.trust_domain.to_string(),
        lifetime: settings.lifetime,
        root_validity: settings.root_lifetime,
        replaced_before: settings.root_replaced_before,
    };

    // Dropped with this future, and every task with it.
    let mut tasks = JoinSet::new();
    let (source, namespace, api) = (settings.root, settings.namespace, client.clone());
    tasks.spawn(async move { roots::run(source, api, &namespace, rules, current).await });
    if !settings.config_map.is_empty() {
        let (namespaces, name, from) = (settings.publish_to, settings.config_map, signer.clone());
        tasks.spawn(async move { publish::run(client, &namespaces, &name, from).await });
    }
    let (names, from, shown) = (settings.dns_names, signer.clone(), Arc::clone(&serving));
    let lifetime = settings.lifetime.min(server::SERVING);
    tasks.spawn(async move { shown.keep(&names, lifetime, from).await });
    let watched = Arc::clone(&pods);
    tasks.spawn(async move { watched.watch().await });
    if let Some(listener) = health {
        let view = metrics::View { metrics: Arc::clone(&metrics), pods: Arc::clone(&pods), signer: signer.clone() };
        tasks.spawn(crate::admin::http::serve(listener, metrics::router(view), Bound::Probes));
    }
    let tidied = (Arc::clone(&pods), Arc::clone(&reviewer), Arc::clone(&limits));
    tasks.spawn(async move {
        loop {
            tokio::time::sleep(TIDY).await;
            tidied.0.tidy();
            tidied.1.tidy();
            tidied.2.tidy();
        }
    });

    let service = Service {
        trust_domain: settings.trust_domain,
        lifetime: settings.lifetime,
        signer,
        reviewer,
        pods,
        limits,
        metrics,
    };
    tokio::select! {
        served = server::serve(listener, serving, service, settings.rates.connections) => served,
        // Each of them runs forever; one that does not has panicked.
        Some(ended) = tasks.join_next() => match ended {
            Ok(()) => Err(anyhow::anyhow!("a part of the server ended")),
            Err(error) => Err(anyhow::Error::new(error).context("a part of the server failed")),
        },
    }
}
