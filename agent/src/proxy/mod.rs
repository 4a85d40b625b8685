//! Ties capture, tunnel and relay together: accept loops per enrolled pod, and the decision what a connection becomes.
//!
//! `reconcile` turns mesh snapshots into enrolled pods, `outbound` and `inbound` carry one
//! connection each from `accept` to the relay, `route` is the pure decision between them, for which
//! `awaiting` waits until enough is known.

mod accept;
mod awaiting;
mod dial;
mod hold;
mod inbound;
mod observe;
mod outbound;
mod plaintext;
mod policy;
mod reconcile;
mod route;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use tokio::{net::TcpStream, runtime::Handle};
use tracing::debug;

pub use policy::Enforcement;
pub use reconcile::{Applied, PodState, PodStatus, Reconciler};

use crate::{
    bounds::{Bound, GRACE, Lanes, Place, Pool, Room, Rule},
    capture::{Capture, Pod, inheritance::Purpose},
    identity::CertificateStore,
    mesh::{MeshStore, SpiffeId},
    relay::{CloseReason, Connection, ConnectionTable, DataPath, Direction, Job, NewConnection, Relay, Upstream},
    telemetry::{Counters, RefusalReason, Telemetry, TraceId},
    tunnel::TlsConfigs,
};

/// Of the handshakes that a pod may have under way, a quarter is one source's share.
const SOURCES: usize = 4;
/// A handshake that the peer has not gone on with for this long yields to another one, when there
/// are too many: the peer may be busy.
const DIAL_GRACE: Duration = Duration::from_secs(2);
/// One holder may have this many times as many connections as there are free: see [`Room`].
const STEPS: usize = 256;

/// Bounds that keep one pod from starving another, and one peer or destination of a pod from
/// starving the others.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Longest TLS handshake, and longest wait for the PROXY header.
    pub handshake: Duration,
    /// Longest TCP connect to a peer or application.
    pub connect: Duration,
    /// TLS handshakes of one pod at once, for each direction.
    pub pending_per_pod: usize,
    /// Connections of one pod at once: as many outbound, as many tunnels, and as many in plaintext
    /// that a policy let in.
    pub connections_per_pod: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            connect: Duration::from_secs(10),
            pending_per_pod: 1024,
            connections_per_pod: 65_536,
        }
    }
}

/// What every connection needs; shared by all pods.
pub struct Proxy {
    /// Owner of the BPF maps.
    pub capture: Arc<Capture>,
    /// The mesh as it is now.
    pub mesh: Arc<MeshStore>,
    /// Certificates of local identities.
    pub certificates: Arc<CertificateStore>,
    /// TLS configurations made of them.
    pub tls: Arc<TlsConfigs>,
    /// Where established connections go.
    pub relay: Arc<Relay>,
    /// All live connections.
    pub table: Arc<ConnectionTable>,
    /// Who may reach this node's workloads.
    pub policies: Enforcement,
    /// What happened.
    pub counters: Arc<Counters>,
    /// The same by who was at the ends, and the access log.
    pub telemetry: Arc<Telemetry>,
    /// Whether the access log has lines where the configuration does not say so.
    pub access_log: bool,
    /// Bounds.
    pub limits: Limits,
}

/// A pod with its share of the limits.
struct PodContext {
    proxy: Arc<Proxy>,
    pod: Arc<Pod>,
    /// Peers that have not proved who they are, by address.
    handshakes: Arc<Pool<IpAddr>>,
    /// Handshakes with other pods, by their tunnel's address.
    dials: Arc<Pool<SocketAddr>>,
    /// Ways to upstreams.
    lanes: Arc<Lanes<SocketAddr>>,
    /// Connections of the pod's own.
    outbound: Arc<Room<Holder>>,
    /// Connections of authenticated peers.
    tunnels: Arc<Room<Holder>>,
    /// Connections of clients that a policy let in without authentication.
    plaintext: Arc<Room<Holder>>,
}

/// Who holds a pod's connections.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Holder {
    /// A client, or the destination of the pod's own.
    Address(IpAddr),
    /// A peer.
    Identity(SpiffeId),
}

impl PodContext {
    fn new(proxy: &Arc<Proxy>, pod: &Arc<Pod>) -> Arc<Self> {
        let Limits { pending_per_pod: total, connections_per_pod, .. } = proxy.limits;
        let share = (total / SOURCES).max(1);
        let room = || Room::new(connections_per_pod, STEPS, Bound::Connections);
        Arc::new(Self {
            proxy: Arc::clone(proxy),
            pod: Arc::clone(pod),
            handshakes: Pool::new(Rule { total, share, strict: false, grace: GRACE, bound: Bound::Tunnel }),
            dials: Pool::new(Rule { total, share, strict: false, grace: DIAL_GRACE, bound: Bound::Dial }),
            lanes: Lanes::new(share),
            outbound: room(),
            tunnels: room(),
            plaintext: room(),
        })
    }
}

/// What a connection holds on to until it ends, which is when its sockets are closed.
struct Held {
    pod: Arc<Pod>,
    _place: Place<Holder>,
    inbound: Option<ToApplication>,
}

/// A connection to an application of the pod's, which must learn of its end.
struct ToApplication {
    connection: Arc<Connection>,
    application: SocketAddr,
    /// As who the agent has connected.
    client: SocketAddr,
    runtime: Handle,
}

impl ToApplication {
    fn new(connection: &Arc<Connection>, socket: &std::net::TcpStream) -> io::Result<Self> {
        let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        Ok(Self {
            connection: Arc::clone(connection),
            application: canonical(socket.peer_addr()?),
            client: canonical(socket.local_addr()?),
            runtime: Handle::current(),
        })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(to) = self.inbound.take()
            && to.connection.cut_short.load(Relaxed)
        {
            let pod = Arc::clone(&self.pod);
            to.runtime.spawn(async move { pod.end_abandoned(to.application, to.client).await });
        }
    }
}

impl Proxy {
    /// Starts the accept loops of a newly enrolled pod. They end when the pod is un-enrolled; its live connections do not.
    pub fn attach(self: &Arc<Self>, pod: &Arc<Pod>) {
        let Some(listeners) = pod.take_listeners() else { return };
        let context = PodContext::new(self, pod);
        accept::run(&context, listeners.outbound, Purpose::Outbound);
        accept::run(&context, listeners.tunnel, Purpose::Tunnel);
        accept::run(&context, listeners.plaintext, Purpose::Plaintext);
    }
}

impl PodContext {
    /// Enters an established connection, on which `early` bytes of the application's have been
    /// sent, into the table, counts it, and gives it to the relay. `place` is held until it ends.
    fn hand_over(
        &self,
        application: TcpStream,
        upstream: Upstream,
        new: NewConnection,
        early: usize,
        trace: Option<TraceId>,
        place: Place<Holder>,
    ) {
        let Proxy { counters, table, relay, policies, .. } = &*self.proxy;
        let application = match application.into_std() {
            Ok(socket) => socket,
            Err(e) => {
                counters.refuse(RefusalReason::Resources);
                debug!(pod = %self.pod.key, error = %e, "leaving the reactor");
                return;
            }
        };
        let kind = match (new.data_path, new.direction) {
            (DataPath::Plain, Direction::Outbound) => &counters.passthrough,
            (DataPath::Plain, Direction::Inbound) => &counters.plaintext_in,
            (_, Direction::Outbound) => &counters.tunnels_out,
            (_, Direction::Inbound) => &counters.tunnels_in,
        };
        kind.fetch_add(1, Relaxed);
        if new.data_path != DataPath::Plain {
            counters.tunnel(new.fallback);
        }
        if new.resumed {
            counters.resumed.fetch_add(1, Relaxed);
        }
        let account = self.account(&new, trace);
        let connection = table.add_accounted(new, Some(account));
        connection.sent.store(early as u64, Relaxed);
        // It was on its way when the pod vanished.
        if self.pod.kept().is_some() {
            table.close(connection.id, CloseReason::Unenrolled);
        }
        // Policies and revocation lists that came into force since it was judged have not seen it in the table.
        if policies.forbids(&connection) || self.proxy.is_revoked(&connection) {
            table.close(connection.id, CloseReason::Policy);
        }
        let inbound = match connection.what.direction {
            // One that has been reset meanwhile has no addresses any more, and nobody waits for it.
            Direction::Inbound => ToApplication::new(&connection, &application).ok(),
            // The client's kernel answers for the address that it connected to.
            Direction::Outbound => None,
        };
        let guard = Box::new(Held { pod: Arc::clone(&self.pod), _place: place, inbound });
        relay.submit(Job { application: application.into(), upstream, connection, guard });
    }
}
