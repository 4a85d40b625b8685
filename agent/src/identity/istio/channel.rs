//! The connection to the authority: TLS 1.3 with its own roots, HTTP/2.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName},
    version::TLS13,
};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use crate::mesh::IstioCa;

/// Longest time for TCP and TLS together. Two of them fit into one attempt of the certificate store.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// Longest time for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(8);
/// A peer that has vanished is noticed like that of a tunnel: keepalive after 10 s, three probes 5 s apart. HTTP/2 pings
/// would do it too, but istiod's server takes them for abuse.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(10), Duration::from_secs(5), 3);
/// The same for data that is not acknowledged (`TCP_USER_TIMEOUT`).
const UNACKNOWLEDGED: Duration = Duration::from_secs(25);

/// A lazy connection: made with the first request, and again when it broke.
#[derive(Clone)]
pub(crate) struct Connection {
    pub(crate) channel: Channel,
    /// What the server is verified with, PEM.
    pub(crate) roots: Arc<[u8]>,
    pub(crate) id: u64,
}

impl Connection {
    /// `roots` are those in `pem`.
    pub(crate) fn new(ca: &IstioCa, pem: &[u8], roots: Vec<CertificateDer<'static>>) -> Result<Self, String> {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let connector = TlsConnector::from(Arc::new(config(roots)?));
        let (host, port) = (Arc::<str>::from(ca.address.host()), ca.address.port());
        let name = ca.server_name.clone().unwrap_or_else(|| host.to_string());
        let name = ServerName::try_from(name.clone())
            .map_err(|_| format!("{name:?} is no host name; correct issuer.istio.serverName"))?;
        let dial = service_fn(move |_: Uri| {
            let (connector, host, name) = (connector.clone(), Arc::clone(&host), name.clone());
            async move { dial(connector, &host, port, name).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_shared(ca.address.to_string()).map_err(|e| e.to_string())?;
        let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT).timeout(ANSWER_TIMEOUT);
        Ok(Self {
            channel: endpoint.connect_with_connector_lazy(dial),
            roots: pem.into(),
            id: IDS.fetch_add(1, Relaxed),
        })
    }
}

fn config(roots: Vec<CertificateDer<'static>>) -> Result<ClientConfig, String> {
    let mut store = RootCertStore::empty();
    for (i, root) in roots.into_iter().enumerate() {
        store.add(root).map_err(|e| format!("certificate {} in it is no usable root: {e}; replace it", i + 1))?;
    }
    if store.is_empty() {
        return Err("no PEM block CERTIFICATE in it; write the authority's root as PEM".into());
    }
    let mut config = ClientConfig::builder_with_provider(aws_lc_rs::default_provider().into())
        .with_protocol_versions(&[&TLS13])
        .map_err(|e| e.to_string())?
        .with_root_certificates(store)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

async fn dial(
    connector: TlsConnector,
    host: &str,
    port: u16,
    name: ServerName<'static>,
) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect((host, port)).await?;
    let (idle, interval, probes) = KEEPALIVE;
    let socket = SockRef::from(&stream);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(probes))?;
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    stream.set_nodelay(true)?;
    connector.connect(name, stream).await
}
