//! An API server in memory: pods, Secrets and `ConfigMap`s with versions and watches, and reviews of tokens.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, SystemTime},
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Path, Query, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::stream;
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use serde_json::{Value, json};
use tokio::sync::watch;

/// Kind, namespace, name.
type Key = (String, String, String);
type Intrusion = Box<dyn FnOnce(&mut Objects) + Send>;

#[derive(Clone)]
pub(crate) struct Cluster {
    objects: Arc<Mutex<Objects>>,
    version: watch::Sender<u64>,
}

#[derive(Default)]
pub(crate) struct Objects {
    version: u64,
    all: BTreeMap<Key, Value>,
    /// Version, kind, type of event, object.
    events: Vec<(u64, String, &'static str, Value)>,
    tokens: HashMap<String, Token>,
    /// Verb and kind, as RBAC has them.
    denied: HashSet<(&'static str, &'static str)>,
    down: bool,
    /// Happens before the next write to a Secret.
    intrusion: Option<Intrusion>,
    /// Verb and path or kind of everything that was asked.
    pub(crate) asked: Vec<String>,
}

/// What the API server knows about a token.
#[derive(Clone)]
pub(crate) struct Token {
    pub(crate) username: String,
    pub(crate) audience: String,
    pub(crate) pod: Option<(String, String)>,
    pub(crate) expires: SystemTime,
    /// Audiences that the answer names; the asked one when there are none here.
    pub(crate) answered: Option<Vec<String>>,
    /// What the answer says of the node, in API servers that say it.
    pub(crate) node: Option<Value>,
}

/// A running pod. Its uid is `uid-NAME`.
pub(crate) fn pod(namespace: &str, name: &str, account: &str, node: &str) -> Pod {
    serde_json::from_value(json!({
        "metadata": { "namespace": namespace, "name": name, "uid": format!("uid-{name}") },
        "spec": { "serviceAccountName": account, "nodeName": node, "containers": [] },
        "status": { "phase": "Running" },
    }))
    .unwrap()
}

impl Cluster {
    pub(crate) fn new() -> Self {
        Self { objects: Arc::default(), version: watch::Sender::new(0) }
    }

    pub(crate) fn client(&self) -> Client {
        let router = Router::new()
            .route("/apis/authentication.k8s.io/v1/tokenreviews", post(review))
            .route("/api/v1/{kind}", get(list_all))
            .route("/api/v1/namespaces/{namespace}/{kind}", get(list).post(create))
            .route("/api/v1/namespaces/{namespace}/{kind}/{name}", get(read).put(replace).patch(patch))
            .with_state(self.clone());
        Client::new(router, "mesh")
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock().unwrap()
    }

    /// Changes something, and tells the watches.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Objects) -> T) -> T {
        let mut objects = self.lock();
        let result = change(&mut objects);
        self.version.send_replace(objects.version);
        result
    }

    pub(crate) fn add_pod(&self, pod: &Pod) {
        let value = serde_json::to_value(pod).unwrap();
        self.change(|o| o.put("pods", value));
    }

    pub(crate) fn delete(&self, kind: &str, namespace: &str, name: &str) {
        self.change(|o| o.delete(kind, namespace, name));
    }

    pub(crate) fn object(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        self.lock().all.get(&(kind.into(), namespace.into(), name.into())).cloned()
    }

    /// A value of a Secret, decoded.
    pub(crate) fn secret(&self, name: &str, part: &str) -> Option<Vec<u8>> {
        let secret = self.object("secrets", "mesh", name)?;
        let text = secret["data"][part].as_str()?;
        Some(base64::engine::general_purpose::STANDARD.decode(text).unwrap())
    }

    pub(crate) fn put_secret(&self, name: &str, data: &[(&str, &str)]) {
        self.change(|o| o.put_secret(name, data));
    }

    pub(crate) fn deny(&self, verb: &'static str, kind: &'static str, denied: bool) {
        let denials = &mut self.lock().denied;
        if denied {
            denials.insert((verb, kind))
        } else {
            denials.remove(&(verb, kind))
        };
    }

    pub(crate) fn set_down(&self, down: bool) {
        self.change(|o| o.down = down);
        // Broken watches notice at once.
        self.version.send_modify(|_| {});
    }

    pub(crate) fn intrude(&self, intrusion: impl FnOnce(&mut Objects) + Send + 'static) {
        self.lock().intrusion = Some(Box::new(intrusion));
    }

    /// A new token that the API server knows.
    pub(crate) fn token(&self, token: Token) -> String {
        let end = token.expires.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let mut objects = self.lock();
        let number = objects.tokens.len();
        let claims = URL_SAFE_NO_PAD.encode(json!({ "exp": end, "jti": number }).to_string());
        let text = format!("e30.{claims}.sig");
        objects.tokens.insert(text.clone(), token);
        text
    }

    /// A good token of the agent `pod`.
    pub(crate) fn agent_token(&self, pod: &str) -> String {
        self.token(agent(pod))
    }

    pub(crate) fn count(&self, what: &str) -> usize {
        self.lock().asked.iter().filter(|asked| *asked == what).count()
    }
}

/// What the API server knows about a good token of the agent `pod`.
pub(crate) fn agent(pod: &str) -> Token {
    Token {
        username: "system:serviceaccount:mesh:underpass".into(),
        audience: "underpass-ca".into(),
        pod: Some((pod.into(), format!("uid-{pod}"))),
        expires: SystemTime::now() + Duration::from_hours(1),
        answered: None,
        node: None,
    }
}

impl Objects {
    pub(crate) fn put(&mut self, kind: &str, mut value: Value) -> Value {
        self.version += 1;
        value["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let name = |field: &str| value["metadata"][field].as_str().unwrap().to_owned();
        let key = (kind.to_owned(), name("namespace"), name("name"));
        let event = if self.all.insert(key, value.clone()).is_some() { "MODIFIED" } else { "ADDED" };
        self.events.push((self.version, kind.into(), event, value.clone()));
        value
    }

    pub(crate) fn put_secret(&mut self, name: &str, data: &[(&str, &str)]) {
        let encode = |value: &str| base64::engine::general_purpose::STANDARD.encode(value);
        let data: BTreeMap<_, _> = data.iter().map(|(part, value)| (*part, encode(value))).collect();
        self.put("secrets", json!({ "metadata": { "namespace": "mesh", "name": name }, "data": data }));
    }

    pub(crate) fn get(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        self.all.get(&(kind.into(), namespace.into(), name.into())).cloned()
    }

    fn delete(&mut self, kind: &str, namespace: &str, name: &str) {
        if let Some(mut value) = self.all.remove(&(kind.into(), namespace.into(), name.into())) {
            self.version += 1;
            value["metadata"]["resourceVersion"] = json!(self.version.to_string());
            self.events.push((self.version, kind.into(), "DELETED", value));
        }
    }

    /// Notes the request; an answer when it gets no further.
    fn gate(&mut self, verb: &'static str, kind: &str) -> Option<Response> {
        self.asked.push(format!("{verb} {kind}"));
        if self.down {
            return Some(status(StatusCode::SERVICE_UNAVAILABLE, "down"));
        }
        let denied = self.denied.iter().any(|(v, k)| *v == verb && *k == kind);
        denied.then(|| status(StatusCode::FORBIDDEN, &format!("{kind} is forbidden: cannot {verb}")))
    }

    fn intruded(&mut self, kind: &str) {
        if kind == "secrets"
            && let Some(intrusion) = self.intrusion.take()
        {
            intrusion(self);
        }
    }
}

fn status(code: StatusCode, message: &str) -> Response {
    let reason = match code {
        StatusCode::NOT_FOUND => "NotFound",
        StatusCode::CONFLICT => "Conflict",
        StatusCode::FORBIDDEN => "Forbidden",
        _ => "InternalError",
    };
    let body = json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason, "code": code.as_u16() });
    (code, Json(body)).into_response()
}

type Parameters = Query<HashMap<String, String>>;

async fn list_all(State(cluster): State<Cluster>, Path(kind): Path<String>, query: Parameters) -> Response {
    listed(&cluster, &kind, None, &query)
}

async fn list(
    State(cluster): State<Cluster>,
    Path((namespace, kind)): Path<(String, String)>,
    query: Parameters,
) -> Response {
    listed(&cluster, &kind, Some(namespace), &query)
}

fn listed(cluster: &Cluster, kind: &str, namespace: Option<String>, query: &HashMap<String, String>) -> Response {
    let watching = query.get("watch").is_some_and(|w| w == "true" || w == "1");
    let mut objects = cluster.lock();
    let verb = if watching { "watch" } else { "list" };
    if let Some(answer) = objects.gate(verb, kind) {
        return answer;
    }
    let selector = query.get("fieldSelector").cloned();
    let selected = move |value: &Value| {
        let field = |name: &str| match name {
            "metadata.name" => value["metadata"]["name"].as_str().map(str::to_owned),
            "spec.nodeName" => value["spec"]["nodeName"].as_str().map(str::to_owned),
            other => panic!("no selector {other}"),
        };
        let in_namespace = namespace.as_deref().is_none_or(|n| value["metadata"]["namespace"] == n);
        let matches = selector.as_deref().is_none_or(|s| {
            let (name, wanted) = s.split_once('=').expect("a selector");
            field(name).as_deref() == Some(wanted)
        });
        in_namespace && matches
    };
    if !watching {
        let items: Vec<_> =
            objects.all.iter().filter(|((k, ..), v)| k == kind && selected(v)).map(|(_, v)| v).collect();
        let version = objects.version.to_string();
        let list =
            json!({ "kind": "List", "apiVersion": "v1", "metadata": { "resourceVersion": version }, "items": items });
        return Json(list).into_response();
    }
    let since: u64 = query.get("resourceVersion").map_or(0, |v| v.parse().unwrap());
    drop(objects);
    let (cluster, kind) = (cluster.clone(), kind.to_owned());
    let changes = cluster.version.subscribe();
    let events = stream::unfold((since, changes), move |(mut since, mut changes)| {
        let (cluster, kind, selected) = (cluster.clone(), kind.clone(), selected.clone());
        async move {
            loop {
                {
                    let objects = cluster.lock();
                    if objects.down {
                        return None;
                    }
                    let next = objects.events.iter().find(|(version, ..)| *version > since);
                    if let Some((version, of, event, value)) = next {
                        since = *version;
                        if *of == kind && selected(value) {
                            let line = format!("{}\n", json!({ "type": event, "object": value }));
                            return Some((Ok::<_, Infallible>(Bytes::from(line)), (since, changes)));
                        }
                        continue;
                    }
                }
                changes.changed().await.ok()?;
            }
        }
    });
    Body::from_stream(events).into_response()
}

async fn read(State(cluster): State<Cluster>, Path(key): Path<(String, String, String)>) -> Response {
    let (namespace, kind, name) = key;
    let mut objects = cluster.lock();
    if let Some(answer) = objects.gate("get", &kind) {
        return answer;
    }
    match objects.all.get(&(kind, namespace, name)) {
        Some(value) => Json(value.clone()).into_response(),
        None => status(StatusCode::NOT_FOUND, "not found"),
    }
}

async fn create(
    State(cluster): State<Cluster>,
    Path((namespace, kind)): Path<(String, String)>,
    Json(mut value): Json<Value>,
) -> Response {
    cluster.change(|objects| {
        if let Some(answer) = objects.gate("create", &kind) {
            return answer;
        }
        objects.intruded(&kind);
        value["metadata"]["namespace"] = json!(namespace);
        let name = value["metadata"]["name"].as_str().unwrap().to_owned();
        if objects.all.contains_key(&(kind.clone(), namespace, name)) {
            objects.asked.push("conflict".into());
            return status(StatusCode::CONFLICT, "already exists");
        }
        (StatusCode::CREATED, Json(objects.put(&kind, value))).into_response()
    })
}

async fn replace(
    State(cluster): State<Cluster>,
    Path((namespace, kind, name)): Path<(String, String, String)>,
    Json(value): Json<Value>,
) -> Response {
    cluster.change(|objects| {
        if let Some(answer) = objects.gate("update", &kind) {
            return answer;
        }
        objects.intruded(&kind);
        let Some(old) = objects.all.get(&(kind.clone(), namespace, name)) else {
            return status(StatusCode::NOT_FOUND, "not found");
        };
        if old["metadata"]["resourceVersion"] != value["metadata"]["resourceVersion"] {
            objects.asked.push("conflict".into());
            return status(StatusCode::CONFLICT, "the object has been modified");
        }
        Json(objects.put(&kind, value)).into_response()
    })
}

async fn patch(
    State(cluster): State<Cluster>,
    Path((namespace, kind, name)): Path<(String, String, String)>,
    body: Bytes,
) -> Response {
    let patch: Value = serde_json::from_slice(&body).unwrap();
    cluster.change(|objects| {
        if let Some(answer) = objects.gate("patch", &kind) {
            return answer;
        }
        let Some(mut value) = objects.all.get(&(kind.clone(), namespace, name)).cloned() else {
            return status(StatusCode::NOT_FOUND, "not found");
        };
        for (key, part) in patch["data"].as_object().unwrap() {
            value["data"][key] = part.clone();
        }
        Json(objects.put(&kind, value)).into_response()
    })
}

async fn review(State(cluster): State<Cluster>, Json(mut review): Json<Value>) -> Response {
    let mut objects = cluster.lock();
    if let Some(answer) = objects.gate("create", "tokenreviews") {
        return answer;
    }
    let wanted: Vec<String> = serde_json::from_value(review["spec"]["audiences"].clone()).unwrap();
    let known = objects.tokens.get(review["spec"]["token"].as_str().unwrap());
    review["status"] = match known {
        None => json!({ "user": {}, "error": "invalid bearer token" }),
        Some(t) if t.expires <= SystemTime::now() => {
            json!({ "user": {}, "error": "[invalid bearer token, token has expired]" })
        }
        Some(t) if t.answered.is_none() && !wanted.contains(&t.audience) => {
            json!({ "user": {}, "error": format!("token audiences [{:?}] is invalid for the target audiences {wanted:?}", t.audience) })
        }
        Some(t) => {
            let mut extra = json!({});
            if let Some((name, uid)) = &t.pod {
                extra["authentication.kubernetes.io/pod-name"] = json!([name]);
                extra["authentication.kubernetes.io/pod-uid"] = json!([uid]);
            }
            if let Some(node) = &t.node {
                extra["authentication.kubernetes.io/node-name"] = node.clone();
            }
            let audiences = t.answered.clone().unwrap_or_else(|| vec![t.audience.clone()]);
            json!({ "authenticated": true, "audiences": audiences, "user": { "username": t.username, "uid": "x", "groups": [], "extra": extra } })
        }
    };
    (StatusCode::CREATED, Json(review)).into_response()
}
