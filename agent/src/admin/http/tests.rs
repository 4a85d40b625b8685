//! The ports, with real ones; the node behind them is made up.

#![expect(clippy::struct_field_names, reason = "the names are those of the format that is read")]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex},
    time::Duration,
};

use serde::Deserialize;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::Notify,
    task::JoinSet,
    time::timeout,
};

use super::{Health, NodeView, View, bind, health::STUCK, metrics, serve};
use crate::{
    bounds::Bound,
    capture::{InterfaceGuard, Share},
    identity::{CertificateStore, LocalIssuer},
    mesh::{MeshStore, Snapshot, WorkloadKey},
    proxy::{Applied, PodState, PodStatus},
    relay::{Connection, ConnectionTable, DataPath, Direction, NewConnection, ThreadHealth},
    sources::{
        file::{ReloadStatus, parse},
        kubernetes::{Kind, KindStatus, SourceStatus},
    },
    telemetry::{AccessLog, Account, Labels, LogChoice, Reporter, Telemetry},
};

const SOON: Duration = Duration::from_secs(20);

/// A node whose parts can be broken.
#[derive(Default)]
struct Fake {
    pods: Mutex<Vec<PodStatus>>,
    applied: Mutex<Applied>,
    problems: Mutex<Vec<String>>,
    relay: Mutex<Vec<ThreadHealth>>,
}

impl NodeView for Fake {
    fn bpf_counters(&self) -> BTreeMap<String, u64> {
        [("captured".to_owned(), 7)].into()
    }

    fn plaintext_left(&self) -> usize {
        2
    }

    fn bpf_maps(&self) -> Vec<(&'static str, usize, usize)> {
        vec![("MESH", 3, 1024)]
    }

    fn bpf_shares(&self) -> Vec<Share> {
        vec![Share { map: "FLOWS", fullest: Some((7, 12)), limit: 15_420 }]
    }

    fn capture_problems(&self) -> Vec<String> {
        self.problems.lock().unwrap().clone()
    }

    fn interfaces(&self) -> Vec<InterfaceGuard> {
        let guard = |kind: &str, node_guard: Option<&str>| InterfaceGuard {
            interface: "eth0".into(),
            kind: kind.into(),
            node_guard: node_guard.map(str::to_owned),
            moved: false,
        };
        vec![guard("veth", Some("veth17")), guard("veth", Some("veth18")), guard("macvlan", None)]
    }

    fn pods(&self) -> Vec<PodStatus> {
        self.pods.lock().unwrap().clone()
    }

    fn applied(&self) -> Applied {
        self.applied.lock().unwrap().clone()
    }

    fn reload(&self) -> ReloadStatus {
        ReloadStatus { accepted: 1, ..ReloadStatus::default() }
    }

    fn cluster(&self) -> Option<SourceStatus> {
        let kind = |kind, error: Option<&str>| KindStatus {
            kind,
            version: Some("v1".to_owned()),
            objects: 3,
            synced: true,
            heard_seconds_ago: Some(1),
            error: error.map(ToOwned::to_owned),
        };
        let kinds = vec![kind(Kind::Pod, None), kind(Kind::PeerAuthentication, Some("not served"))];
        Some(SourceStatus { kinds, ..SourceStatus::default() })
    }

    fn relay(&self) -> Vec<ThreadHealth> {
        self.relay.lock().unwrap().clone()
    }
}

/// A view of one enrolled pod with a certificate and a live connection.
struct Scene {
    node: Arc<Fake>,
    view: View,
    quit: Arc<Notify>,
    health: Arc<Health>,
    tasks: JoinSet<()>,
    _connection: Arc<Connection>,
    _ca: TempDir,
}

fn mesh() -> Snapshot {
    let text = r#"
apiVersion: underpass.io/v1alpha1
kind: NodeConfig
node: node-a
trustDomain: cluster.local
issuer: { local: { caDir: /ca } }
workloads:
  - { name: web, namespace: default, serviceAccount: web, addresses: [10.0.0.1, "fd00::1"], labels: { app: shop }, enroll: { netns: /run/netns/web } }
  - { name: client, namespace: default, serviceAccount: client, addresses: [10.0.0.2] }
services:
  - { name: web, namespace: default, vips: [10.96.0.1], ports: [{ port: 80, targetPort: 8080 }], endpoints: [{ workload: default/web }] }
policies:
  - name: clients
    namespace: default
    action: ALLOW
    selector: { matchLabels: { app: shop } }
    rules:
      - from: [{ source: { principals: [cluster.local/ns/default/sa/client, "*/sa/ops"] } }]
        to: [{ operation: { ports: ["8080"] } }]
"#;
    parse("n.yaml", text).unwrap().snapshot
}

impl Scene {
    async fn new() -> Self {
        let mut tasks = JoinSet::new();
        let mesh = Arc::new(MeshStore::new(Snapshot::empty("node-a", "cluster.local".parse().unwrap())));
        let snapshot = mesh.replace(self::mesh());
        let ca = tempfile::tempdir().unwrap();
        let issuer = LocalIssuer::open(&ca.path().join("ca"), &snapshot.trust_domain, Duration::from_hours(1)).unwrap();
        let certificates = CertificateStore::new(Arc::new(issuer));
        certificates.want(snapshot.local_identities());
        tasks.spawn(Arc::clone(&certificates).run());
        let web = snapshot.local_workloads().next().unwrap();
        assert!(certificates.wait_for(&web.identity, SOON).await.is_some());
        let pod = PodStatus {
            key: web.key.clone(),
            identity: Some(web.identity.clone()),
            netns: "/run/netns/web".into(),
            namespace: None,
            state: PodState::Enrolled { pod_id: 1 },
        };
        let thread = ThreadHealth { connections: 1, stuck: Duration::ZERO, ended: false };
        let node = Arc::new(Fake {
            pods: Mutex::new(vec![pod]),
            applied: Mutex::new(Applied { generation: 1, error: None }),
            problems: Mutex::default(),
            relay: Mutex::new(vec![thread; 2]),
        });
        let (table, telemetry) = (ConnectionTable::new(), Telemetry::new(8000, AccessLog::none()));
        let account = Account::open(&telemetry, Labels::new(Reporter::Destination), LogChoice::Always, None);
        let connection = table.add_accounted(new(&web.key), Some(account));
        connection.sent.store(11, std::sync::atomic::Ordering::Relaxed);
        let view = View { mesh, table, certificates, telemetry, node: Arc::clone(&node) as _ };
        Self { node, view, quit: Arc::default(), health: Arc::default(), tasks, _connection: connection, _ca: ca }
    }

    fn watch(&mut self) {
        self.tasks.spawn(Arc::clone(&self.health).watch(self.view.clone()));
    }

    /// Serves a router on a port of its own and asks once.
    async fn ask(&mut self, router: axum::Router, request: &str) -> (u16, String) {
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let server = self.tasks.spawn(serve(listener, router, Bound::Probes));
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(SOON, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        server.abort();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    async fn admin(&mut self, method: &str, path: &str) -> (u16, String) {
        let router = super::admin(self.view.clone(), Arc::clone(&self.quit));
        self.ask(router, &format!("{method} {path} HTTP/1.1\r\nHost: localhost:15000\r\n\r\n")).await
    }

    async fn probe(&mut self, what: &str) -> (u16, String) {
        let router = super::health(Arc::clone(&self.health));
        self.ask(router, &format!("GET /healthz/{what} HTTP/1.1\r\nHost: 10.0.0.1\r\n\r\n")).await
    }
}

/// More idle connections than a port serves, from the node itself: the newest is answered.
#[tokio::test]
async fn idle_connections_do_not_keep_others_from_a_port() {
    let mut tasks = JoinSet::new();
    let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let to = listener.local_addr().unwrap();
    tasks.spawn(serve(listener, super::health(Arc::default()), Bound::Probes));
    let mut idle = Vec::new();
    for n in 0..100 {
        let mut stream = TcpStream::connect(to).await.unwrap();
        // Nothing at all, or the beginning of a request.
        stream.write_all(&b"GET /healthz/live HTTP/1.1\r\n"[..n % 28]).await.unwrap();
        idle.push(stream);
    }
    let began = std::time::Instant::now();
    let mut stream = TcpStream::connect(to).await.unwrap();
    stream.write_all(b"GET /healthz/live HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    timeout(SOON, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

fn new(workload: &WorkloadKey) -> NewConnection {
    NewConnection {
        workload: workload.clone(),
        pod_id: 1,
        direction: Direction::Inbound,
        source_identity: None,
        destination_identity: None,
        peer: None,
        source: "10.0.0.2:40000".parse().unwrap(),
        original_destination: "10.96.0.1:80".parse().unwrap(),
        upstream: "10.0.0.1:8080".parse().unwrap(),
        service: None,
        data_path: DataPath::User,
        fallback: None,
        cipher: None,
        resumed: false,
    }
}

/// As `istioctl ztunnel-config` reads it: the fields that its `api.go` names, and nothing that it requires may be missing.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Dump {
    workloads: Vec<Workload>,
    services: Vec<Service>,
    policies: Vec<Policy>,
    certificates: Vec<Certificates>,
    workload_state: HashMap<String, State>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(dead_code, reason = "that they are there is what is tested")]
struct Workload {
    uid: String,
    workload_ips: Vec<String>,
    protocol: String,
    name: String,
    namespace: String,
    service_account: String,
    workload_name: String,
    workload_type: String,
    canonical_name: String,
    canonical_revision: String,
    cluster_id: String,
    trust_domain: String,
    node: String,
    status: String,
    hostname: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Service {
    name: String,
    namespace: String,
    hostname: String,
    vips: Vec<String>,
    ports: HashMap<String, i64>,
    endpoints: HashMap<String, Endpoint>,
    ip_families: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint {
    workload_uid: String,
    service: String,
    port: HashMap<u16, u16>,
}

#[derive(Deserialize)]
struct Policy {
    name: String,
    namespace: String,
    scope: String,
    action: String,
    rules: Vec<Vec<Vec<Match>>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Match {
    principals: Vec<StringMatch>,
    destination_ports: Vec<u16>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct StringMatch {
    exact: String,
    suffix: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Certificates {
    identity: String,
    state: String,
    cert_chain: Vec<Certificate>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Certificate {
    pem: String,
    serial_number: String,
    valid_from: String,
    expiration_time: String,
}

#[derive(Deserialize)]
struct State {
    state: String,
    connections: Connections,
    info: Info,
}

#[derive(Deserialize)]
struct Connections {
    inbound: Vec<InboundConnection>,
    outbound: Vec<InboundConnection>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct InboundConnection {
    src: String,
    original_dst: String,
    actual_dst: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Info {
    name: String,
    namespace: String,
    trust_domain: String,
    service_account: String,
}

#[tokio::test]
async fn istioctl_reads_the_config_dump() {
    let mut scene = Scene::new().await;
    let (status, body) = scene.admin("GET", "/config_dump").await;
    assert_eq!(status, 200, "{body}");
    let dump: Dump = serde_json::from_str(&body).expect("what istioctl expects");
    let names: Vec<_> = dump.workloads.iter().map(|w| (&*w.namespace, &*w.name, &*w.canonical_name)).collect();
    assert_eq!(names, [("default", "client", "client"), ("default", "web", "shop")]);
    assert_eq!(dump.workloads[1].workload_ips, ["10.0.0.1", "fd00::1"]);
    assert_eq!((&*dump.workloads[1].service_account, &*dump.workloads[1].node), ("web", "node-a"));

    let service = &dump.services[0];
    assert_eq!((&*service.name, &*service.namespace, &*service.ip_families), ("web", "default", "IPv4"));
    assert_eq!(
        (&*service.hostname, &service.vips[..]),
        ("web.default.svc.cluster.local", &["/10.96.0.1".to_owned()][..])
    );
    assert_eq!(service.ports["80"], 8080);
    let (uid, endpoint) = service.endpoints.iter().next().unwrap();
    assert_eq!((uid, &endpoint.workload_uid), (&dump.workloads[1].uid, uid));
    assert_eq!((&*endpoint.service, endpoint.port[&80]), ("default/web.default.svc.cluster.local", 8080));

    let policy = &dump.policies[0];
    assert_eq!((&*policy.namespace, &*policy.name), ("default", "clients"));
    assert_eq!((&*policy.action, &*policy.scope), ("Allow", "WorkloadSelector"));
    let [rule] = &policy.rules[..] else { panic!("one rule: {body}") };
    let [from, to] = &rule[..] else { panic!("two clauses: {body}") };
    assert_eq!(from[0].principals[0].exact, "cluster.local/ns/default/sa/client");
    assert_eq!(from[0].principals[1].suffix, "/sa/ops");
    assert_eq!(to[0].destination_ports, [8080]);

    let certificates = &dump.certificates[0];
    assert_eq!(
        (&*certificates.identity, &*certificates.state),
        ("spiffe://cluster.local/ns/default/sa/web", "Available")
    );
    let leaf = &certificates.cert_chain[0];
    assert!(leaf.serial_number.bytes().all(|b| b.is_ascii_digit()), "decimal: {}", leaf.serial_number);
    for time in [&leaf.valid_from, &leaf.expiration_time] {
        humantime::parse_rfc3339(time).expect("RFC 3339");
    }
    let pem = base64::Engine::decode(&base64::prelude::BASE64_STANDARD, &leaf.pem).unwrap();
    assert_eq!(pem::parse(pem).unwrap().tag(), "CERTIFICATE");

    let state = &dump.workload_state[uid];
    assert_eq!((&*state.state, &*state.info.name, &*state.info.namespace), ("Up", "web", "default"));
    assert_eq!((&*state.info.trust_domain, &*state.info.service_account), ("cluster.local", "web"));
    let [connection] = &state.connections.inbound[..] else { panic!("one connection: {body}") };
    assert_eq!(
        [&*connection.src, &*connection.original_dst, &*connection.actual_dst],
        ["10.0.0.2:40000", "10.96.0.1:80", "10.0.0.1:8080"]
    );
    assert!(state.connections.outbound.is_empty());
}

#[tokio::test]
async fn the_config_dump_has_no_key() {
    let mut scene = Scene::new().await;
    let (_, body) = scene.admin("GET", "/config_dump").await;
    assert!(!body.contains("PRIVATE"));
    for certificate in serde_json::from_str::<Dump>(&body).unwrap().certificates.iter().flat_map(|c| &c.cert_chain) {
        let pem = base64::Engine::decode(&base64::prelude::BASE64_STANDARD, &certificate.pem).unwrap();
        for part in pem::parse_many(pem).unwrap() {
            assert_eq!(part.tag(), "CERTIFICATE");
        }
    }
}

#[tokio::test]
async fn admin_answers_tools_on_the_node_and_refuses_the_rest() {
    let mut scene = Scene::new().await;
    assert!(scene.admin("GET", "/").await.1.contains("/quitquitquit"));
    assert_eq!(scene.admin("GET", "/nothing").await.0, 404);
    assert_eq!(scene.admin("GET", "/quitquitquit").await.0, 405, "a link that somebody follows must not end it");
    assert_eq!(scene.admin("POST", "/logging?level=info,=,x").await.0, 200, "this process has no log to change");
    assert_eq!(scene.admin("POST", "/logging?level=debug&reset").await.0, 400);
    assert_eq!(scene.admin("POST", &format!("/logging?level={}", "x".repeat(5000))).await.0, 400);
    let router = super::admin(scene.view.clone(), Arc::clone(&scene.quit));
    let foreign = "POST /quitquitquit HTTP/1.1\r\nHost: attacker.example\r\n\r\n";
    assert_eq!(scene.ask(router, foreign).await.0, 403);
    assert!(timeout(Duration::from_millis(50), scene.quit.notified()).await.is_err(), "nobody was heard");
    assert_eq!(scene.admin("POST", "/quitquitquit").await, (200, "shutting down\n".to_owned()));
    timeout(SOON, scene.quit.notified()).await.expect("the agent is told");
}

#[tokio::test]
async fn readiness_names_what_is_missing() {
    let mut scene = Scene::new().await;
    let (status, body) = scene.probe("ready").await;
    assert_eq!((status, body.contains("starting")), (503, true), "{body}");
    assert_eq!(scene.probe("live").await.0, 200, "starting is being alive");
    scene.watch();
    tokio::task::yield_now().await;
    let (status, body) = scene.probe("ready").await;
    assert_eq!(status, 200, "{body}");
    for condition in ["configuration: ok", "certificates: ok: 1 of 1", "bpf: ok", "listeners: ok: 1 of 1"] {
        assert!(body.contains(condition), "{condition}: {body}");
    }

    *scene.node.applied.lock().unwrap() = Applied { generation: 1, error: Some("MESH is full".into()) };
    let (status, body) = scene.probe("ready").await;
    assert_eq!((status, body.contains("bpf: not ready: MESH is full")), (503, true), "{body}");
    scene.node.applied.lock().unwrap().error = None;
    // Stricter than it is written is no reason to send pods elsewhere.
    *scene.node.problems.lock().unwrap() = vec!["too many addresses".into(), "too many ports".into()];
    let (status, body) = scene.probe("ready").await;
    assert_eq!((status, body.contains("(1 more in the status): too many addresses")), (200, true), "{body}");
    let page = metrics::render(&scene.view);
    for line in [
        "underpass_capture_problems{} 2",
        "underpass_bpf_map_fullest_pod_entries{map=\"FLOWS\"} 12",
        "underpass_bpf_map_pod_limit{map=\"FLOWS\"} 15420",
    ] {
        assert!(page.contains(line), "{line}: {page}");
    }
    scene.node.problems.lock().unwrap().clear();

    let refused = PodState::Refused { reason: "port \x1b[31m in use\n".into() };
    scene.node.pods.lock().unwrap()[0].state = refused.clone();
    let (status, body) = scene.probe("ready").await;
    assert_eq!(
        (status, body.contains("listeners: not ready: 0 of 1 pods have listeners; not: default/web (port")),
        (503, true),
        "{body}"
    );
    assert!(!body.contains('\x1b') && body.lines().count() == 4, "{body:?}");
    // One of two is told and leaves the node ready.
    let mut other = scene.node.pods()[0].clone();
    other.state = PodState::Enrolled { pod_id: 2 };
    scene.node.pods.lock().unwrap().push(other);
    let (status, body) = scene.probe("ready").await;
    assert_eq!((status, body.contains("listeners: ok: 1 of 2")), (200, true), "{body}");

    scene.view.certificates.want(BTreeSet::from(["spiffe://other.example/ns/a/sa/b".parse().unwrap()]));
    let (status, body) = scene.probe("ready").await;
    assert_eq!((status, body.contains("certificates: not ready: 0 of 1")), (503, true), "{body}");
}

#[tokio::test]
async fn liveness_notices_a_stuck_thread() {
    let mut scene = Scene::new().await;
    scene.watch();
    tokio::task::yield_now().await;
    scene.node.relay.lock().unwrap()[1].stuck = STUCK.checked_sub(Duration::from_millis(1)).unwrap();
    assert_eq!(scene.probe("live").await, (200, "ok\n".to_owned()));
    scene.node.relay.lock().unwrap()[1].stuck = STUCK;
    let (status, body) = scene.probe("live").await;
    assert_eq!((status, &*body), (503, "relay thread 1 is stuck for 15 s, with 1 connections\n"));
    scene.node.relay.lock().unwrap()[1] = ThreadHealth { connections: 0, stuck: Duration::ZERO, ended: true };
    assert_eq!(scene.probe("live").await, (503, "relay thread 1 has ended\n".to_owned()));
}

#[tokio::test]
async fn metrics_are_open_metrics() {
    let mut scene = Scene::new().await;
    let request = "GET /stats/prometheus HTTP/1.1\r\nHost: 10.0.0.1:15020\r\n\r\n";
    let (status, body) = scene.ask(metrics(scene.view.clone()), request).await;
    assert_eq!((status, body.ends_with("# EOF\n")), (200, true));
    let value = |sample: &str| {
        let line =
            body.lines().find(|line| line.starts_with(sample)).unwrap_or_else(|| panic!("no {sample} in {body}"));
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    // The live connection's bytes are there, although it has not ended.
    assert!((value("istio_tcp_sent_bytes_total{") - 11.0).abs() < 1e-9);
    assert!((value("istio_tcp_sockets_open{") - 1.0).abs() < 1e-9);
    assert!((value(r#"underpass_bytes_total{data_path="user",to="upstream"}"#) - 11.0).abs() < 1e-9);
    assert!((value(r#"underpass_connections_open{direction="inbound",data_path="user"}"#) - 1.0).abs() < 1e-9);
    assert!((value(r#"underpass_bpf_events_total{event="captured"}"#) - 7.0).abs() < 1e-9);
    assert!((value("underpass_plaintext_left") - 2.0).abs() < 1e-9);
    assert!((value(r#"underpass_pod_interfaces{node_guard="yes"}"#) - 2.0).abs() < 1e-9);
    assert!((value(r#"underpass_pod_interfaces{node_guard="no"}"#) - 1.0).abs() < 1e-9);
    assert!((value(r#"underpass_ready{condition="certificates"}"#) - 1.0).abs() < 1e-9);
    let expiry =
        value("underpass_certificate_expiry_timestamp_seconds{identity=\"spiffe://cluster.local/ns/default/sa/web\"}");
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    assert!((now + 3000.0..now + 3601.0).contains(&expiry), "{expiry}");
    assert!(value("process_resident_memory_bytes") > 1e6);
    // Each name is described once, before its samples.
    let names: Vec<_> = body.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "{names:?}");
}
