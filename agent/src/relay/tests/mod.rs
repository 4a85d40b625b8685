//! Relays between loopback sockets, with keys from real handshakes. The ends of a connection play the applications.

mod bulk;
mod control;
mod endings;
mod handover;
mod load;
mod measure;
mod session;
mod stall;

use std::{
    io::{ErrorKind, IoSlice, Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc, LazyLock,
        mpsc::{self, RecvTimeoutError},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};
use socket2::SockRef;

use super::{
    CloseReason, Connection, ConnectionTable, DataPath, Direction, NewConnection, Relay, RelayOptions,
    direction::{KtlsIn, KtlsOut, Plain, TlsIn, TlsOut},
    slot::{Path, Slot},
};
use crate::{
    mesh::WorkloadKey,
    telemetry::Counters,
    tunnel::{
        Suite,
        ktls::{Availability, Support},
        records::Records,
        testing::{self, Keys},
    },
};

/// Longer than anything takes on a busy machine; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_mins(2);

/// A seed, printed so that a failure can be repeated with `UNDERPASS_TEST_SEED`.
fn seed() -> u64 {
    let seed = std::env::var("UNDERPASS_TEST_SEED").map_or_else(|_| rand::random(), |s| s.parse().expect("a number"));
    eprintln!("UNDERPASS_TEST_SEED={seed}");
    seed
}

/// What the kernel can do, when `UNDERPASS_TEST_KTLS` says that it is to protect the relayed tunnels' records. Whoever sets it means it:
/// without kernel TLS the tests fail.
fn ktls() -> Option<&'static Support> {
    static SUPPORT: LazyLock<Option<Support>> = LazyLock::new(|| {
        std::env::var_os("UNDERPASS_TEST_KTLS")?;
        let support = Support::probe();
        assert_eq!(support.availability, Availability::Ready, "UNDERPASS_TEST_KTLS is set");
        Some(support)
    });
    SUPPORT.as_ref()
}

/// Whether the kernel protects records under keys that stay the same for ever.
fn cannot_replace_keys() -> bool {
    ktls().is_some_and(|support| !support.rekey)
}

/// As many of `bytes` as make sense on a slow machine.
fn scaled(bytes: usize) -> usize {
    testbed::pace::scaled(bytes as u64) as usize
}

/// Both ends' keys, client first.
fn pair() -> (Keys, Keys) {
    testing::keys(Suite::Aes128Gcm)
}

/// A relay with its table and counters.
struct Node {
    relay: Arc<Relay>,
    table: Arc<ConnectionTable>,
    counters: Arc<Counters>,
}

impl Node {
    fn new() -> Self {
        Self::with(&RelayOptions { threads: 1, ..RelayOptions::default() })
    }

    fn with(options: &RelayOptions) -> Self {
        Self::with_interval(options, super::stall::INTERVAL)
    }

    fn with_interval(options: &RelayOptions, interval: Duration) -> Self {
        let (table, counters) = (ConnectionTable::new(), Arc::new(Counters::default()));
        let relay = Relay::start_with(options, Arc::clone(&table), Arc::clone(&counters), interval).expect("a relay");
        Self { relay, table, counters }
    }

    fn add(&self, direction: Direction, data_path: DataPath) -> Arc<Connection> {
        let address = "127.0.0.1:1".parse().expect("an address");
        self.table.add(NewConnection {
            workload: WorkloadKey { namespace: "default".into(), name: "test".into() },
            pod_id: 1,
            direction,
            source_identity: Some(testing::identity("client")),
            destination_identity: Some(testing::identity("server")),
            peer: None,
            source: address,
            original_destination: address,
            upstream: address,
            service: None,
            data_path,
            fallback: None,
            cipher: None,
            resumed: false,
        })
    }

    /// Gives a connection to the relay; what is returned says how it fares.
    fn place(&self, connection: Arc<Connection>, application: TcpStream, upstream: TcpStream, path: Path) -> Watched {
        application.set_nonblocking(true).expect("non-blocking");
        upstream.set_nonblocking(true).expect("non-blocking");
        SockRef::from(&application).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
        // As the proxy's listeners and pools make them.
        for socket in [&application, &upstream] {
            let socket = SockRef::from(socket);
            socket.set_tcp_nodelay(true).expect("TCP_NODELAY");
            socket.set_out_of_band_inline(true).expect("SO_OOBINLINE");
        }
        let (guard, end) = mpsc::channel::<()>();
        let slot = Slot::new(
            OwnedFd::from(application),
            OwnedFd::from(upstream),
            path,
            Arc::clone(&connection),
            Box::new(guard),
        );
        self.relay.place(Box::new(slot));
        Watched { connection, end }
    }

    /// A relayed tunnel; what is returned is the application's socket.
    fn tunnel(&self, direction: Direction, tunnel: TcpStream, keys: Keys) -> (TcpStream, Watched) {
        let Some(support) = ktls() else {
            return self.user_tunnel(direction, tunnel, keys.records(), Vec::new(), Vec::new());
        };
        self.ktls_tunnel(direction, tunnel, keys, support)
    }

    /// One whose records the kernel protects.
    fn ktls_tunnel(
        &self,
        direction: Direction,
        tunnel: TcpStream,
        keys: Keys,
        support: &Support,
    ) -> (TcpStream, Watched) {
        let (application, inner) = sockets();
        let connection = self.add(direction, DataPath::Ktls);
        let tls = Box::new(keys.kernel(tunnel.as_fd(), support));
        let path = Path::Ktls { tls, outward: KtlsOut::default(), inward: KtlsIn::new(Vec::new(), false) };
        (application, self.place(connection, inner, tunnel, path))
    }

    /// One whose records the agent protects in any case, with bytes that came before.
    fn user_tunnel(
        &self,
        direction: Direction,
        tunnel: TcpStream,
        records: Records,
        unread: Vec<u8>,
        plaintext: Vec<u8>,
    ) -> (TcpStream, Watched) {
        let (application, inner) = sockets();
        let connection = self.add(direction, DataPath::User);
        let path =
            Path::Tls { records: Box::new(records), outward: TlsOut::default(), inward: TlsIn::new(unread, plaintext) };
        (application, self.place(connection, inner, tunnel, path))
    }
}

/// A connection in a relay.
struct Watched {
    connection: Arc<Connection>,
    end: mpsc::Receiver<()>,
}

impl Watched {
    /// Waits for the end and says why.
    fn ended(&self) -> CloseReason {
        assert_eq!(self.end.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected), "the connection did not end");
        self.connection.close_reason().expect("an ended connection has a reason")
    }
}

/// Two applications and what is between them.
struct Ends {
    client: TcpStream,
    server: TcpStream,
    /// The relays' sides, the client's first. A plain pass-through has one.
    relayed: Vec<Watched>,
}

impl Ends {
    fn reasons(&self) -> Vec<CloseReason> {
        self.relayed.iter().map(Watched::ended).collect()
    }
}

/// A connection through two relays and a tunnel.
fn tunnelled(near: &Node, far: &Node) -> Ends {
    let (a, b) = sockets();
    through(near, far, a, b)
}

fn through(near: &Node, far: &Node, a: TcpStream, b: TcpStream) -> Ends {
    let (ours, theirs) = pair();
    let (client, one) = near.tunnel(Direction::Outbound, a, ours);
    let (server, two) = far.tunnel(Direction::Inbound, b, theirs);
    Ends { client, server, relayed: vec![one, two] }
}

/// A connection through one relay, in plaintext.
fn plain(node: &Node) -> Ends {
    let (client, inner) = sockets();
    let (outer, server) = sockets();
    let path = Path::Plain { outward: Plain::default(), inward: Plain::default() };
    let watched = node.place(node.add(Direction::Outbound, DataPath::Plain), inner, outer, path);
    Ends { client, server, relayed: vec![watched] }
}

/// Both ends of a TCP connection over loopback. Spread over 127.0.0.0/8: with thousands of connections the kernel would search
/// long for free ports of one address.
fn sockets() -> (TcpStream, TcpStream) {
    let address = Ipv4Addr::from(rand::random_range(0x7f00_0001_u32..0x7fff_fffe));
    let listener = TcpListener::bind((address, 0)).expect("a listener");
    let a = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
    // Only ours: another test may have hit a port that it remembered.
    let b = loop {
        let (b, peer) = listener.accept().expect("its other end");
        if peer == a.local_addr().expect("its address") {
            break b;
        }
    };
    for socket in [&a, &b] {
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        socket.set_write_timeout(Some(PATIENCE)).expect("a timeout");
    }
    (a, b)
}

/// Sends `total` pseudo-random bytes in pieces of `1..=piece`, then ends the direction if `end`.
fn send(to: &TcpStream, seed: u64, total: usize, piece: usize, end: bool) -> JoinHandle<()> {
    let mut to = to.try_clone().expect("a descriptor");
    thread::spawn(move || {
        let (mut data, mut sizes) = (StdRng::seed_from_u64(seed), StdRng::seed_from_u64(!seed));
        let mut left = total;
        let mut buffer = vec![0; piece];
        while left > 0 {
            // Whole words: the generator hands out no halves.
            let length = sizes.random_range(1..=piece).min(left);
            let words = length.next_multiple_of(8).min(left).min(piece);
            data.fill_bytes(&mut buffer[..words]);
            to.write_all(&buffer[..words]).expect("sending");
            left -= words;
        }
        if end {
            to.shutdown(Shutdown::Write).expect("ending");
        }
    })
}

/// The bytes that [`send`] sends with a `piece` that is a multiple of 8.
fn expected(seed: u64, total: usize) -> Vec<u8> {
    let mut bytes = vec![0; total];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// Reads `total` bytes in random pieces and compares; then expects the end if `end`.
fn receive(from: &TcpStream, seed: u64, total: usize, piece: usize, end: bool) -> JoinHandle<()> {
    let mut from = from.try_clone().expect("a descriptor");
    thread::spawn(move || {
        let expected = expected(seed, total);
        let mut sizes = StdRng::seed_from_u64(seed ^ 0x5555);
        let mut buffer = vec![0; piece];
        let mut at = 0;
        while at < total {
            let length = sizes.random_range(1..=piece).min(total - at);
            let read = from.read(&mut buffer[..length]).expect("receiving");
            assert!(read > 0, "ended after {at} of {total} bytes, seed {seed}");
            assert!(buffer[..read] == expected[at..at + read], "wrong bytes behind {at} of {total}, seed {seed}");
            at += read;
        }
        if end {
            assert_eq!(from.read(&mut buffer).expect("the end"), 0, "bytes behind the last, seed {seed}");
        }
    })
}

/// Both ways at once until both ends are over.
fn exchange(ends: &Ends, seed: u64, total: usize, piece: usize) {
    let work = [
        send(&ends.client, seed, total, piece, true),
        send(&ends.server, seed + 1, total, piece, true),
        receive(&ends.server, seed, total, piece, true),
        receive(&ends.client, seed + 1, total, piece, true),
    ];
    for thread in work {
        thread.join().expect("a thread's assertions");
    }
}

/// Reads until the connection is over; what came, and how it ended.
fn read_all(mut from: &TcpStream) -> (Vec<u8>, Result<(), ErrorKind>) {
    let mut all = Vec::new();
    let result = from.read_to_end(&mut all).map(drop).map_err(|error| error.kind());
    (all, result)
}

fn assert_reset(from: &TcpStream) {
    assert_eq!(read_all(from).1, Err(ErrorKind::ConnectionReset));
}

/// Makes the closing of a socket a reset.
fn reset(socket: TcpStream) {
    SockRef::from(&socket).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
    drop(socket);
}

/// Waits for something that no event tells about.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "{what} did not come true");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Writes a batch of byte strings with one system call per piece.
fn write_all(mut to: &TcpStream, pieces: &[&[u8]]) {
    for piece in pieces {
        let written = to.write_vectored(&[IoSlice::new(piece)]).expect("writing");
        assert_eq!(written, piece.len(), "a small write is taken whole");
    }
}
