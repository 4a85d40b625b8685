//! What the server counts, and `/metrics`, `/healthz/ready` and `/healthz/live` on a port of their own.

use std::{fmt, sync::Arc, time::SystemTime};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse as _, Response},
    routing::get,
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _, text},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::ConstGauge,
    },
    registry::Registry,
};
use tokio::sync::watch;

use crate::bounds::{Bound, evictions, refusals};

use super::{pods::Pods, signer::Current};

/// Media type of the format (`OpenMetrics` 1.0, section "Content type").
const CONTENT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Counters.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    pub(super) signed: Counter,
    pub(super) refused: Family<Reason, Counter>,
    /// Refusals without a line in the log.
    pub(super) unlogged: Counter,
    pub(super) connections: Counter,
    pub(super) failed_handshakes: Counter,
}

/// Label of refusals.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Reason {
    pub(super) reason: &'static str,
}

/// What the port shows.
#[derive(Clone)]
pub(super) struct View {
    pub(super) metrics: Arc<Metrics>,
    pub(super) pods: Arc<Pods>,
    pub(super) signer: watch::Receiver<Current>,
}

/// The routes.
pub(super) fn router(view: View) -> Router {
    Router::new()
        .route("/healthz/live", get(async || "ok\n"))
        .route("/healthz/ready", get(ready))
        .route("/metrics", get(metrics))
        .fallback(async || (StatusCode::NOT_FOUND, "there are /healthz/ready, /healthz/live and /metrics\n"))
        .with_state(view)
}

/// Ready is who can sign. Unknown pods are asked for one by one, so the watch need not have begun.
async fn ready(State(view): State<View>) -> Response {
    match view.signer.borrow().as_ref() {
        Some(signer) if signer.not_after() > SystemTime::now() => "ok\n".into_response(),
        Some(_) => (StatusCode::SERVICE_UNAVAILABLE, "the signing certificate has expired\n").into_response(),
        None => (StatusCode::SERVICE_UNAVAILABLE, "no signing key yet; see the log\n").into_response(),
    }
}

async fn metrics(State(view): State<View>) -> Response {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(view));
    let mut body = String::new();
    text::encode(&mut body, &registry).unwrap_or_else(|e| unreachable!("writing to a string: {e}"));
    ([(CONTENT_TYPE, CONTENT)], body).into_response()
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("View")
    }
}

impl Collector for View {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        let m = &self.metrics;
        let mut counter = |name: &str, help: &str, value: &Counter| {
            let value = ConstCounter::new(value.get());
            value.encode(to.encode_descriptor(name, help, None, value.metric_type())?)
        };
        counter("underpass_ca_signed", "Certificates signed", &m.signed)?;
        counter("underpass_ca_refusals_not_logged", "Refusals that had no line in the log", &m.unlogged)?;
        counter("underpass_ca_connections", "Connections accepted", &m.connections)?;
        counter("underpass_ca_failed_handshakes", "Connections whose TLS handshake failed", &m.failed_handshakes)?;
        m.refused.encode(to.encode_descriptor(
            "underpass_ca_refused",
            "Requests refused",
            None,
            m.refused.metric_type(),
        )?)?;
        for (name, help, count) in [
            (
                "underpass_pool_evictions",
                "Peers that had proved nothing and lost their place to a newcomer",
                evictions as fn(Bound) -> u64,
            ),
            ("underpass_pool_refusals", "Newcomers that found no place", refusals),
        ] {
            let mut family = to.encode_descriptor(name, help, None, MetricType::Counter)?;
            for bound in Bound::CA {
                let value = ConstCounter::new(count(bound));
                value.encode(family.encode_family(&[("pool", bound.as_str())])?)?;
            }
        }
        let mut gauge = |name: &str, help: &str, value: i64| {
            let value = ConstGauge::new(value);
            value.encode(to.encode_descriptor(name, help, None, value.metric_type())?)
        };
        gauge("underpass_ca_pods", "Pods that are known", i64::try_from(self.pods.len()).unwrap_or(i64::MAX))?;
        if let Some(signer) = self.signer.borrow().as_ref() {
            let end = signer.not_after().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
            let end = i64::try_from(end).unwrap_or(i64::MAX);
            gauge("underpass_ca_signer_expiry_timestamp_seconds", "End of the signing certificate", end)?;
            let roots = i64::try_from(signer.roots().len()).unwrap_or(i64::MAX);
            gauge("underpass_ca_roots", "Roots that are distributed", roots)?;
        }
        Ok(())
    }
}
