//! Port 15020: `OpenMetrics`. Everything is read when somebody asks; nothing is prepared.

mod agent;
mod encode;
mod node;
mod process;
mod traffic;

use std::fmt;

use axum::{Router, extract::State, http::StatusCode, response::Response, routing::get};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, text},
    registry::Registry,
};
use tokio::sync::Semaphore;

use super::{View, answer, refuse};

/// Media type of the format (`OpenMetrics` 1.0, section "Content type").
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The routes.
pub fn router(view: View) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/stats/prometheus", get(metrics))
        .fallback(async || refuse(StatusCode::NOT_FOUND, "there are /metrics and /stats/prometheus"))
        .with_state(view)
}

async fn metrics(State(view): State<View>) -> Response {
    static TURNS: Semaphore = Semaphore::const_new(1);
    answer(CONTENT_TYPE, &TURNS, move || render(&view)).await
}

/// The exposition.
pub(super) fn render(view: &View) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(All(view.clone())));
    let mut text = String::new();
    text::encode(&mut text, &registry).unwrap_or_else(|e| unreachable!("writing to a string: {e}"));
    text
}

struct All(View);

impl fmt::Debug for All {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("All")
    }
}

impl Collector for All {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        let view = &self.0;
        // First, so that the bytes of live connections are in all sums.
        let live = view.table.settled();
        traffic::encode(&mut to, &view.telemetry.traffic)?;
        agent::encode(&mut to, view, &live)?;
        node::encode(&mut to, view)?;
        process::encode(&mut to)
    }
}
