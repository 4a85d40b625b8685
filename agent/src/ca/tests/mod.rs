//! The whole server over real connections, beside an API server in memory.

pub(crate) mod cluster;
mod foreign;
mod issuer;
mod refusals;
mod rotation;
mod unvouched;

use std::{collections::HashMap, net::SocketAddr, num::NonZeroU32, path::PathBuf, sync::Arc, time::Duration};

use rcgen::{CertificateParams, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};
use tonic::{Request, Status};

use self::cluster::{Cluster, pod};
use super::{Rates, RootSource, ServiceAccount, Settings, run};
use crate::{
    identity::{
        IstioIssuer, Leaf,
        istio::{
            IMPERSONATED,
            channel::Connection,
            wire::{
                IstioCertificateRequest, Metadata, Value,
                istio_certificate_service_client::IstioCertificateServiceClient,
            },
        },
    },
    mesh::{IstioCa, SpiffeId},
};

/// Nothing awaited in these tests takes nearly as long.
const LIMIT: Duration = Duration::from_secs(30);
/// How often something without an event is looked at.
const LOOK: Duration = Duration::from_millis(10);

fn settings() -> Settings {
    let n = |n: u32| NonZeroU32::new(n).unwrap();
    Settings {
        trust_domain: "td.test".parse().unwrap(),
        namespace: "mesh".into(),
        audience: "underpass-ca".into(),
        agents: vec![ServiceAccount { namespace: "mesh".into(), name: "underpass".into() }],
        root: RootSource::Managed { secret: "underpass-ca".into() },
        lifetime: Duration::from_hours(24),
        root_lifetime: Duration::from_hours(10_000),
        root_replaced_before: Duration::from_hours(1000),
        dns_names: vec!["underpass-ca.mesh.svc".into()],
        config_map: "underpass-ca-root".into(),
        publish_to: vec!["mesh".into()],
        rates: Rates { per_node: n(1000), per_address: n(1000), in_flight: 100, connections: 100 },
        max_pods: 1000,
    }
}

/// A running replica.
struct Replica {
    address: SocketAddr,
    health: SocketAddr,
    run: JoinHandle<anyhow::Result<()>>,
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.run.abort();
    }
}

impl Replica {
    async fn start(cluster: &Cluster, settings: Settings) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::on(listener, cluster, settings).await
    }

    async fn on(listener: TcpListener, cluster: &Cluster, settings: Settings) -> Self {
        let health = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, shown) = (listener.local_addr().unwrap(), health.local_addr().unwrap());
        let run = tokio::spawn(run(settings, cluster.client(), listener, Some(health)));
        Self { address, health: shown, run }
    }

    /// Ends it; its address is free when this returns.
    async fn stop(mut self) {
        self.run.abort();
        let _ = (&mut self.run).await;
    }

    /// Asks its health port.
    async fn get(&self, path: &str) -> (u16, String) {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(self.health).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        (answer[9..12].parse().unwrap(), answer)
    }

    async fn ready(&self) {
        eventually("ready", async || self.get("/healthz/ready").await.0 == 200).await;
    }
}

/// Polls what has no event to wait for.
async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let all = async {
        while !holds().await {
            tokio::time::sleep(LOOK).await;
        }
    };
    timeout(LIMIT, all).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// A cluster with two nodes, each with an agent, and pods: web and db on n1, web and cache on n2.
fn two_nodes() -> Cluster {
    let cluster = Cluster::new();
    for node in ["n1", "n2"] {
        cluster.add_pod(&pod("mesh", &format!("agent-{node}"), "underpass", node));
        cluster.add_pod(&pod("default", &format!("web-{node}"), "web", node));
    }
    cluster.add_pod(&pod("default", "db", "db", "n1"));
    cluster.add_pod(&pod("default", "cache", "cache", "n2"));
    cluster
}

fn identity(name: &str) -> SpiffeId {
    format!("spiffe://td.test/ns/default/sa/{name}").parse().unwrap()
}

/// What an agent has on its disk.
struct Files {
    directory: tempfile::TempDir,
}

impl Files {
    /// With the roots that are published, once they are.
    async fn new(cluster: &Cluster, token: &str) -> Self {
        eventually("the roots are published", async || roots(cluster).is_some()).await;
        let files = Self { directory: tempfile::tempdir().unwrap() };
        std::fs::write(files.root_file(), roots(cluster).unwrap()).unwrap();
        std::fs::write(files.token_file(), format!("{token}\n")).unwrap();
        files
    }

    fn root_file(&self) -> PathBuf {
        self.directory.path().join("ca.crt")
    }

    fn token_file(&self) -> PathBuf {
        self.directory.path().join("token")
    }

    fn ca(&self, address: SocketAddr, lifetime: Duration) -> IstioCa {
        IstioCa {
            address: format!("https://{address}").parse().unwrap(),
            root_file: self.root_file(),
            token_file: self.token_file(),
            cluster_id: "Kubernetes".into(),
            lifetime,
            server_name: Some("underpass-ca.mesh.svc".into()),
        }
    }

    fn issuer(&self, address: SocketAddr) -> IstioIssuer {
        IstioIssuer::new(self.ca(address, Duration::from_hours(24))).unwrap()
    }
}

/// The published roots.
fn roots(cluster: &Cluster) -> Option<String> {
    cluster.object("configmaps", "mesh", "underpass-ca-root")?["data"]["ca.crt"].as_str().map(str::to_owned)
}

/// A client that says what it likes.
struct Raw(Connection);

impl Raw {
    async fn new(cluster: &Cluster, replica: &Replica) -> Self {
        replica.ready().await;
        let files = Files::new(cluster, "none").await;
        let pem = std::fs::read(files.root_file()).unwrap();
        let roots = CertificateDer::pem_slice_iter(&pem).map(Result::unwrap).collect();
        Self(Connection::new(&files.ca(replica.address, Duration::from_hours(1)), &pem, roots).unwrap())
    }

    async fn send(&self, token: Option<&str>, request: IstioCertificateRequest) -> Result<Vec<String>, Status> {
        let mut request = Request::new(request);
        if let Some(token) = token {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        let mut client = IstioCertificateServiceClient::new(self.0.channel.clone());
        Ok(client.create_certificate(request).await?.into_inner().cert_chain)
    }

    /// Asks for `identity` with a proper signing request.
    async fn ask(&self, token: &str, identity: &str) -> Result<Leaf, Status> {
        let chain = self.send(Some(token), request(&csr(identity), Some(identity))).await?;
        Ok(leaf(&chain))
    }
}

fn leaf(chain: &[String]) -> Leaf {
    Leaf::parse(&CertificateDer::from_pem_slice(chain[0].as_bytes()).unwrap()).unwrap()
}

fn csr(identity: &str) -> String {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(identity.try_into().unwrap())];
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()
}

fn request(csr: &str, identity: Option<&str>) -> IstioCertificateRequest {
    let value = |text: &str| HashMap::from([(IMPERSONATED.to_owned(), Value { string_value: Some(text.to_owned()) })]);
    IstioCertificateRequest {
        csr: csr.to_owned(),
        validity_duration: 3600,
        metadata: identity.map(|identity| Metadata { fields: value(identity) }),
    }
}

/// Log lines of this thread.
#[derive(Clone, Default)]
struct Lines(Arc<std::sync::Mutex<Vec<u8>>>);

impl Lines {
    /// Until the guard is dropped.
    fn record(&self) -> tracing::subscriber::DefaultGuard {
        let writer = self.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        tracing::subscriber::set_default(subscriber)
    }

    fn with(&self, part: &str) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().filter(|line| line.contains(part)).map(str::to_owned).collect()
    }
}

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
