//! gRPC over TLS 1.3, with a certificate that the server signs itself.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use futures_util::stream;
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
    version::TLS13,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, Sleep, sleep, sleep_until, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::{Server, server::Connected};
use tracing::{debug, info, warn};

use super::{csr::MAX_CSR, metrics::Metrics, service::Service, signer::Current};
use crate::{
    bounds::{self, Bound, Entry, Evicted, GRACE, Pool, Rule, Voucher},
    identity::istio::wire::istio_certificate_service_server::IstioCertificateServiceServer,
};

/// Longest time for a TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Longest time from a connection's beginning until somebody on it has shown an agent's token.
const PROOF: Duration = Duration::from_mins(1);
/// Of the connections, those of one source that have shown none are at most one of so many while
/// others come.
const SOURCES: usize = 32;
/// Longest time for one request: two questions to the API server, each with its own limit.
const REQUEST: Duration = Duration::from_secs(20);
/// Requests at once on one connection: an agent has eight.
const STREAMS: u32 = 64;
/// Largest header list, bytes: a token and little else.
const HEADERS: u32 = 32 * 1024;
/// Largest request, bytes: a signing request and an identity.
const MESSAGE: usize = 2 * MAX_CSR;
/// A silent peer is pinged, and dropped when it does not answer.
const PING: (Duration, Duration) = (Duration::from_mins(1), Duration::from_secs(20));
/// Connections are closed when they get old, so that agents spread over replicas that were added.
const AGE: Duration = Duration::from_mins(30);
/// Pause after a failed `accept` (out of descriptors), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Lifetime of the serving certificate, at most.
pub(super) const SERVING: Duration = Duration::from_hours(24);
/// Longest sleep until the serving certificate is looked at again: the wall clock may be set.
const MAX_SLEEP: Duration = Duration::from_mins(1);
/// Shortest life of a serving certificate before it is replaced: of a signer that is about to end.
const LEAST: Duration = Duration::from_secs(1);
/// Pause after a serving certificate could not be made.
const RETRY: Duration = Duration::from_secs(5);

/// Who is at the other end.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    pub(super) address: SocketAddr,
    /// To be told when the peer has proved to be an agent.
    pub(super) place: Voucher<IpAddr>,
}

/// The certificate that is shown now.
#[derive(Default)]
pub(super) struct Serving(ArcSwapOption<CertifiedKey>);

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Serving")
    }
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load_full()
    }
}

impl Serving {
    /// Keeps a valid certificate for `names`: a new one when the signer changes and at half its life.
    pub(super) async fn keep(&self, names: &[String], lifetime: Duration, mut signer: watch::Receiver<Current>) {
        let mut renew = None;
        loop {
            let current = signer.borrow_and_update().clone();
            let now = SystemTime::now();
            if let Some(current) = current
                && renew.is_none_or(|at| at <= now)
            {
                renew = Some(match current.serving(names, lifetime, now) {
                    Ok((certified, not_after)) => {
                        self.0.store(Some(Arc::new(certified)));
                        let until = humantime::format_rfc3339_seconds(not_after);
                        info!(names = names.join(","), %until, "serving certificate");
                        now + (not_after.duration_since(now).unwrap_or_default() / 2).max(LEAST)
                    }
                    Err(reason) => {
                        warn!(%reason, retry = ?RETRY, "no new serving certificate; the old one stays");
                        now + RETRY
                    }
                });
            }
            let wait = renew.map_or(MAX_SLEEP, |at| at.duration_since(now).unwrap_or_default().min(MAX_SLEEP));
            match timeout(wait, signer.changed()).await {
                Ok(Ok(())) => renew = None,
                // Nobody signs any more: the process ends.
                Ok(Err(_)) => return,
                Err(_) => {}
            }
        }
    }
}

/// Serves until it is dropped.
pub(super) async fn serve(
    listener: TcpListener,
    serving: Arc<Serving>,
    service: Service,
    connections: usize,
) -> anyhow::Result<()> {
    let metrics = Arc::clone(&service.metrics);
    let acceptor = acceptor(serving)?;
    let (to, from) = mpsc::channel(16);
    let incoming = stream::unfold(from, async |mut from: mpsc::Receiver<Connection>| {
        let connection = from.recv().await?;
        Some((Ok::<_, Infallible>(connection), from))
    });
    let service = IstioCertificateServiceServer::new(service).max_decoding_message_size(MESSAGE);
    let server = Server::builder()
        .timeout(REQUEST)
        .max_concurrent_streams(STREAMS)
        .http2_max_header_list_size(HEADERS)
        .http2_keepalive_interval(Some(PING.0))
        .http2_keepalive_timeout(Some(PING.1))
        .http2_max_pending_accept_reset_streams(Some(STREAMS as usize))
        .max_connection_age(AGE)
        .add_service(service)
        // A signal that never comes: with one, connections end when the server is dropped.
        .serve_with_incoming_shutdown(incoming, std::future::pending());
    let accept = accept(listener, acceptor, connections, metrics, to);
    tokio::select! {
        served = server => Ok(served?),
        () = accept => Ok(()),
    }
}

fn acceptor(serving: Arc<Serving>) -> anyhow::Result<TlsAcceptor> {
    let mut config = ServerConfig::builder_with_provider(aws_lc_rs::default_provider().into())
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(serving);
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would outlive the certificate that it began with.
    config.send_tls13_tickets = 0;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    connections: usize,
    metrics: Arc<Metrics>,
    to: mpsc::Sender<Connection>,
) {
    let share = (connections / SOURCES).max(1);
    let places = Pool::new(Rule { total: connections, share, strict: false, grace: GRACE, bound: Bound::Authority });
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.try_join_next().is_some() {}
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(reason) => {
                warn!(%reason, "accepting a connection");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        metrics.connections.inc();
        let mut entry = places.enter(&bounds::source(peer.ip())).await;
        let (acceptor, to, metrics) = (acceptor.clone(), to.clone(), Arc::clone(&metrics));
        handshakes.spawn(async move {
            let _ = stream.set_nodelay(true);
            let proof = Instant::now() + PROOF;
            let failed: &dyn std::fmt::Display =
                match entry.guard(pin!(timeout(HANDSHAKE, acceptor.accept(stream)))).await {
                    Ok(Ok(Ok(stream))) => {
                        entry.voucher().progress();
                        // The other end is gone only when the server is.
                        let _ = to.send(Connection { stream, peer, entry, proof: Box::pin(sleep_until(proof)) }).await;
                        return;
                    }
                    Ok(Ok(Err(reason))) => &reason.to_string(),
                    Ok(Err(_)) => &"too slow",
                    Err(Evicted) => &Evicted,
                };
            metrics.failed_handshakes.inc();
            debug!(%peer, reason = %failed, "TLS handshake");
        });
    }
}

/// A connection, with its place among those that there may be.
struct Connection {
    stream: TlsStream<TcpStream>,
    peer: SocketAddr,
    entry: Entry<IpAddr>,
    /// When it ends, unless an agent has been seen on it.
    proof: Pin<Box<Sleep>>,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        Peer { address: self.peer, place: self.entry.voucher() }
    }
}

impl Connection {
    fn evicted(&self) -> io::Result<()> {
        if self.entry.is_evicted() { Err(io::Error::new(io::ErrorKind::ConnectionAborted, Evicted)) } else { Ok(()) }
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { stream, entry, proof, .. } = &mut *self;
        if !entry.is_authenticated() && proof.as_mut().poll(cx).is_ready() {
            let reason = "no agent has shown its token on this connection in time";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, reason)));
        }
        match entry.poll(cx, |cx| Pin::new(stream).poll_read(cx, to)) {
            Poll::Ready(Ok(read)) => Poll::Ready(read),
            Poll::Ready(Err(evicted)) => Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, evicted))),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        self.evicted()?;
        Pin::new(&mut self.stream).poll_write(cx, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.evicted()?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
