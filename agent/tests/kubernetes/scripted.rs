//! An API whose objects and faults a test chooses: lists, watches with every event, and a group
//! that answers whatever it should not.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    net::TcpListener,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::Result;
use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Path, Query, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::get,
};
use futures_util::stream;
use serde_json::{Value, json};
use testbed::Node;
use tokio::{runtime::Runtime, sync::watch};

/// The group whose answers can be wrong.
const ISTIO: &str = "security.istio.io";

/// What the API answers about the kinds of Istio.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answers {
    /// As it is.
    Right,
    /// As if they had never existed; watches have expired.
    NotFound,
    /// The group is there and empty; watches have expired.
    Empty,
    /// This status for everything; watches end.
    Status(u16),
}

/// The API server. Dropped, it is away.
pub struct Scripted {
    api: Arc<Api>,
    port: u16,
    runtime: Option<Runtime>,
}

struct Api {
    store: Mutex<Store>,
    /// Counts up with every event and every change of [`Answers`].
    changes: watch::Sender<u64>,
}

struct Store {
    /// By plural and `namespace/name`.
    objects: BTreeMap<(&'static str, String), Value>,
    /// Version, plural and event.
    log: Vec<(u64, &'static str, Value)>,
    version: u64,
    answers: Answers,
}

/// Plural, kind and API group.
const KINDS: [(&str, &str, &str); 7] = [
    ("pods", "Pod", ""),
    ("namespaces", "Namespace", ""),
    ("nodes", "Node", ""),
    ("services", "Service", ""),
    ("endpointslices", "EndpointSlice", "discovery.k8s.io"),
    ("authorizationpolicies", "AuthorizationPolicy", ISTIO),
    ("peerauthentications", "PeerAuthentication", ISTIO),
];

impl Scripted {
    /// Serves in the namespace of a node, on loopback.
    pub fn start(node: &Node) -> Result<Self> {
        let store = Store { objects: BTreeMap::new(), log: Vec::new(), version: 7, answers: Answers::Right };
        let api = Arc::new(Api { store: Mutex::new(store), changes: watch::Sender::new(0) });
        let runtime = Runtime::new()?;
        let listener = node.namespace().enter(|| TcpListener::bind("127.0.0.1:0"))??;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let served = router(&api);
        runtime.spawn(async move {
            axum::serve(tokio::net::TcpListener::from_std(listener).expect("a listener"), served).await
        });
        Ok(Self { api, port, runtime: Some(runtime) })
    }

    /// A kubeconfig for the node.
    pub fn kubeconfig(&self, node: &Node) -> Result<PathBuf> {
        let path = node.dir("api")?.join("kubeconfig");
        let server = format!("http://127.0.0.1:{}", self.port);
        let config = json!({ "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{ "name": "c", "cluster": { "server": server } }],
            "users": [{ "name": "u", "user": {} }], "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }] });
        fs::write(&path, config.to_string())?;
        Ok(path)
    }

    /// Creates an object or replaces it.
    pub fn apply(&self, object: Value) {
        self.api.change(object, false);
    }

    /// Deletes an object.
    pub fn delete(&self, object: Value) {
        self.api.change(object, true);
    }

    /// From now on.
    pub fn answer(&self, answers: Answers) {
        self.api.store().answers = answers;
        self.api.changes.send_modify(|n| *n += 1);
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Api {
    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, mut object: Value, delete: bool) {
        let kind = object["kind"].as_str().unwrap_or_default();
        let (plural, _, _) = KINDS.into_iter().find(|(_, k, _)| *k == kind).expect("a kind that is followed");
        let name = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
        let key = (plural, format!("{}/{}", name("namespace"), name("name")));
        let mut store = self.store();
        store.version += 1;
        let version = store.version;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let known = store.objects.contains_key(&key);
        let what = match (delete, known) {
            (true, _) => "DELETED",
            (false, true) => "MODIFIED",
            (false, false) => "ADDED",
        };
        store.log.push((version, plural, json!({ "type": what, "object": object })));
        if delete {
            store.objects.remove(&key);
        } else {
            store.objects.insert(key, object);
        }
        drop(store);
        self.changes.send_modify(|n| *n += 1);
    }
}

fn refusal(code: u16) -> Value {
    let reason = match code {
        404 => "NotFound",
        403 => "Forbidden",
        410 => "Expired",
        _ => "InternalError",
    };
    json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "chosen by the test", "reason": reason, "code": code })
}

fn refuse(code: u16) -> Response {
    (StatusCode::from_u16(code).expect("a status"), Json(refusal(code))).into_response()
}

/// What is wrong with the answers about a group, if anything is.
fn fault(api: &Api, group: &str, discovery: bool) -> Option<Response> {
    let answers = api.store().answers;
    match answers {
        _ if group != ISTIO => None,
        Answers::Right => None,
        Answers::Empty if discovery => None,
        Answers::NotFound | Answers::Empty => Some(refuse(404)),
        Answers::Status(code) => Some(refuse(code)),
    }
}

async fn discover(State(api): State<Arc<Api>>, Path((group, version)): Path<(String, String)>) -> Response {
    if let Some(refused) = fault(&api, &group, true) {
        return refused;
    }
    let empty = group == ISTIO && api.store().answers == Answers::Empty;
    let resources: Vec<_> = KINDS
        .into_iter()
        .filter(|(_, _, of)| *of == group && version == "v1" && !empty)
        .map(|(plural, kind, _)| json!({ "name": plural, "singularName": "", "namespaced": true, "kind": kind, "verbs": ["list", "watch"] }))
        .collect();
    if resources.is_empty() && !empty {
        return refuse(404);
    }
    Json(json!({ "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": format!("{group}/{version}"), "resources": resources }))
        .into_response()
}

/// The CRDs of Istio exist, whatever is said about the kinds.
async fn crds(Query(query): Query<HashMap<String, String>>) -> Response {
    let asked = query.get("fieldSelector").and_then(|s| s.strip_prefix("metadata.name=")).unwrap_or_default();
    let there = KINDS.into_iter().any(|(plural, _, group)| group == ISTIO && asked == format!("{plural}.{group}"));
    let items: Vec<_> = there.then(|| json!({ "metadata": { "name": asked } })).into_iter().collect();
    Json(json!({ "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": { "resourceVersion": "7" }, "items": items }))
        .into_response()
}

async fn core(
    State(api): State<Arc<Api>>,
    Path(plural): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    objects(&api, "", &plural, &query)
}

async fn grouped(
    State(api): State<Arc<Api>>,
    Path((group, _version, plural)): Path<(String, String, String)>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    objects(&api, &group, &plural, &query)
}

fn objects(api: &Arc<Api>, group: &str, plural: &str, query: &HashMap<String, String>) -> Response {
    if let Some(refused) = fault(api, group, false) {
        return refused;
    }
    let Some((plural, kind, _)) = KINDS.into_iter().find(|(p, _, of)| *p == plural && *of == group) else {
        return refuse(404);
    };
    if query.contains_key("watch") {
        let since = query.get("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
        return follow(api, group.to_owned(), plural, since);
    }
    let store = api.store();
    // Nodes are the only kind that is selected by a field here.
    let name = query.get("fieldSelector").and_then(|s| s.strip_prefix("metadata.name="));
    let items: Vec<_> = store
        .objects
        .iter()
        .filter(|((of, key), _)| *of == plural && name.is_none_or(|name| key.ends_with(&format!("/{name}"))))
        .map(|(_, object)| object.clone())
        .collect();
    let api_version = if group.is_empty() { "v1".to_owned() } else { format!("{group}/v1") };
    Json(json!({ "kind": format!("{kind}List"), "apiVersion": api_version,
        "metadata": { "resourceVersion": store.version.to_string() }, "items": items }))
    .into_response()
}

/// Events from a version on, until something is wrong with the group.
fn follow(api: &Arc<Api>, group: String, plural: &'static str, since: u64) -> Response {
    let state = (Arc::clone(api), api.changes.subscribe(), since, false);
    let events = stream::unfold(state, move |(api, mut changes, mut seen, over)| {
        let group = group.clone();
        async move {
            if over {
                return None;
            }
            loop {
                changes.borrow_and_update();
                let (next, answers) = {
                    let store = api.store();
                    let next = store.log.iter().find(|(version, of, _)| *version > seen && *of == plural).cloned();
                    (next, if group == ISTIO { store.answers } else { Answers::Right })
                };
                match answers {
                    Answers::Right => {}
                    Answers::Status(_) => return None,
                    Answers::NotFound | Answers::Empty => {
                        let expired = json!({ "type": "ERROR", "object": refusal(410) }).to_string() + "\n";
                        return Some((Ok::<_, std::io::Error>(Bytes::from(expired)), (api, changes, seen, true)));
                    }
                }
                if let Some((version, _, event)) = next {
                    seen = version;
                    return Some((Ok(Bytes::from(event.to_string() + "\n")), (api, changes, seen, false)));
                }
                changes.changed().await.ok()?;
            }
        }
    });
    Body::from_stream(events).into_response()
}

fn router(api: &Arc<Api>) -> Router {
    Router::new()
        .route("/api/v1/{plural}", get(core))
        .route("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", get(crds))
        .route("/apis/{group}/{version}", get(discover))
        .route("/apis/{group}/{version}/{plural}", get(grouped))
        .fallback(async || refuse(404))
        .with_state(Arc::clone(api))
}
