//! The agent's TCP ports on the node: opened before anything is changed, so that a port in use is an error at once.

use std::sync::Arc;

use anyhow::Context as _;
use tokio::{net::TcpListener, sync::Notify, task::JoinSet};
use tracing::info;

use super::{RunArgs, run::Endpoint};
use crate::{
    admin::http::{self, Health, View},
    bounds::Bound,
};

/// The listeners.
pub(super) struct Ports {
    admin: Option<TcpListener>,
    metrics: Option<TcpListener>,
    health: Option<TcpListener>,
}

impl Ports {
    pub(super) async fn open(args: &RunArgs) -> anyhow::Result<Self> {
        Ok(Self {
            admin: open("--admin-addr", args.admin_addr).await?,
            metrics: open("--metrics-addr", args.metrics_addr).await?,
            health: open("--health-addr", args.health_addr).await?,
        })
    }

    /// Answers the kubelet from now on: not ready, until what is returned watches.
    pub(super) fn answer_probes(&mut self, tasks: &mut JoinSet<()>) -> Arc<Health> {
        let health = Arc::new(Health::default());
        if let Some(listener) = self.health.take() {
            tasks.spawn(http::serve(listener, http::health(Arc::clone(&health)), Bound::Probes));
        }
        health
    }

    /// Answers everybody else; `quit` is told when somebody asks the agent to end.
    pub(super) fn answer(self, tasks: &mut JoinSet<()>, view: &View, quit: &Arc<Notify>) {
        if let Some(listener) = self.admin {
            tasks.spawn(http::serve(listener, http::admin(view.clone(), Arc::clone(quit)), Bound::Admin));
        }
        if let Some(listener) = self.metrics {
            tasks.spawn(http::serve(listener, http::metrics(view.clone()), Bound::Probes));
        }
    }
}

async fn open(option: &str, endpoint: Endpoint) -> anyhow::Result<Option<TcpListener>> {
    let Endpoint::At(address) = endpoint else { return Ok(None) };
    let remedy = || format!("listening on {address}; choose another address with {option}, or {option} off");
    let listener = http::bind(address).await.with_context(remedy)?;
    let address = listener.local_addr().with_context(remedy)?;
    info!(option, %address, "listening");
    Ok(Some(listener))
}
