//! Every live connection, with what policy, telemetry and the CLI need of it.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use crate::{
    mesh::{SpiffeId, WorkloadKey},
    telemetry::RefusalReason,
};

/// Number of a connection, unique while the agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ConnectionId(pub u64);

/// Which way the connection goes, seen from the pod on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// The pod dialled.
    Outbound,
    /// The pod was dialled.
    Inbound,
}

/// Who moves and protects the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataPath {
    /// rustls' record protection in the agent.
    User,
    /// Kernel TLS.
    Ktls,
    /// Plain TCP to a destination outside the mesh.
    Plain,
}

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CloseReason {
    /// Both sides finished, authenticated.
    Finished,
    /// The application reset its connection.
    ApplicationReset,
    /// The tunnel or upstream was reset or timed out.
    UpstreamReset,
    /// FIN without `close_notify`.
    Truncated,
    /// The peer sent a fatal alert.
    Denied,
    /// A record failed authentication or was malformed.
    BadRecord,
    /// The application closed while data for it was still coming.
    ApplicationGone,
    /// A policy, certificate or mode change forbids it.
    Policy,
    /// The pod left the mesh.
    Unenrolled,
    /// An operator asked.
    Operator,
    /// The agent is shutting down.
    Shutdown,
}

/// What a new table entry is made from.
#[derive(Clone, Debug)]
pub struct NewConnection {
    /// The pod on this node.
    pub workload: WorkloadKey,
    /// Number of the pod, [`underpass_abi::PodConfig::pod_id`].
    pub pod_id: u32,
    /// Which way.
    pub direction: Direction,
    /// Identity of the client.
    pub source_identity: Option<SpiffeId>,
    /// Identity of the server.
    pub destination_identity: Option<SpiffeId>,
    /// The client's address as the server's application sees it.
    pub source: SocketAddr,
    /// The destination as the application dialled it.
    pub original_destination: SocketAddr,
    /// Where the bytes really go: the peer's tunnel address, or the application's.
    pub upstream: SocketAddr,
    /// Host name of the service, when a VIP was dialled.
    pub service: Option<Arc<str>>,
    /// Data path at the start.
    pub data_path: DataPath,
    /// Cipher suite, e.g. `TLS13_AES_256_GCM_SHA384`.
    pub cipher: Option<&'static str>,
    /// Whether the handshake resumed a session.
    pub resumed: bool,
}

/// A live connection. Counters are written by its relay thread only.
#[derive(Debug)]
pub struct Connection {
    /// Its number.
    pub id: ConnectionId,
    /// When it was added.
    pub since: SystemTime,
    /// What it is.
    pub what: NewConnection,
    /// Application bytes sent towards the upstream.
    pub sent: AtomicU64,
    /// Application bytes received from the upstream.
    pub received: AtomicU64,
}

/// A connection as the CLI shows it; owned and serialisable.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConnectionInfo {
    /// Its number.
    pub id: ConnectionId,
    /// Seconds since it was added.
    pub age_s: f64,
    /// Which way.
    pub direction: Direction,
    /// The pod on this node, `namespace/name`.
    pub workload: String,
    /// SPIFFE ID of the client.
    pub source_identity: Option<String>,
    /// SPIFFE ID of the server.
    pub destination_identity: Option<String>,
    /// Client address.
    pub source: SocketAddr,
    /// Destination as dialled.
    pub original_destination: SocketAddr,
    /// Where the bytes go.
    pub upstream: SocketAddr,
    /// Service host name.
    pub service: Option<String>,
    /// Data path.
    pub data_path: DataPath,
    /// Cipher suite.
    pub cipher: Option<String>,
    /// Resumed session.
    pub resumed: bool,
    /// Application bytes towards the upstream.
    pub sent: u64,
    /// Application bytes from the upstream.
    pub received: u64,
}

/// All live connections. Thread-safe; never locked on the byte path.
pub struct ConnectionTable {}

impl ConnectionTable {
    /// An empty table.
    pub fn new() -> Arc<Self> {
        todo!()
    }

    /// Adds a connection. It stays until its relay thread removes it.
    pub fn add(&self, new: NewConnection) -> Arc<Connection> {
        let _ = new;
        todo!()
    }

    /// Asks the owner to reset the connection. `false` when there is none with this id.
    pub fn close(&self, id: ConnectionId, reason: CloseReason) -> bool {
        let _ = (id, reason);
        todo!()
    }

    /// Asks for every connection that `which` selects to be reset; returns how many.
    pub fn close_where(&self, reason: CloseReason, which: impl Fn(&Connection) -> bool) -> usize {
        let _ = (reason, which);
        todo!()
    }

    /// Live connections, at most `limit`, oldest first, and how many there are in all.
    pub fn list(&self, limit: usize) -> (Vec<ConnectionInfo>, usize) {
        let _ = (limit, Relaxed, RefusalReason::ALL);
        todo!()
    }

    /// Number of live connections.
    pub fn len(&self) -> usize {
        todo!()
    }
}
