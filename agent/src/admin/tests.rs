//! The admin socket, with a real one.

use std::{
    fs,
    io::{ErrorKind, Read as _, Write as _},
    os::unix::{
        fs::PermissionsExt as _,
        net::{UnixListener as StdListener, UnixStream as StdStream},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    task::JoinHandle,
    time::timeout,
};

use super::{
    api::{AllCounters, Connections, KtlsStatus, MAX_LIMIT, PodState, PodStatus, Status},
    client::{Client, ClientError},
    inventory::{self, Certificates, Services, Workloads},
    query::ConnectionQuery,
    server::{MAX_CONNECTIONS, Source, serve_source},
};
use crate::{
    mesh::Snapshot,
    policy::{self, Explanations, Peer, PolicyList, Query, QueryError},
    relay::{ConnectionId, ConnectionInfo, ConnectionOrder, DataPath, Direction},
    sources::file::ReloadStatus,
    telemetry::KtlsFallback,
    telemetry::{Counters, RefusalReason},
};

const SOON: Duration = Duration::from_secs(10);

/// An agent with three connections.
#[derive(Default)]
struct Fake {
    closed: Mutex<Vec<u64>>,
    queries: Mutex<Vec<ConnectionQuery>>,
}

fn info(id: u64) -> ConnectionInfo {
    ConnectionInfo {
        id: ConnectionId(id),
        age_s: 1.5,
        direction: Direction::Outbound,
        workload: "default/web".into(),
        source_identity: Some("spiffe://cluster.local/ns/default/sa/web".into()),
        destination_identity: None,
        source: "10.0.0.1:40000".parse().unwrap(),
        original_destination: "[fd00::1]:80".parse().unwrap(),
        upstream: "10.0.0.2:15008".parse().unwrap(),
        service: Some("evil\x1b[2J\n".into()),
        data_path: DataPath::User,
        fallback: Some(KtlsFallback::Unavailable),
        cipher: Some("TLS13_AES_256_GCM_SHA384".into()),
        resumed: true,
        sent: 1,
        received: u64::MAX,
    }
}

impl Source for Fake {
    fn status(&self) -> Status {
        let pod = PodStatus {
            workload: "default/web".into(),
            identity: "spiffe://cluster.local/ns/default/sa/web".into(),
            netns: "/run/netns/web".into(),
            pod_id: None,
            state: PodState::Refused,
            reason: Some("port 15008 in the pod is already in use".into()),
            certificate: None,
        };
        let ktls = KtlsStatus { ciphers: vec!["AES-128-GCM".into()], rekey: true, reason: None };
        Status::new(ktls, vec![pod], ReloadStatus { accepted: 2, ..ReloadStatus::default() })
    }

    fn connections(&self, query: &ConnectionQuery) -> Connections {
        self.queries.lock().unwrap().push(query.clone());
        Connections { total: 3, connections: (1..=3).take(query.limit()).map(info).collect() }
    }

    fn close(&self, id: ConnectionId) -> bool {
        self.closed.lock().unwrap().push(id.0);
        id.0 <= 3
    }

    fn counters(&self) -> AllCounters {
        let counters = Counters::default();
        counters.refuse(RefusalReason::NotTls);
        AllCounters { agent: counters.snapshot(), bpf: [("captured".to_owned(), 7)].into() }
    }

    fn workloads(&self, limit: usize) -> Workloads {
        inventory::workloads(&mesh(), &self.status().pods, limit)
    }

    fn services(&self, limit: usize) -> Services {
        inventory::services(&mesh(), limit)
    }

    fn certificates(&self) -> Certificates {
        inventory::certificates(&mesh(), "local", |_| None)
    }

    fn policies(&self) -> PolicyList {
        policy::summaries(&mesh())
    }

    fn explain(&self, query: &Query) -> Result<Explanations, QueryError> {
        policy::explain(&mesh(), query)
    }
}

/// One pod with a policy.
fn mesh() -> Snapshot {
    let text = r#"
apiVersion: underpass.io/v1alpha1
kind: NodeConfig
node: node-a
trustDomain: cluster.local
issuer: { local: { caDir: /ca } }
workloads:
  - { name: web, namespace: default, addresses: [10.0.0.1, "fd00::1"], enroll: { netns: /run/netns/web } }
  - { name: client, namespace: default, serviceAccount: client, addresses: [10.0.0.2, "fd00::2"] }
services:
  - { name: web, namespace: default, vips: [10.96.0.1], ports: [{ port: 80, targetPort: 8080 }], endpoints: [{ workload: default/web }] }
policies:
  - name: clients
    namespace: default
    rules: [{ from: [{ source: { principals: [cluster.local/ns/default/sa/client] } }] }]
"#;
    crate::sources::file::parse("node.yaml", text).unwrap().snapshot
}

struct Server {
    source: Arc<Fake>,
    task: JoinHandle<()>,
    dir: TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = Arc::new(Fake::default());
        let task = tokio::spawn(serve_source(&socket_in(&dir), Arc::clone(&source) as _).unwrap());
        Self { source, task, dir }
    }

    fn path(&self) -> PathBuf {
        socket_in(&self.dir)
    }

    fn client(&self) -> Client {
        Client::new(&self.path())
    }

    /// Sends bytes and returns everything that comes back.
    async fn raw(&self, request: &[u8]) -> String {
        let mut stream = UnixStream::connect(self.path()).await.unwrap();
        // The server may answer and close before it has read everything.
        let _ = stream.write_all(request).await;
        let mut answer = Vec::new();
        let _ = timeout(SOON, stream.read_to_end(&mut answer)).await.expect("an end");
        String::from_utf8(answer).unwrap()
    }
}

fn socket_in(dir: &TempDir) -> PathBuf {
    dir.path().join("run/admin.sock")
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

#[tokio::test]
async fn every_request_is_answered() {
    let server = Server::start();
    let client = server.client();

    let status = client.status().await.unwrap();
    assert_eq!(status, server.source.status());
    assert_eq!(status.version, env!("CARGO_PKG_VERSION"));

    let listed = client.connections(&limit(2)).await.unwrap();
    assert_eq!((listed.total, listed.connections.len()), (3, 2));
    assert_eq!(listed.connections[0].received, u64::MAX);
    assert_eq!(listed.connections[0].service.as_deref(), Some("evil\x1b[2J\n"), "names travel unchanged");

    assert_eq!(client.close(ConnectionId(3)).await.unwrap().closed, ConnectionId(3));
    let error = client.close(ConnectionId(4)).await.unwrap_err();
    assert!(
        matches!(&error, ClientError::Refused { status: 404, error } if error.contains("no connection 4")),
        "{error}"
    );
    assert_eq!(*server.source.closed.lock().unwrap(), [3, 4]);

    let counters = client.counters().await.unwrap();
    assert_eq!((counters.agent.refused["not-tls"], counters.bpf["captured"]), (1, 7));
}

fn limit(n: usize) -> ConnectionQuery {
    ConnectionQuery { limit: Some(n), ..ConnectionQuery::default() }
}

/// Whatever is asked for arrives as it was meant.
#[tokio::test]
async fn queries_travel_unchanged() {
    let server = Server::start();
    let queries = [
        ConnectionQuery::default(),
        ConnectionQuery {
            limit: Some(7),
            workload: Some("a b/c&limit=1%\u{1b}[2J\u{e4}".into()),
            identity: Some("spiffe://td/ns/a/sa/b?x=y#z+".into()),
            direction: Some(Direction::Inbound),
            data_path: Some(DataPath::Plain),
            sort: ConnectionOrder::Bytes,
        },
    ];
    for query in &queries {
        server.client().connections(query).await.unwrap();
    }
    assert_eq!(*server.source.queries.lock().unwrap(), queries);
    let long = ConnectionQuery { workload: Some("x".repeat(64 * 1024)), ..ConnectionQuery::default() };
    let error = server.client().connections(&long).await.unwrap_err();
    assert!(!matches!(error, ClientError::NotRunning { .. }), "{error}");
    server.client().status().await.expect("still serving");
}

#[tokio::test]
async fn the_inventory_is_the_configuration_and_what_became_of_it() {
    let server = Server::start();
    let client = server.client();
    let all = client.workloads(10).await.unwrap();
    assert_eq!(all, server.source.workloads(10));
    let names: Vec<_> = all.workloads.iter().map(|w| (w.workload.as_str(), w.local, w.state)).collect();
    assert_eq!(names, [("default/web", true, Some(PodState::Refused)), ("default/client", false, None)]);
    assert!(all.workloads[0].reason.as_ref().unwrap().contains("15008"));
    let first = client.workloads(1).await.unwrap();
    assert_eq!((first.total, first.workloads.len()), (2, 1), "the limit is not the total");

    let services = client.services(10).await.unwrap();
    assert_eq!(services, server.source.services(10));
    let web = &services.services[0];
    assert_eq!((web.service.as_str(), web.endpoints_total, web.ports[0].target_port), ("default/web", 1, 8080));
    assert_eq!(web.endpoints[0].workload, "default/web");

    let certificates = client.certificates().await.unwrap();
    assert_eq!(certificates, server.source.certificates());
    assert_eq!(certificates.certificates.len(), 1, "only this node's: {certificates:?}");
    assert_eq!(certificates.certificates[0].workloads, ["default/web"]);
}

#[tokio::test]
async fn policies_are_listed_and_explained() {
    let server = Server::start();
    let client = server.client();
    assert_eq!(client.policies().await.unwrap(), server.source.policies());

    let identity = |account: &str| format!("spiffe://cluster.local/ns/default/sa/{account}").parse().unwrap();
    for to in ["10.0.0.1:80", "[fd00::1]:80", "[::ffff:10.0.0.1]:80"] {
        for (peer, allowed) in [
            (Peer::Mesh { identity: identity("client"), source: None }, true),
            (Peer::Mesh { identity: identity("client"), source: Some("fd00::7".parse().unwrap()) }, true),
            (Peer::Mesh { identity: identity("other"), source: None }, false),
            (Peer::Plaintext("fd00::2".parse().unwrap()), false),
        ] {
            let query = Query { peer, to: to.parse().unwrap() };
            let explained = client.explain(&query).await.unwrap();
            assert_eq!(explained, server.source.explain(&query).unwrap());
            assert_eq!(explained.explanations[0].allowed, allowed, "{query:?}");
        }
    }
    let nowhere = Query { peer: Peer::Plaintext("10.9.9.9".parse().unwrap()), to: "10.9.9.8:80".parse().unwrap() };
    let error = client.explain(&nowhere).await.unwrap_err();
    assert!(
        matches!(&error, ClientError::Refused { status: 404, error } if error.contains("10.9.9.8 is the address of no")),
        "{error}"
    );
}

#[tokio::test]
async fn what_is_not_a_request_is_refused() {
    let server = Server::start();
    for (request, status) in [
        ("GET /v1/connections?limit=0", 400),
        ("GET /v1/connections?limit=100001", 400),
        ("GET /v1/connections?limit=-1", 400),
        ("GET /v1/connections?limit=99999999999999999999999", 400),
        ("GET /v1/connections?limt=1", 400),
        ("GET /v1/connections?direction=up", 400),
        ("GET /v1/connections?data_path=", 400),
        ("GET /v1/connections?sort=age", 400),
        ("GET /v1/workloads?limit=0", 400),
        ("GET /v1/workloads?name=web", 400),
        ("GET /v1/services?limit=100001", 400),
        ("POST /v1/certificates", 405),
        ("POST /v1/connections/x/close", 400),
        ("POST /v1/connections/18446744073709551616/close", 400),
        ("GET /v1/connections/1/close", 405),
        ("POST /v1/status", 405),
        ("POST /v1/policies", 405),
        ("GET /v1/policies/explain", 400),
        ("GET /v1/policies/explain?to=10.0.0.1:80", 400),
        ("GET /v1/policies/explain?to=10.0.0.1&plaintext_from=10.0.0.2", 400),
        ("GET /v1/policies/explain?to=10.0.0.1:0&plaintext_from=10.0.0.2", 400),
        ("GET /v1/policies/explain?to=10.0.0.1:15008&plaintext_from=10.0.0.2", 400),
        ("GET /v1/policies/explain?to=10.0.0.1:80&plaintext_from=x", 400),
        ("GET /v1/policies/explain?to=10.0.0.1:80&from=client", 400),
        ("GET /v1/policies/explain?to=10.0.0.1:80&from=%1b%5b2J", 400),
        ("GET /v1/policies/explain?to=10.0.0.1:80&from=spiffe://td/ns/a/sa/b&plaintext_from=10.0.0.2", 400),
        ("GET /v1/policies/explain?to=10.0.0.1:80&source_ip=10.0.0.2&plaintext_from=10.0.0.2", 400),
        ("GET /v1/policies/explain?to=10.0.0.1:80&plaintext_from=10.0.0.2&x=1", 400),
        ("GET /v1/policies/explain?to=10.0.0.9:80&plaintext_from=10.0.0.2", 404),
        ("GET /", 404),
        ("GET /v2/status", 404),
    ] {
        let answer = server.raw(format!("{request} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {answer}");
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert!(body["error"].as_str().is_some_and(|e| !e.is_empty()), "{request}: {body}");
    }
    assert!(server.source.closed.lock().unwrap().is_empty());

    let answer = server.raw(b"\x16\x03\x01 this is not HTTP\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    server.client().status().await.expect("still serving");
}

#[tokio::test]
async fn oversized_requests_are_refused() {
    let server = Server::start();
    for request in [
        format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "a".repeat(200_000)),
        format!("GET /v1/status HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "a".repeat(200_000)),
        format!("GET /v1/status HTTP/1.1\r\nhost: x\r\n{}\r\n", "x: y\r\n".repeat(1000)),
        format!(
            "POST /v1/connections/1/close HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n{}",
            "a".repeat(1000)
        ),
        "POST /v1/connections/1/close HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\naaaaa\r\n0\r\n\r\n"
            .into(),
    ] {
        let answer = server.raw(request.as_bytes()).await;
        let refused = ["HTTP/1.1 431 ", "HTTP/1.1 414 ", "HTTP/1.1 413 "].iter().any(|s| answer.starts_with(s));
        assert!(refused || answer.is_empty(), "{}: {answer}", &request[..40]);
    }
    assert!(server.source.closed.lock().unwrap().is_empty(), "a refused request does nothing");
    let all = server.client().connections(&limit(MAX_LIMIT)).await.unwrap();
    assert_eq!(all.total, 3);
}

#[tokio::test]
async fn idle_clients_cannot_shut_others_out() {
    let server = Server::start();
    let mut idle = Vec::new();
    for _ in 0..2 * MAX_CONNECTIONS {
        idle.push(UnixStream::connect(server.path()).await.unwrap());
    }
    let before = Instant::now();
    timeout(SOON, server.client().status()).await.expect("idle ones are cut").unwrap();
    assert!(before.elapsed() < Duration::from_secs(2), "at once: {:?}", before.elapsed());
}

#[tokio::test]
async fn the_socket_is_private_and_goes_away() {
    let server = Server::start();
    let path = server.path();
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().unwrap()), 0o700);
    let names: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["admin.sock"], "nothing else is left");

    server.task.abort();
    timeout(SOON, async {
        while path.exists() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the socket file is removed");
    let error = server.client().status().await.unwrap_err();
    assert!(matches!(error, ClientError::NotRunning { .. }), "{error}");
    assert!(error.to_string().contains("start it with `underpass run`"), "{error}");
}

#[tokio::test]
async fn a_live_agent_is_not_replaced_and_a_dead_one_is() {
    let server = Server::start();
    let path = server.path();
    let Err(error) = serve_source(&path, Arc::new(Fake::default())) else { panic!("must be refused") };
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    assert!(error.to_string().contains("another agent is running with"), "{error}");
    server.client().status().await.expect("the live one still answers");

    // A dead agent's socket: bound, nobody listening any more.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    drop(StdListener::bind(&path).unwrap());
    assert!(path.exists());
    let task = tokio::spawn(serve_source(&path, Arc::new(Fake::default())).unwrap());
    Client::new(&path).status().await.unwrap();
    task.abort();

    // Somebody who is no agent, and a file that is no socket.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let foreign = StdListener::bind(&path).unwrap();
    let Err(error) = serve_source(&path, Arc::new(Fake::default())) else { panic!("must be refused") };
    assert_eq!(error.kind(), ErrorKind::AddrInUse, "{error}");
    drop(foreign);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    let Err(error) = serve_source(&path, Arc::new(Fake::default())) else { panic!("must be refused") };
    assert!(error.to_string().contains("exists and is no socket"), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

#[tokio::test]
async fn unsuitable_places_are_refused_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o1777)).unwrap();
    for (path, expected) in [
        (shared.join("admin.sock"), "--run-dir"),
        (dir.path().join("x".repeat(100)).join("admin.sock"), "longer than 107 bytes; use a shorter --run-dir"),
        (PathBuf::from("admin.sock"), "give an absolute path"),
    ] {
        let Err(error) = serve_source(&path, Arc::new(Fake::default())) else { panic!("must be refused") };
        assert!(error.to_string().contains(expected), "{error}");
        assert!(!path.exists());
    }
}

/// Even when somebody opened the modes by mistake.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_users_are_refused() {
    let server = Server::start();
    let path = server.path();
    for open in [server.dir.path(), path.parent().unwrap(), &path] {
        fs::set_permissions(open, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let ask = |uid: u32| {
        let path = path.clone();
        tokio::task::spawn_blocking(move || {
            let script = "import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.settimeout(10)\ns.connect(sys.argv[1])\nprint('connected',flush=True)\ntry:\n  s.sendall(b'GET /v1/status HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n')\n  print(s.recv(100).decode())\nexcept OSError as e: print('cut')\n";
            let out = Command::new("python3").args(["-c", script]).arg(path).uid(uid).gid(uid).output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            String::from_utf8(out.stdout).unwrap()
        })
    };
    let root = ask(0).await.unwrap();
    assert!(root.contains("HTTP/1.1 200 OK"), "the check itself works: {root}");
    let nobody = ask(65534).await.unwrap();
    assert!(nobody.starts_with("connected") && !nobody.contains("HTTP"), "{nobody}");
}

#[tokio::test]
async fn an_answer_that_is_none_is_an_error_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = StdListener::bind(&path).unwrap();
    let serve = |answer: &'static [u8]| {
        let listener = listener.try_clone().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _): (StdStream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]);
            stream.write_all(answer).unwrap();
        })
    };
    for (answer, expected) in [
        (&b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"[..], "not the expected JSON"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n{}", "answer of the agent"),
        (b"SSH-2.0-OpenSSH\r\n", "answer of the agent"),
        (b"", "answer of the agent"),
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 1\r\n\r\nx", "refused (503): Service Unavailable"),
    ] {
        let peer = serve(answer);
        let error = timeout(SOON, Client::new(&path).status()).await.unwrap().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        peer.join().unwrap();
    }
}
