//! What a large cluster costs an agent. The API is simulated: lists and watches of 50,000 pods and 5,000 services of the size
//! that real ones have, out of this process.

use std::{
    collections::HashMap,
    fs,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use axum::{
    Json, Router,
    body::Body,
    extract::{Query, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::get,
};
use aya::maps::{LpmTrie, Map, MapData, lpm_trie::Key};
use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};
use testbed::{Agent, AgentOptions, Testbed, underpass_path};
use tokio::{runtime::Runtime, sync::broadcast};

const PODS: usize = 50_000;
const SERVICES: usize = 5_000;
/// Bytes of a pod that nobody here reads; a real one has a few thousand (`managedFields`, volumes, conditions).
const FILLER: usize = 3_000;

/// The simulated API.
struct Api {
    events: broadcast::Sender<Arc<String>>,
}

fn address(i: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, (1 + i / 62_500) as u8, ((i / 250) % 250) as u8, (1 + i % 250) as u8)
}

fn pod(i: usize, ip: Ipv4Addr) -> Value {
    json!({
        "metadata": { "namespace": format!("ns-{}", i % 100), "name": format!("web-{i}-6d4b75cb6d-x7k2p"),
            "uid": format!("8d2f6f0e-{i:012}"), "resourceVersion": "7", "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": { "app": format!("app-{}", i % 500), "underpass.io/mode": "enabled" },
            "annotations": { "filler": "x".repeat(FILLER) } },
        "spec": { "nodeName": format!("node-{}", i % 200), "serviceAccountName": format!("sa-{}", i % 50),
            "containers": [{ "name": "web", "image": "web:1", "ports": [{ "containerPort": 8080 }] }] },
        "status": { "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }] },
    })
}

fn service(s: usize) -> Value {
    let ip = Ipv4Addr::new(172, 16, (s / 250) as u8, (1 + s % 250) as u8);
    json!({ "metadata": { "namespace": format!("ns-{}", s % 100), "name": format!("s-{s}") },
        "spec": { "clusterIP": ip, "clusterIPs": [ip], "ports": [{ "name": "http", "port": 80 }] } })
}

fn slice(s: usize) -> Value {
    let endpoints = (0..PODS / SERVICES).map(|k| s + k * SERVICES).map(|i| {
        json!({ "addresses": [address(i)], "conditions": { "ready": true },
            "targetRef": { "kind": "Pod", "namespace": format!("ns-{}", i % 100), "name": format!("web-{i}-6d4b75cb6d-x7k2p") } })
    });
    json!({ "metadata": { "namespace": format!("ns-{}", s % 100), "name": format!("s-{s}-abcde"),
            "labels": { "kubernetes.io/service-name": format!("s-{s}") } },
        "addressType": "IPv4", "endpoints": endpoints.collect::<Vec<_>>(), "ports": [{ "name": "http", "port": 8080 }] })
}

/// One page of a list, or a watch.
fn answer(api: &Api, query: &HashMap<String, String>, kind: &str, total: usize, item: fn(usize) -> Value) -> Response {
    if query.contains_key("watch") {
        let events = stream::unfold(api.events.subscribe(), |mut events| async move {
            let event = events.recv().await.ok()?;
            Some((Ok::<_, std::io::Error>(event.as_bytes().to_vec()), events))
        });
        let pods = kind == "Pod";
        let silent = stream::pending();
        return if pods {
            Body::from_stream(events.boxed())
        } else {
            Body::from_stream(silent.boxed() as stream::BoxStream<'_, Result<Vec<u8>, std::io::Error>>)
        }
        .into_response();
    }
    let number = |name: &str| query.get(name).and_then(|v| v.parse::<usize>().ok());
    let first = number("continue").unwrap_or(0);
    let last = (first + number("limit").unwrap_or(usize::MAX).min(total)).min(total);
    let mut meta = json!({ "resourceVersion": "7" });
    if last < total {
        meta["continue"] = json!(last.to_string());
    }
    let items: Vec<_> = (first..last).map(item).collect();
    Json(json!({ "kind": format!("{kind}List"), "apiVersion": "v1", "metadata": meta, "items": items })).into_response()
}

type Parameters = Query<HashMap<String, String>>;

fn router(api: Arc<Api>) -> Router {
    let list = |kind: &'static str, total: usize, item: fn(usize) -> Value| {
        get(async move |State(api): State<Arc<Api>>, Query(query): Parameters| answer(&api, &query, kind, total, item))
    };
    let slices = json!({ "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "discovery.k8s.io/v1",
        "resources": [{ "name": "endpointslices", "singularName": "", "namespaced": true, "kind": "EndpointSlice", "verbs": ["list", "watch"] }] });
    let unknown = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "not found", "reason": "NotFound", "code": 404 });
    Router::new()
        .route("/api/v1/pods", list("Pod", PODS, |i| pod(i, address(i))))
        .route("/api/v1/namespaces", list("Namespace", 100, |i| json!({ "metadata": { "name": format!("ns-{i}") } })))
        .route("/api/v1/nodes", list("Node", 1, |_| json!({ "metadata": { "name": "a" } })))
        .route("/api/v1/services", list("Service", SERVICES, service))
        .route("/apis/discovery.k8s.io/v1", get(async move || Json(slices)))
        .route("/apis/discovery.k8s.io/v1/endpointslices", list("EndpointSlice", SERVICES, slice))
        .fallback(async move || (StatusCode::NOT_FOUND, Json(unknown)))
        .with_state(api)
}

/// Seconds of processor time that a process has used.
fn used(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<_> = stat.rsplit_once(") ").context("a stat line")?.1.split(' ').collect();
    let ticks: f64 = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    Ok(ticks / 100.0)
}

fn resident(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).context("VmRSS")?;
    Ok(line.split_whitespace().nth(1).context("a number")?.parse::<u64>()? / 1024)
}

fn find(directory: &Path, name: &str) -> Option<PathBuf> {
    fs::read_dir(directory).ok()?.flatten().find_map(|e| match e.file_type() {
        Ok(kind) if kind.is_dir() => find(&e.path(), name),
        _ => (e.file_name() == name).then(|| e.path()),
    })
}

/// The map of captured addresses, as the programs see it: a prefix and a word of flags.
struct Mesh(LpmTrie<MapData, [u8; 16], u32>);

impl Mesh {
    fn open(agent: &Agent) -> Result<Self> {
        let path = find(&agent.pin_root(), "MESH").context("no pinned map MESH")?;
        Ok(Self(LpmTrie::try_from(Map::LpmTrie(MapData::from_pin(path)?))?))
    }

    fn has(&self, ip: Ipv4Addr) -> bool {
        self.0.get(&Key::new(128, ip.to_ipv6_mapped().octets()), 0).is_ok()
    }
}

#[test]
#[ignore = "a measurement of minutes, better with UNDERPASS_BIN=target/release/underpass"]
fn fifty_thousand_endpoints_in_a_simulated_api() -> Result<()> {
    let bed = Testbed::new("kscale")?;
    let node = bed.node("a");
    let runtime = Runtime::new()?;
    let api = Arc::new(Api { events: broadcast::channel(1024).0 });
    let listener = node.namespace().enter(|| TcpListener::bind("127.0.0.1:0"))??;
    listener.set_nonblocking(true)?;
    let port = listener.local_addr()?.port();
    let served = router(Arc::clone(&api));
    runtime.spawn(async move {
        axum::serve(tokio::net::TcpListener::from_std(listener).expect("a listener"), served).await
    });

    let kubeconfig = node.dir("api")?.join("kubeconfig");
    let config = json!({ "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{ "name": "c", "cluster": { "server": format!("http://127.0.0.1:{port}") } }],
        "users": [{ "name": "u", "user": {} }], "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }] });
    fs::write(&kubeconfig, config.to_string())?;
    let document = json!({ "apiVersion": "underpass.io/v1alpha1", "kind": "NodeConfig", "node": "a", "trustDomain": "cluster.local",
        "issuer": { "local": { "caDir": bed.dir().join("ca") } }, "kubernetes": { "kubeconfig": kubeconfig } });
    let options = AgentOptions { ready_within: None, ..AgentOptions::default() };
    let began = Instant::now();
    let agent = Agent::start(node, &underpass_path()?, &document.to_string(), options)?;
    agent.wait_status(Duration::from_mins(2), |s| Ok(s["cluster"]["synced"] == true && s["generation"] != 0))?;
    let pid = agent.process()?.pid();
    println!(
        "in sync after {:.1} s and {:.1} s of processor time; {} MiB resident",
        began.elapsed().as_secs_f64(),
        used(pid)?,
        resident(pid)?
    );
    let mesh = Mesh::open(&agent)?;
    let known = |ip: Ipv4Addr| move |mesh: &Mesh| mesh.has(ip);
    wait(&mesh, known(address(PODS - 1)), Duration::from_mins(1))?;

    let change = |i: usize, ip: Ipv4Addr| {
        let mut object = pod(i, ip);
        object["metadata"]["resourceVersion"] = json!("8");
        object["kind"] = json!("Pod");
        object["apiVersion"] = json!("v1");
        let event = json!({ "type": "MODIFIED", "object": object }).to_string() + "\n";
        api.events.send(Arc::new(event)).map(drop).context("nobody watches")
    };
    for (name, rounds, pause) in [("one change every 2 s", 15, 2000), ("ten changes a second", 100, 100)] {
        thread::sleep(Duration::from_secs(3));
        let (cpu, start) = (used(pid)?, Instant::now());
        let mut latencies = Vec::new();
        for round in 0..rounds {
            let due = start + Duration::from_millis(pause) * round;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let ip = Ipv4Addr::new(10, 200 + u8::from(pause < 1000), (round / 250) as u8, (1 + round % 250) as u8);
            let sent = Instant::now();
            change(7 + round as usize, ip)?;
            if pause >= 1000 || round % 10 == 0 {
                wait(&mesh, known(ip), Duration::from_secs(10))?;
                latencies.push(sent.elapsed());
            }
        }
        let share = 100.0 * (used(pid)? - cpu) / start.elapsed().as_secs_f64();
        latencies.sort();
        println!(
            "{name}: into the BPF map in {:?} (median), {:?} (worst of {}); {share:.1} % of a core; {} MiB resident",
            latencies[latencies.len() / 2],
            latencies[latencies.len() - 1],
            latencies.len(),
            resident(pid)?
        );
        ensure!(latencies[latencies.len() - 1] < Duration::from_secs(10));
    }
    Ok(())
}

fn wait(mesh: &Mesh, holds: impl Fn(&Mesh) -> bool, within: Duration) -> Result<()> {
    let start = Instant::now();
    while !holds(mesh) {
        ensure!(start.elapsed() < within, "not in the map within {within:?}");
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
