//! What the node's tools ask the agent over HTTP, on Istio's ports and paths.
//!
//! | Port | Path | |
//! |---|---|---|
//! | 127.0.0.1:15000 | `GET /config_dump` | everything known, as `istioctl ztunnel-config` reads it; no key |
//! | | `GET`, `POST /logging` | the log's filter |
//! | | `POST /quitquitquit` | ends the agent as SIGTERM does |
//! | 15020 | `GET /metrics`, `/stats/prometheus` | OpenMetrics |
//! | 15021 | `GET /healthz/ready`, `/healthz/live` | 200, or 503 with the reasons |

mod admin;
mod config_dump;
mod health;
mod metrics;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use tokio::{net::TcpListener, sync::Semaphore, task::JoinSet, time::sleep};
use tracing::warn;

pub use admin::router as admin;
pub use health::{Health, router as health};
pub use metrics::router as metrics;

use super::server;
use crate::{
    bounds::{self, Bound, Pool, Rule},
    capture::{InterfaceGuard, Share},
    identity::CertificateStore,
    mesh::MeshStore,
    proxy::{Applied, PodStatus},
    relay::{ConnectionTable, ThreadHealth},
    sources::{file::ReloadStatus, kubernetes::SourceStatus},
    telemetry::Telemetry,
};

/// Connections served at once on one port, from the node itself and from elsewhere: whoever is on
/// the network cannot take the kubelet's.
const OWN: usize = 16;
const FOREIGN: usize = 48;
/// A source's share is one of so many.
const SOURCES: usize = 4;
/// Pause after a failed `accept` (out of descriptors), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What is shown.
#[derive(Clone)]
pub struct View {
    /// The configuration in force.
    pub mesh: Arc<MeshStore>,
    /// Live connections.
    pub table: Arc<ConnectionTable>,
    /// Certificates of local identities.
    pub certificates: Arc<CertificateStore>,
    /// What was counted.
    pub telemetry: Arc<Telemetry>,
    /// Everything else.
    pub node: Arc<dyn NodeView>,
}

/// The parts of the agent that need a kernel to be there.
pub trait NodeView: Send + Sync + 'static {
    /// The BPF programs' counters by name.
    fn bpf_counters(&self) -> BTreeMap<String, u64>;
    /// Entries in the BPF maps that the agent writes: name, entries, room.
    fn bpf_maps(&self) -> Vec<(&'static str, usize, usize)>;
    /// Pods with forbidden plaintext connections that could not be ended yet, see
    /// [`crate::capture::Capture::unswept`].
    fn plaintext_left(&self) -> usize;
    /// The fullest pods in the BPF maps that pods share.
    fn bpf_shares(&self) -> Vec<Share>;
    /// What is enforced more strictly than it is written, because it does not fit into the BPF maps.
    fn capture_problems(&self) -> Vec<String>;
    /// The interfaces by which packets leave this node's enrolled pods.
    fn interfaces(&self) -> Vec<InterfaceGuard>;
    /// This node's pods, enrolled or not.
    fn pods(&self) -> Vec<PodStatus>;
    /// Addresses that several objects of the source claim.
    fn disputed_addresses(&self) -> usize {
        0
    }
    /// The configuration that the pods have been made equal to.
    fn applied(&self) -> Applied;
    /// What happened to the configuration file.
    fn reload(&self) -> ReloadStatus;
    /// The Kubernetes source, when there is one.
    fn cluster(&self) -> Option<SourceStatus>;
    /// The relay's threads.
    fn relay(&self) -> Vec<ThreadHealth>;
}

/// Listens. On `[::]` also where the node has no IPv6.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(e) if address.is_ipv6() && address.ip().is_unspecified() && no_ipv6(&e) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
}

fn no_ipv6(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

/// Answers until it is dropped. Who says nothing loses the place to whoever comes.
pub async fn serve(listener: TcpListener, router: Router, bound: Bound) {
    let pool = |total, share, strict| Pool::new(Rule { total, share, strict, grace: Duration::ZERO, bound });
    // The node is one source; whoever else there is must not be kept waiting by one that asks a
    // lot.
    let (own, foreign) = (pool(OWN, OWN / SOURCES, false), pool(FOREIGN, FOREIGN / SOURCES, true));
    // Dropped with this future, and every connection with it.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, peer)) => {
                let here = peer.ip().to_canonical();
                let is_own = here.is_loopback() || stream.local_addr().is_ok_and(|to| to.ip().to_canonical() == here);
                let pool = if is_own { &own } else { &foreign };
                let Ok(entry) = pool.try_enter(&bounds::source(here)) else {
                    pool.refuse();
                    continue;
                };
                connections.spawn(server::guarded(stream, router.clone(), entry));
            }
            Err(reason) => {
                warn!(%reason, "admin port: accept failed");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Runs `work` where it may block, and answers with what it returns. It is much work: whoever asks
/// again and again gets one answer after the other, and no more processors than `turns` has places.
async fn answer(
    content_type: &'static str,
    turns: &'static Semaphore,
    work: impl FnOnce() -> String + Send + 'static,
) -> Response {
    let _turn = turns.acquire().await;
    match tokio::task::spawn_blocking(work).await {
        Ok(body) => ([(CONTENT_TYPE, content_type)], body).into_response(),
        Err(_) => refuse(StatusCode::INTERNAL_SERVER_ERROR, "the agent failed to answer; see its log"),
    }
}

fn refuse(status: StatusCode, problem: impl Into<String>) -> Response {
    (status, problem.into() + "\n").into_response()
}
