//! An API out of this process: as many pods and services as one likes, lists in pages, watches, and what an API server does when
//! it has too much to do, or is away.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use anyhow::Result;
use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Query, Request, State},
    http::{StatusCode, header::RETRY_AFTER},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse as _, Response},
    routing::get,
};
use futures_util::{Stream, stream};
use serde_json::{Value, json};
use testbed::Node;
use tokio::{
    runtime::Runtime,
    sync::{broadcast, watch},
};

/// Bytes of a pod that nobody here reads; a real one has a few thousand (`managedFields`, volumes, conditions).
const FILLER: usize = 3_000;
/// Seconds after which a client that is told to come back later may do so.
const LATER: u64 = 1;

/// How much there is. Service `s` has the pods `s`, `s + services`, and so on.
#[derive(Clone, Copy)]
pub struct Size {
    pub pods: usize,
    /// Of these, the first ones are on node `a`.
    pub local: usize,
    pub services: usize,
}

/// The API server. Dropped, it is away.
pub struct Simulated {
    api: Arc<Api>,
    node: Node,
    port: u16,
    runtime: Option<Runtime>,
}

struct Api {
    size: Size,
    /// Of the pods that are not what they were at first: addresses; `None` is gone.
    changed: Mutex<BTreeMap<usize, Option<Ipv4Addr>>>,
    /// Pods whose label says that they take no part.
    out: Mutex<BTreeSet<usize>>,
    version: AtomicU64,
    events: broadcast::Sender<Bytes>,
    throttled: watch::Sender<bool>,
    /// How many were sent away.
    refused: AtomicU64,
}

impl Simulated {
    /// Serves in the namespace of `node`, on loopback.
    pub fn start(node: &Node, size: Size) -> Result<Self> {
        let api = Api {
            size,
            changed: Mutex::default(),
            out: Mutex::default(),
            version: AtomicU64::new(7),
            events: broadcast::channel(1024).0,
            throttled: watch::Sender::new(false),
            refused: AtomicU64::new(0),
        };
        let mut simulated = Self { api: Arc::new(api), node: node.clone(), port: 0, runtime: None };
        simulated.come_back()?;
        Ok(simulated)
    }

    /// Closes every connection and the port.
    pub fn go_away(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// Serves again where it did.
    pub fn come_back(&mut self) -> Result<()> {
        let at = format!("127.0.0.1:{}", self.port);
        let listener = self.node.namespace().enter(|| TcpListener::bind(at))??;
        listener.set_nonblocking(true)?;
        self.port = listener.local_addr()?.port();
        let runtime = Runtime::new()?;
        let served = router(&self.api);
        runtime.spawn(async move {
            axum::serve(tokio::net::TcpListener::from_std(listener).expect("a listener"), served).await
        });
        self.runtime = Some(runtime);
        Ok(())
    }

    /// A kubeconfig for it.
    pub fn kubeconfig(&self) -> Result<PathBuf> {
        let path = self.node.dir("api")?.join("kubeconfig");
        let config = json!({ "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{ "name": "c", "cluster": { "server": format!("http://127.0.0.1:{}", self.port) } }],
            "users": [{ "name": "u", "user": {} }], "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }] });
        fs::write(&path, config.to_string())?;
        Ok(path)
    }

    /// Ends every watch and answers everything with 429 until this is called with `false`.
    pub fn throttle(&self, throttled: bool) {
        self.api.throttled.send_replace(throttled);
    }

    /// How many requests were answered with 429.
    pub fn refused(&self) -> u64 {
        self.api.refused.load(Relaxed)
    }

    /// Gives a pod this address.
    pub fn change(&self, i: usize, ip: Ipv4Addr) {
        self.api.put(i, Some(ip));
        self.api.tell("MODIFIED", self.api.pod(i, ip));
    }

    /// Deletes a pod.
    pub fn remove(&self, i: usize) {
        self.api.put(i, None);
        self.api.tell("DELETED", self.api.pod(i, address(i)));
    }

    /// Gives a pod the label that says that it takes no part.
    pub fn opt_out(&self, i: usize, ip: Ipv4Addr) {
        self.api.out.lock().unwrap_or_else(PoisonError::into_inner).insert(i);
        self.change(i, ip);
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        self.go_away();
    }
}

impl Api {
    fn put(&self, i: usize, ip: Option<Ipv4Addr>) {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner).insert(i, ip);
    }

    fn ip(&self, i: usize) -> Option<Ipv4Addr> {
        let changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        changed.get(&i).copied().unwrap_or_else(|| Some(address(i)))
    }

    fn pod(&self, i: usize, ip: Ipv4Addr) -> Value {
        let mut pod = pod(&self.size, i, ip);
        if self.out.lock().unwrap_or_else(PoisonError::into_inner).contains(&i) {
            pod["metadata"]["labels"]["underpass.io/mode"] = json!("disabled");
        }
        pod
    }

    fn tell(&self, what: &str, mut object: Value) {
        let version = self.version.fetch_add(1, Relaxed) + 1;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        object["kind"] = json!("Pod");
        object["apiVersion"] = json!("v1");
        let event = json!({ "type": what, "object": object }).to_string() + "\n";
        // Nobody watches while it is away.
        let _ = self.events.send(event.into());
    }
}

/// The first address of a pod.
pub fn address(i: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, (1 + i / 62_500) as u8, ((i / 250) % 250) as u8, (1 + i % 250) as u8)
}

/// A pod's uid.
pub fn uid(i: usize) -> String {
    format!("8d2f6f0e-{i:012}")
}

fn pod(size: &Size, i: usize, ip: Ipv4Addr) -> Value {
    let node = if i < size.local { "a".to_owned() } else { format!("node-{}", i % 200) };
    json!({
        "metadata": { "namespace": format!("ns-{}", i % 100), "name": format!("web-{i}-6d4b75cb6d-x7k2p"),
            "uid": uid(i), "resourceVersion": "7", "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": { "app": format!("app-{}", i % 500), "underpass.io/mode": "enabled" },
            "annotations": { "filler": "x".repeat(FILLER) } },
        "spec": { "nodeName": node, "serviceAccountName": format!("sa-{}", i % 50),
            "containers": [{ "name": "web", "image": "web:1", "ports": [{ "containerPort": 8080 }] }] },
        "status": { "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }] },
    })
}

fn service(s: usize) -> Value {
    let ip = Ipv4Addr::new(172, 16, (s / 250) as u8, (1 + s % 250) as u8);
    json!({ "metadata": { "namespace": format!("ns-{}", s % 100), "name": format!("s-{s}") },
        "spec": { "clusterIP": ip, "clusterIPs": [ip], "ports": [{ "name": "http", "port": 80 }] } })
}

fn slice(size: &Size, s: usize) -> Value {
    let endpoints = (0..size.pods / size.services).map(|k| s + k * size.services).map(|i| {
        json!({ "addresses": [address(i)], "conditions": { "ready": true },
            "targetRef": { "kind": "Pod", "namespace": format!("ns-{}", i % 100), "name": format!("web-{i}-6d4b75cb6d-x7k2p") } })
    });
    json!({ "metadata": { "namespace": format!("ns-{}", s % 100), "name": format!("s-{s}-abcde"),
            "labels": { "kubernetes.io/service-name": format!("s-{s}") } },
        "addressType": "IPv4", "endpoints": endpoints.collect::<Vec<_>>(), "ports": [{ "name": "http", "port": 8080 }] })
}

/// What happens from now on; ends when watches have to.
fn events(api: &Api, kind: &str) -> impl Stream<Item = Result<Bytes, std::io::Error>> + use<> {
    let state = (api.events.subscribe(), api.throttled.subscribe(), kind == "Pod");
    stream::unfold(state, |(mut events, mut throttled, pods)| async move {
        let event = tokio::select! {
            event = events.recv(), if pods => event.ok(),
            _ = throttled.wait_for(|throttled| *throttled) => None,
        }?;
        Some((Ok(event), (events, throttled, pods)))
    })
}

/// One page of a list, or a watch.
fn answer(
    api: &Api,
    query: &HashMap<String, String>,
    kind: &str,
    total: usize,
    item: impl Fn(usize) -> Option<Value>,
) -> Response {
    let version = api.version.load(Relaxed).to_string();
    if query.contains_key("watch") {
        // What a client has missed is not kept.
        let expired = json!({ "type": "ERROR", "object": { "kind": "Status", "apiVersion": "v1", "status": "Failure",
            "code": 410, "reason": "Expired", "message": "too old resource version" } });
        return match query.get("resourceVersion") {
            Some(seen) if *seen != version && kind == "Pod" => (expired.to_string() + "\n").into_response(),
            _ => Body::from_stream(events(api, kind)).into_response(),
        };
    }
    let number = |name: &str| query.get(name).and_then(|v| v.parse::<usize>().ok());
    let first = number("continue").unwrap_or(0);
    let last = (first + number("limit").unwrap_or(usize::MAX).min(total)).min(total);
    let mut meta = json!({ "resourceVersion": version });
    if last < total {
        meta["continue"] = json!(last.to_string());
    }
    let items: Vec<_> = (first..last).filter_map(item).collect();
    Json(json!({ "kind": format!("{kind}List"), "apiVersion": "v1", "metadata": meta, "items": items })).into_response()
}

async fn throttle(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    if !*api.throttled.borrow() {
        return next.run(request).await;
    }
    api.refused.fetch_add(1, Relaxed);
    let status = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "TooManyRequests",
        "message": "too many requests, please try again later", "code": 429 });
    (StatusCode::TOO_MANY_REQUESTS, [(RETRY_AFTER, LATER)], Json(status)).into_response()
}

fn router(api: &Arc<Api>) -> Router {
    type Parameters = Query<HashMap<String, String>>;
    type Item = fn(&Api, usize) -> Option<Value>;
    let Size { pods, services, .. } = api.size;
    let list = |kind: &'static str, total: usize, item: Item| {
        get(async move |State(api): State<Arc<Api>>, Query(query): Parameters| {
            answer(&api, &query, kind, total, |i| item(&api, i))
        })
    };
    let slices = json!({ "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "discovery.k8s.io/v1",
        "resources": [{ "name": "endpointslices", "singularName": "", "namespaced": true, "kind": "EndpointSlice", "verbs": ["list", "watch"] }] });
    let unknown = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "not found", "reason": "NotFound", "code": 404 });
    let namespace: Item = |_, i| Some(json!({ "metadata": { "name": format!("ns-{i}") } }));
    Router::new()
        .route("/api/v1/pods", list("Pod", pods, |api, i| Some(api.pod(i, api.ip(i)?))))
        .route("/api/v1/namespaces", list("Namespace", 100, namespace))
        .route("/api/v1/nodes", list("Node", 1, |_, _| Some(json!({ "metadata": { "name": "a" } }))))
        .route("/api/v1/services", list("Service", services, |_, s| Some(service(s))))
        .route("/apis/discovery.k8s.io/v1", get(async move || Json(slices)))
        .route(
            "/apis/discovery.k8s.io/v1/endpointslices",
            list("EndpointSlice", services, |api, s| Some(slice(&api.size, s))),
        )
        .fallback(async move || (StatusCode::NOT_FOUND, Json(unknown)))
        .layer(from_fn_with_state(Arc::clone(api), throttle))
        .with_state(Arc::clone(api))
}
