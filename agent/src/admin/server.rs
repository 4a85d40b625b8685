//! Answers on the admin socket.
//!
//! Everything is bounded: connections, header and body sizes, and the time a client may take. One request per
//! connection: the clients are a command line and scripts.

use std::{collections::BTreeMap, future::Future, hash::Hash, io, path::Path, pin::pin, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{Path as UrlPath, Query, Request, State, rejection::PathRejection, rejection::QueryRejection},
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hyper::{body::Body as _, server::conn::http1};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use nix::unistd::geteuid;
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
    task::JoinSet,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::{
    api::{AllCounters, Closed, Connections, DEFAULT_LIMIT, ExplainParameters, MAX_LIMIT, Problem, Status},
    inventory::{self, CertificateDetails, Certificates, Services, Workloads},
    query::ConnectionQuery,
};
use crate::{
    bounds::{Bound, Entry, Pool, Rule},
    mesh::{MeshStore, SpiffeId},
    policy::{self, Explanations, PolicyList, Query as PolicyQuery, QueryError},
    relay::{CloseReason, ConnectionId, ConnectionTable},
    socket_file::SocketFile,
    telemetry::Counters,
};

/// Connections served at once; more take the places of idle ones.
pub(super) const MAX_CONNECTIONS: usize = 32;
/// Largest request head, in bytes. hyper does not go below 8192.
const MAX_HEAD: usize = 16 * 1024;
/// Most header fields.
const MAX_HEADERS: usize = 32;
/// A request head must be complete within this time.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection is cut after this time, whatever it does.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause after a failed `accept` (out of descriptors), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the rest of the agent tells about itself.
pub trait StatusProvider: Send + Sync + 'static {
    /// Pods, data path and reloads, see [`Status::new`].
    fn status(&self) -> Status;

    /// The BPF counters by name.
    fn bpf_counters(&self) -> BTreeMap<String, u64>;

    /// Name of where certificates come from.
    fn certificate_source(&self) -> &'static str;

    /// The certificate of an identity, when it has one that is valid now.
    fn certificate(&self, identity: &SpiffeId) -> Option<CertificateDetails>;
}

/// What the server reads and acts on.
#[derive(Clone)]
pub struct AdminState {
    /// Live connections.
    pub table: Arc<ConnectionTable>,
    /// The agent's counters.
    pub counters: Arc<Counters>,
    /// The configuration in force.
    pub mesh: Arc<MeshStore>,
    /// Everything else.
    pub provider: Arc<dyn StatusProvider>,
}

/// The operations behind the routes. Implementations may block for the length of a table scan.
pub trait Source: Send + Sync + 'static {
    /// See [`Status`].
    fn status(&self) -> Status;
    /// See [`Connections`].
    fn connections(&self, query: &ConnectionQuery) -> Connections;
    /// Resets a connection; `false` when there is none with this number.
    fn close(&self, id: ConnectionId) -> bool;
    /// See [`AllCounters`].
    fn counters(&self) -> AllCounters;
    /// See [`Workloads`].
    fn workloads(&self, limit: usize) -> Workloads;
    /// See [`Services`].
    fn services(&self, limit: usize) -> Services;
    /// See [`Certificates`].
    fn certificates(&self) -> Certificates;
    /// See [`PolicyList`].
    fn policies(&self) -> PolicyList;
    /// What would become of a connection.
    fn explain(&self, query: &PolicyQuery) -> Result<Explanations, QueryError>;
}

impl Source for AdminState {
    fn status(&self) -> Status {
        let mesh = self.mesh.load();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: mesh.node.to_string(),
            trust_domain: mesh.trust_domain.to_string(),
            generation: mesh.generation,
            ..self.provider.status()
        }
    }

    fn connections(&self, query: &ConnectionQuery) -> Connections {
        let (connections, total) = self.table.list_where(query.limit(), query.sort, |c| query.selects(c));
        Connections { total, connections }
    }

    fn close(&self, id: ConnectionId) -> bool {
        self.table.close(id, CloseReason::Operator)
    }

    fn counters(&self) -> AllCounters {
        AllCounters { agent: self.counters.snapshot(), bpf: self.provider.bpf_counters() }
    }

    fn workloads(&self, limit: usize) -> Workloads {
        inventory::workloads(&self.mesh.load(), &self.provider.status().pods, limit)
    }

    fn services(&self, limit: usize) -> Services {
        inventory::services(&self.mesh.load(), limit)
    }

    fn certificates(&self) -> Certificates {
        let provider = &self.provider;
        inventory::certificates(&self.mesh.load(), provider.certificate_source(), |id| provider.certificate(id))
    }

    fn policies(&self) -> PolicyList {
        policy::summaries(&self.mesh.load())
    }

    fn explain(&self, query: &PolicyQuery) -> Result<Explanations, QueryError> {
        policy::explain(&self.mesh.load(), query)
    }
}

/// Listens on `path` (the socket is 0600, in a directory of the agent's own) and returns the server, which runs until it
/// is dropped; then the socket file is gone. Only root and the agent's own user are answered.
///
/// Fails with `AddrInUse` when another agent uses the directory. The socket of a dead agent is replaced.
pub fn serve(path: &Path, state: AdminState) -> io::Result<impl Future<Output = ()> + Send + use<>> {
    serve_source(path, Arc::new(state))
}

/// [`serve`] for any [`Source`].
pub(super) fn serve_source(
    path: &Path,
    source: Arc<dyn Source>,
) -> io::Result<impl Future<Output = ()> + Send + use<>> {
    let socket = SocketFile::bind(path)?;
    Ok(accept(socket, router(source)))
}

async fn accept(socket: SocketFile, router: Router) {
    // By user; there are two at most.
    let rule = Rule {
        total: MAX_CONNECTIONS,
        share: MAX_CONNECTIONS / 4,
        strict: false,
        grace: Duration::ZERO,
        bound: Bound::Admin,
    };
    let pool = Pool::new(rule);
    // Dropped with this future, and every connection with it.
    let mut connections = JoinSet::new();
    let mut strangers = 0_u64;
    loop {
        while connections.try_join_next().is_some() {}
        let stream = match socket.listener.accept().await {
            Ok((stream, _)) => stream,
            Err(reason) => {
                warn!(%reason, "admin socket: accept failed");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let uid = match trusted(&stream) {
            Ok(uid) => uid,
            Err(reason) => {
                strangers += 1;
                // Whoever can connect can make us log: say it less and less often.
                if strangers.is_power_of_two() {
                    warn!(%reason, refused = strangers, "admin socket: connection refused");
                }
                continue;
            }
        };
        let entry = pool.enter(&uid).await;
        connections.spawn(guarded(stream, router.clone(), entry));
    }
}

/// File modes can be changed by mistake; the peer's credentials cannot.
fn trusted(stream: &UnixStream) -> Result<u32, String> {
    let uid = stream.peer_cred().map_err(|e| format!("peer credentials: {e}"))?.uid();
    if uid == 0 || uid == geteuid().as_raw() {
        return Ok(uid);
    }
    Err(format!("uid {uid} is neither root nor the agent's user"))
}

/// Serves one request on `stream`. The client has the place of `entry` while the request is
/// answered; before and after that, whenever the client is waited for, somebody else may get it.
pub(super) async fn guarded<S: Hash + Eq + Clone + Send + Sync + 'static>(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    mut entry: Entry<S>,
) {
    let voucher = entry.voucher();
    let router = router.layer(middleware::from_fn(move |request: Request, next: Next| {
        let voucher = voucher.clone();
        async move {
            let _serving = voucher.serving();
            next.run(request).await
        }
    }));
    if entry.guard(pin!(connection(stream, router))).await.is_err() {
        debug!("admin socket: idle client cut for another one");
    }
}

/// Serves one request on `stream`.
pub async fn connection(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: Router) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .keep_alive(false);
    let served = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    match timeout(CONNECTION_TIMEOUT, served).await {
        Ok(Ok(())) => {}
        Ok(Err(reason)) => debug!(%reason, "admin socket: connection ended"),
        Err(_) => debug!("admin socket: client too slow, cut"),
    }
}

/// The routes.
pub fn router(source: Arc<dyn Source>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/connections", get(connections))
        .route("/v1/connections/{id}/close", post(close))
        .route("/v1/counters", get(counters))
        .route("/v1/workloads", get(workloads))
        .route("/v1/services", get(services))
        .route("/v1/certificates", get(certificates))
        .route("/v1/policies", get(policies))
        .route("/v1/policies/explain", get(explain))
        .fallback(async || {
            refuse(
                StatusCode::NOT_FOUND,
                "no such resource; there are /v1/status, /v1/connections, /v1/counters, /v1/workloads, /v1/services, \
                 /v1/certificates and /v1/policies",
            )
        })
        .method_not_allowed_fallback(async || {
            refuse(
                StatusCode::METHOD_NOT_ALLOWED,
                "wrong method; resources are read with GET, connections closed with POST",
            )
        })
        .layer(middleware::from_fn(without_body))
        .with_state(source)
}

/// No request has a body, so none is read.
async fn without_body(request: Request, next: Next) -> Response {
    if request.body().size_hint().exact() == Some(0) {
        next.run(request).await
    } else {
        refuse(StatusCode::PAYLOAD_TOO_LARGE, "requests have no body here; send none")
    }
}

fn refuse(status: StatusCode, error: impl Into<String>) -> Response {
    (status, Json(Problem { error: error.into() })).into_response()
}

/// Runs `work` where it may block, so that a long table scan does not hold up the runtime.
async fn answer<T: serde::Serialize + Send + 'static>(
    source: Arc<dyn Source>,
    work: impl FnOnce(&dyn Source) -> T + Send + 'static,
) -> Response {
    match tokio::task::spawn_blocking(move || work(&*source)).await {
        Ok(value) => Json(value).into_response(),
        Err(_) => refuse(StatusCode::INTERNAL_SERVER_ERROR, "the agent failed to answer; see its log"),
    }
}

async fn status(State(source): State<Arc<dyn Source>>) -> Response {
    answer(source, Source::status).await
}

async fn counters(State(source): State<Arc<dyn Source>>) -> Response {
    answer(source, Source::counters).await
}

async fn policies(State(source): State<Arc<dyn Source>>) -> Response {
    answer(source, Source::policies).await
}

async fn explain(
    State(source): State<Arc<dyn Source>>,
    parameters: Result<Query<ExplainParameters>, QueryRejection>,
) -> Response {
    let query = match parameters {
        Ok(Query(parameters)) => parameters.query(),
        Err(_) => {
            Err("the query takes to=ADDR:PORT and either from=SPIFFE-ID (and source_ip=IP) or plaintext_from=IP"
                .to_owned())
        }
    };
    let query = match query {
        Ok(query) => query,
        Err(problem) => return refuse(StatusCode::BAD_REQUEST, problem),
    };
    match tokio::task::spawn_blocking(move || source.explain(&query)).await {
        Ok(Ok(explanations)) => Json(explanations).into_response(),
        Ok(Err(problem)) => refuse(StatusCode::NOT_FOUND, problem.to_string()),
        Err(_) => refuse(StatusCode::INTERNAL_SERVER_ERROR, "the agent failed to answer; see its log"),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Limit {
    limit: Option<usize>,
}

type QueryOf<T> = Result<Query<T>, QueryRejection>;

async fn connections(State(source): State<Arc<dyn Source>>, query: QueryOf<ConnectionQuery>) -> Response {
    match query {
        Ok(Query(query)) if (1..=MAX_LIMIT).contains(&query.limit()) => {
            answer(source, move |s| s.connections(&query)).await
        }
        _ => refuse(
            StatusCode::BAD_REQUEST,
            format!(
                "the query may only be limit=N, with N from 1 to {MAX_LIMIT}, workload=[NAMESPACE/]NAME, identity=ID, \
                 direction=outbound|inbound, data_path=user|ktls|plain and sort=oldest|newest|sent|received|bytes"
            ),
        ),
    }
}

async fn workloads(State(source): State<Arc<dyn Source>>, limit: QueryOf<Limit>) -> Response {
    listed(source, limit, Source::workloads).await
}

async fn services(State(source): State<Arc<dyn Source>>, limit: QueryOf<Limit>) -> Response {
    listed(source, limit, Source::services).await
}

async fn listed<T: serde::Serialize + Send + 'static>(
    source: Arc<dyn Source>,
    limit: QueryOf<Limit>,
    list: impl FnOnce(&dyn Source, usize) -> T + Send + 'static,
) -> Response {
    match limit.map(|Query(q)| q.limit.unwrap_or(DEFAULT_LIMIT)) {
        Ok(limit @ 1..=MAX_LIMIT) => answer(source, move |s| list(s, limit)).await,
        _ => refuse(StatusCode::BAD_REQUEST, format!("the query may only be limit=N, with N from 1 to {MAX_LIMIT}")),
    }
}

async fn certificates(State(source): State<Arc<dyn Source>>) -> Response {
    answer(source, Source::certificates).await
}

async fn close(State(source): State<Arc<dyn Source>>, id: Result<UrlPath<u64>, PathRejection>) -> Response {
    let Ok(UrlPath(id)) = id else {
        return refuse(StatusCode::BAD_REQUEST, "a connection is named by its number; see /v1/connections");
    };
    let id = ConnectionId(id);
    match tokio::task::spawn_blocking(move || source.close(id)).await {
        Ok(true) => Json(Closed { closed: id }).into_response(),
        Ok(false) => refuse(
            StatusCode::NOT_FOUND,
            format!("there is no connection {}; it may have ended, see /v1/connections", id.0),
        ),
        Err(_) => refuse(StatusCode::INTERNAL_SERVER_ERROR, "the agent failed to answer; see its log"),
    }
}
