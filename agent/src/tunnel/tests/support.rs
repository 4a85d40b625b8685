//! Parties with certificates, and handshakes between them over loopback.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::BoxFuture;
use rustls::{
    RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer},
    sign::CertifiedKey,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::JoinHandle,
};

use crate::{
    identity::{CertificateStore, IssueError, Issuer, Svid},
    mesh::SpiffeId,
    tunnel::{
        Session, TlsConfigs, TlsOptions, TunnelError, handshake,
        testing::{TestCa, identity},
    },
};

/// Hands out what a test has put in.
#[derive(Default)]
pub(super) struct Shelf {
    svids: Mutex<BTreeMap<SpiffeId, Svid>>,
    changed: Notify,
}

impl Issuer for Shelf {
    fn name(&self) -> &'static str {
        "test"
    }

    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Svid, IssueError>> {
        let svid = self.svids.lock().unwrap().get(identity).cloned();
        let missing = || IssueError::Unusable { identity: identity.clone(), reason: "not on the shelf".into() };
        Box::pin(async move { svid.ok_or_else(missing) })
    }

    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.changed.notified())
    }
}

/// One agent with one identity.
pub(super) struct Party {
    pub(super) id: SpiffeId,
    pub(super) configs: Arc<TlsConfigs>,
    pub(super) store: Arc<CertificateStore>,
    shelf: Arc<Shelf>,
    run: JoinHandle<()>,
}

impl Drop for Party {
    fn drop(&mut self) {
        self.run.abort();
    }
}

impl Party {
    pub(super) async fn new(svid: &Svid) -> Self {
        Self::with_options(svid, &TlsOptions::default()).await
    }

    pub(super) async fn with_options(svid: &Svid, options: &TlsOptions) -> Self {
        let id = svid.identity.clone();
        let shelf = Arc::new(Shelf::default());
        let store = CertificateStore::new(Arc::clone(&shelf) as _);
        let run = tokio::spawn(Arc::clone(&store).run());
        let configs = TlsConfigs::with_options(Arc::clone(&store), id.trust_domain().clone(), options);
        let party = Self { id, configs, store, shelf, run };
        party.shelf.svids.lock().unwrap().insert(party.id.clone(), svid.clone());
        party.store.want(BTreeSet::from([party.id.clone()]));
        party.store.wait_for(&party.id, Duration::from_secs(10)).await.expect("a certificate");
        party
    }

    /// Replaces the certificate and waits until the store has it.
    pub(super) async fn renew(&self, svid: &Svid) {
        let mut changes = self.store.subscribe();
        changes.mark_unchanged();
        self.shelf.svids.lock().unwrap().insert(self.id.clone(), svid.clone());
        self.shelf.changed.notify_one();
        changes.changed().await.unwrap();
    }
}

/// Both sides' outcome. What `client` returns is made before the server is waited for, so that a refused client can
/// leave.
pub(super) async fn meet<T>(
    client: impl AsyncFnOnce(TcpStream) -> T,
    server: &Party,
) -> (T, Result<Session, TunnelError>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::join!(async { client(TcpStream::connect(address).await.unwrap()).await }, async {
        let (stream, _) = listener.accept().await.unwrap();
        handshake::accept(stream, &server.configs, &server.id).await
    })
}

/// A handshake that has to succeed.
pub(super) async fn established(client: &Party, server: &Party) -> (Session, Session) {
    let (a, b) =
        meet(async |s| handshake::connect(s, &client.configs, &client.id, &server.id, Vec::new).await, server).await;
    (a.unwrap_or_else(|e| panic!("client: {e}")), b.unwrap_or_else(|e| panic!("server: {e}")))
}

/// A client and a server of one CA.
pub(super) async fn two_parties() -> (TestCa, Party, Party) {
    let ca = TestCa::new("root");
    let client = Party::new(&ca.svid(&identity("client"))).await;
    let server = Party::new(&ca.svid(&identity("server"))).await;
    (ca, client, server)
}

/// An SVID whose certificate no issuer would accept.
pub(super) fn unchecked(
    identity: SpiffeId,
    certificate: &rcgen::Certificate,
    key: &rcgen::KeyPair,
    root: &CertificateDer<'static>,
) -> Svid {
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let certified =
        CertifiedKey::from_der(vec![certificate.der().clone()], key, &aws_lc_rs::default_provider()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(root.clone()).unwrap();
    Svid {
        identity,
        certified: Arc::new(certified),
        roots: Arc::new(roots),
        roots_id: [0; 32],
        serial: "00".into(),
        not_before: std::time::SystemTime::UNIX_EPOCH,
        not_after: std::time::SystemTime::now() + Duration::from_hours(1),
    }
}

/// The error of a result whose success has no `Debug`.
pub(super) fn error<T>(result: Result<T, TunnelError>) -> TunnelError {
    match result {
        Ok(_) => panic!("was accepted"),
        Err(e) => e,
    }
}
