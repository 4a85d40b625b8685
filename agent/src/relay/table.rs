//! Every live connection, with what policy, telemetry and the CLI need of it.

use std::{
    cmp::Reverse,
    collections::HashMap,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use super::{
    inbox::{Inbox, Message},
    totals::{Taken, Totals},
};
use crate::{
    identity::revocation::Chain,
    mesh::{SpiffeId, WorkloadKey},
    telemetry::{Account, KtlsFallback},
};

/// Number of a connection, unique while the agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ConnectionId(pub u64);

/// Which way the connection goes, seen from the pod on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// The pod dialled.
    Outbound,
    /// The pod was dialled.
    Inbound,
}

/// Who moves and protects the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DataPath {
    /// rustls' record protection in the agent.
    User,
    /// Kernel TLS.
    Ktls,
    /// Plain TCP to a destination outside the mesh.
    Plain,
}

impl DataPath {
    /// All of them, in order.
    pub const ALL: [Self; 3] = [Self::User, Self::Ktls, Self::Plain];

    /// The name in logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Ktls => "ktls",
            Self::Plain => "plain",
        }
    }

    /// Of a tunnel that the kernel protects, unless there is a reason why not.
    pub fn of(fallback: Option<KtlsFallback>) -> Self {
        if fallback.is_some() { Self::User } else { Self::Ktls }
    }
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
    /// A key has protected as many records as it may, and cannot be replaced.
    KeyLimit,
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
    /// The agent could not go on: out of a resource, or a defect of its own.
    Internal,
}

impl CloseReason {
    /// All of them, in order.
    pub const ALL: [Self; 13] = [
        Self::Finished,
        Self::ApplicationReset,
        Self::UpstreamReset,
        Self::Truncated,
        Self::Denied,
        Self::BadRecord,
        Self::KeyLimit,
        Self::ApplicationGone,
        Self::Policy,
        Self::Unenrolled,
        Self::Operator,
        Self::Shutdown,
        Self::Internal,
    ];

    /// The name in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::ApplicationReset => "application-reset",
            Self::UpstreamReset => "upstream-reset",
            Self::Truncated => "truncated",
            Self::Denied => "denied",
            Self::BadRecord => "bad-record",
            Self::KeyLimit => "key-limit",
            Self::ApplicationGone => "application-gone",
            Self::Policy => "policy",
            Self::Unenrolled => "unenrolled",
            Self::Operator => "operator",
            Self::Shutdown => "shutdown",
            Self::Internal => "internal",
        }
    }
}

/// Which connections are listed first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ConnectionOrder {
    /// The oldest.
    #[default]
    Oldest,
    /// The newest.
    Newest,
    /// Those with most bytes towards the upstream.
    Sent,
    /// Those with most bytes from the upstream.
    Received,
    /// Those with most bytes in both directions together.
    Bytes,
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
    /// Certificates of the tunnel's other end.
    pub peer: Option<Arc<Chain>>,
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
    /// Why the data path is [`DataPath::User`].
    pub fallback: Option<KtlsFallback>,
    /// Cipher suite, e.g. `TLS13_AES_256_GCM_SHA384`.
    pub cipher: Option<&'static str>,
    /// Whether the handshake resumed a session.
    pub resumed: bool,
}

/// A live connection. Counters are written by its relay thread only. Dropping the last reference takes it off the table.
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
    /// Bytes the agent holds because a side does not take them, both directions together.
    pub held: AtomicU64,
    /// Whether it was reset before the application's kernel had taken everything: the reset may have been lost behind it.
    pub cut_short: AtomicBool,
    /// What it is counted and logged under, if it is.
    pub account: Option<Account>,
    pub(super) taken: Taken,
    control: Mutex<Control>,
    table: Weak<ConnectionTable>,
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
    /// Why it is [`DataPath::User`].
    #[serde(default)]
    pub fallback: Option<KtlsFallback>,
    /// Cipher suite.
    pub cipher: Option<String>,
    /// Resumed session.
    pub resumed: bool,
    /// Application bytes towards the upstream.
    pub sent: u64,
    /// Application bytes from the upstream.
    pub received: u64,
}

/// What the outside wants of a connection, and who has to hear of it.
#[derive(Default)]
struct Control {
    /// Why it is to end or has ended; the first reason counts.
    reason: Option<CloseReason>,
    /// The relay thread that has it, once submitted.
    owner: Option<Arc<Inbox>>,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").field("reason", &self.reason).field("submitted", &self.owner.is_some()).finish()
    }
}

impl Connection {
    /// Names the thread that has to hear of a request to close. From now on every request reaches either the thread or, made before,
    /// [`Self::close_reason`].
    pub(super) fn owned_by(&self, owner: Arc<Inbox>) {
        self.control().owner = Some(owner);
    }

    /// Why it has ended or is about to, if so.
    pub fn close_reason(&self) -> Option<CloseReason> {
        self.control().reason
    }

    /// Ends it for `reason`, unless somebody asked before for another one; which one it is.
    pub(super) fn settle(&self, reason: CloseReason) -> CloseReason {
        *self.control().reason.get_or_insert(reason)
    }

    /// Asks for a reset. Later requests change nothing.
    fn request(&self, reason: CloseReason) {
        let owner = {
            let mut control = self.control();
            if control.reason.is_some() {
                return;
            }
            control.reason = Some(reason);
            control.owner.clone()
        };
        if let Some(owner) = owner {
            // A thread that takes no more messages is ending all its connections.
            let _ = owner.send(Message::Close(self.id));
        }
    }

    /// Application bytes in both directions.
    fn bytes(&self) -> u64 {
        self.sent.load(Relaxed).saturating_add(self.received.load(Relaxed))
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn info(&self) -> ConnectionInfo {
        let what = &self.what;
        ConnectionInfo {
            id: self.id,
            age_s: self.since.elapsed().unwrap_or_default().as_secs_f64(),
            direction: what.direction,
            workload: what.workload.to_string(),
            source_identity: what.source_identity.as_ref().map(ToString::to_string),
            destination_identity: what.destination_identity.as_ref().map(ToString::to_string),
            source: what.source,
            original_destination: what.original_destination,
            upstream: what.upstream,
            service: what.service.as_deref().map(str::to_owned),
            data_path: what.data_path,
            fallback: what.fallback,
            cipher: what.cipher.map(str::to_owned),
            resumed: what.resumed,
            sent: self.sent.load(Relaxed),
            received: self.received.load(Relaxed),
        }
    }
}

impl Drop for Connection {
    /// A connection that never reached a relay thread (its dial failed, its task was cancelled) leaves the table too.
    fn drop(&mut self) {
        if let Some(table) = self.table.upgrade() {
            table.remove(self.id);
        }
    }
}

/// Parts of the table with a lock each.
const SHARDS: usize = 64;

type Shard = Mutex<HashMap<ConnectionId, Weak<Connection>>>;

/// All live connections. Thread-safe; never locked on the byte path.
pub struct ConnectionTable {
    shards: [Shard; SHARDS],
    next: AtomicU64,
    totals: Totals,
}

impl ConnectionTable {
    /// An empty table.
    pub fn new() -> Arc<Self> {
        let shards = std::array::from_fn(|_| Shard::default());
        Arc::new(Self { shards, next: AtomicU64::new(1), totals: Totals::default() })
    }

    /// Adds a connection. It stays until its relay thread removes it, or until it is dropped without having reached one.
    pub fn add(self: &Arc<Self>, new: NewConnection) -> Arc<Connection> {
        self.add_accounted(new, None)
    }

    /// The same with a place in the metrics and the access log.
    pub fn add_accounted(self: &Arc<Self>, new: NewConnection, account: Option<Account>) -> Arc<Connection> {
        let id = ConnectionId(self.next.fetch_add(1, Relaxed));
        let connection = Arc::new(Connection {
            id,
            since: SystemTime::now(),
            what: new,
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            held: AtomicU64::new(0),
            cut_short: AtomicBool::new(false),
            account,
            taken: Taken::default(),
            control: Mutex::default(),
            table: Arc::downgrade(self),
        });
        self.shard(id).insert(id, Arc::downgrade(&connection));
        connection
    }

    /// Asks the owner to reset the connection. `false` when there is none with this id. The first reason counts; before
    /// submission it takes effect at submission.
    pub fn close(&self, id: ConnectionId, reason: CloseReason) -> bool {
        let connection = self.shard(id).get(&id).and_then(Weak::upgrade);
        connection.is_some_and(|connection| {
            connection.request(reason);
            true
        })
    }

    /// Asks for every connection that `which` selects to be reset; returns how many.
    pub fn close_where(&self, reason: CloseReason, which: impl Fn(&Connection) -> bool) -> usize {
        self.live().iter().filter(|connection| which(connection)).map(|connection| connection.request(reason)).count()
    }

    /// Live connections, at most `limit`, oldest first, and how many there are in all.
    pub fn list(&self, limit: usize) -> (Vec<ConnectionInfo>, usize) {
        self.list_where(limit, ConnectionOrder::Oldest, |_| true)
    }

    /// Those of the live connections that `which` selects, at most `limit`, and how many it selects.
    pub fn list_where(
        &self,
        limit: usize,
        order: ConnectionOrder,
        which: impl Fn(&Connection) -> bool,
    ) -> (Vec<ConnectionInfo>, usize) {
        let mut live = self.live();
        live.retain(|connection| which(connection));
        // Numbers are given in order of arrival. Byte counters move while this sorts, so they are read once.
        match order {
            ConnectionOrder::Oldest => live.sort_unstable_by_key(|c| c.id),
            ConnectionOrder::Newest => live.sort_unstable_by_key(|c| Reverse(c.id)),
            ConnectionOrder::Sent => live.sort_by_cached_key(|c| (Reverse(c.sent.load(Relaxed)), c.id)),
            ConnectionOrder::Received => live.sort_by_cached_key(|c| (Reverse(c.received.load(Relaxed)), c.id)),
            ConnectionOrder::Bytes => live.sort_by_cached_key(|c| (Reverse(c.bytes()), c.id)),
        }
        (live.iter().take(limit).map(|connection| connection.info()).collect(), live.len())
    }

    /// Live connections, at most `limit`, oldest first.
    pub fn oldest(&self, limit: usize) -> Vec<Arc<Connection>> {
        let mut live = self.by_age();
        live.truncate(limit);
        live
    }

    fn by_age(&self) -> Vec<Arc<Connection>> {
        let mut live = self.live();
        // Numbers are given in order of arrival.
        live.sort_unstable_by_key(|connection| connection.id);
        live
    }

    /// Connections opened and closed so far, a number that only grows.
    pub fn events(&self) -> u64 {
        let live = self.len() as u64;
        let opened = self.next.load(Relaxed) - 1;
        opened + opened.saturating_sub(live)
    }

    /// Number of live connections.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner).len()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every live connection, with its bytes in [`Self::totals`] and in its account. For who reads the metrics.
    pub fn settled(&self) -> Vec<Arc<Connection>> {
        let live = self.live();
        for connection in &live {
            self.totals.take(connection);
        }
        live
    }

    /// Sums over all connections there ever were.
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Takes a connection out: it has ended.
    pub(super) fn remove(&self, id: ConnectionId) {
        self.shard(id).remove(&id);
    }

    /// Holds every live connection, so that the last reference to one is never dropped, which locks its shard, under a lock.
    fn live(&self) -> Vec<Arc<Connection>> {
        let mut live = Vec::new();
        for shard in &self.shards {
            live.extend(shard.lock().unwrap_or_else(PoisonError::into_inner).values().filter_map(Weak::upgrade));
        }
        live
    }

    fn shard(&self, id: ConnectionId) -> MutexGuard<'_, HashMap<ConnectionId, Weak<Connection>>> {
        let shard = &self.shards[(id.0 % SHARDS as u64) as usize];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
