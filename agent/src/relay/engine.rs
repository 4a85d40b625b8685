//! The relay threads and how work reaches them.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    CloseReason, Connection, ConnectionTable,
    direction::{KtlsIn, KtlsOut, Plain, TlsIn, TlsOut},
    health::{Beat, Seen, ThreadHealth},
    inbox::{Inbox, Message},
    slot::{End, Path, Slot},
    stall,
    thread::{Shared, Worker},
};
use crate::{
    telemetry::{Counters, RefusalReason},
    tunnel::{Protection, Tunnel, UserRecords},
};

/// The side that is not the application.
pub enum Upstream {
    /// An authenticated tunnel.
    Tunnel(Box<Tunnel>),
    /// Plain TCP to a destination outside the mesh.
    Plain(OwnedFd),
}

/// A connection handed to the relay: both sockets connected and non-blocking, nothing registered with any other reactor.
pub struct Job {
    /// The application's socket. Carries `SO_LINGER {1,0}`.
    pub application: OwnedFd,
    /// The other side.
    pub upstream: Upstream,
    /// Its entry in the table.
    pub connection: Arc<Connection>,
    /// Dropped when the connection ends: permits, references to the pod, whatever the proxy wants to live as long.
    pub guard: Box<dyn Send>,
}

/// Sizes of the relay.
#[derive(Clone, Debug)]
pub struct RelayOptions {
    /// Threads; 0 means one per core.
    pub threads: usize,
    /// Largest read from a socket, bytes. Also the most a connection may hold back per direction. Less than two
    /// TLS records (33 KiB) is taken as that.
    pub buffer: usize,
}

impl Default for RelayOptions {
    fn default() -> Self {
        Self { threads: 0, buffer: 128 * 1024 }
    }
}

/// One relay thread as the others see it.
struct Thread {
    inbox: Arc<Inbox>,
    /// Connections placed on it that have not ended.
    load: Arc<AtomicUsize>,
    beat: Arc<Beat>,
    seen: Mutex<Seen>,
}

/// Handle to the relay threads. Dropping it is [`Relay::shutdown`].
pub struct Relay {
    threads: Vec<Thread>,
    running: Mutex<Vec<JoinHandle<()>>>,
    shared: Arc<Shared>,
}

impl Relay {
    /// Starts the threads.
    pub fn start(
        options: &RelayOptions,
        table: Arc<ConnectionTable>,
        counters: Arc<Counters>,
    ) -> io::Result<Arc<Self>> {
        Self::start_with(options, table, counters, stall::INTERVAL)
    }

    pub(super) fn start_with(
        options: &RelayOptions,
        table: Arc<ConnectionTable>,
        counters: Arc<Counters>,
        stall_interval: Duration,
    ) -> io::Result<Arc<Self>> {
        let count = match options.threads {
            0 => thread::available_parallelism()?.get(),
            count => count,
        };
        let shared = Arc::new(Shared { table, counters, buffer: options.buffer, stall_interval });
        let mut relay = Self { threads: Vec::new(), running: Mutex::default(), shared };
        for number in 0..count {
            let inbox = Arc::new(Inbox::new()?);
            let load = Arc::new(AtomicUsize::new(0));
            let beat = Arc::new(Beat::default());
            let worker =
                Worker::new(Arc::clone(&inbox), Arc::clone(&load), Arc::clone(&beat), Arc::clone(&relay.shared))?;
            let handle = thread::Builder::new().name(format!("relay-{number}")).spawn(move || worker.run())?;
            relay.running.get_mut().unwrap_or_else(PoisonError::into_inner).push(handle);
            let seen = Mutex::new(Seen::new(Instant::now()));
            relay.threads.push(Thread { inbox, load, beat, seen });
        }
        Ok(Arc::new(relay))
    }

    /// Gives a connection to the least loaded thread.
    pub fn submit(&self, job: Job) {
        let Job { application, upstream, connection, guard } = job;
        let (upstream, path) = match upstream {
            Upstream::Plain(socket) => (socket, Path::Plain { outward: Plain::default(), inward: Plain::default() }),
            Upstream::Tunnel(tunnel) => match tunnel.into_parts() {
                Ok((socket, protection, plaintext)) => {
                    connection.received.store(plaintext.len() as u64, Relaxed);
                    (socket, path(protection, plaintext))
                }
                Err(error) => {
                    // The application's socket is a reset when closed; the tunnel's went with the session.
                    drop(application);
                    let detail = format!("taking the tunnel's socket from its reactor: {error}");
                    let mut end = End::internal(Some(RefusalReason::Resources), detail);
                    end.reason = connection.settle(end.reason);
                    self.shared.ended(&connection, &end);
                    return;
                }
            },
        };
        self.place(Box::new(Slot::new(application, upstream, path, connection, guard)));
    }

    /// Puts a connection on the thread that has the fewest.
    pub(super) fn place(&self, slot: Box<Slot>) {
        let mut threads: Vec<&Thread> = self.threads.iter().collect();
        threads.sort_by_key(|thread| thread.load.load(Relaxed));
        let mut message = Message::Adopt(slot);
        for thread in threads {
            if let Message::Adopt(slot) = &message {
                slot.connection.owned_by(Arc::clone(&thread.inbox));
            }
            thread.load.fetch_add(1, Relaxed);
            match thread.inbox.send(message) {
                Ok(()) => return,
                // That thread has stopped.
                Err(back) => message = back,
            }
            thread.load.fetch_sub(1, Relaxed);
        }
        if let Message::Adopt(slot) = message {
            self.shared.end(*slot, CloseReason::Shutdown.into());
        }
    }

    /// How the threads are. Only who looks regularly sees for how long one has been stuck.
    pub fn health(&self) -> Vec<ThreadHealth> {
        let now = Instant::now();
        let look = |thread: &Thread| {
            let mut seen = thread.seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.look(&thread.beat, thread.load.load(Relaxed), now)
        };
        self.threads.iter().map(look).collect()
    }

    /// Resets every connection and waits until the threads are gone. What is submitted afterwards is reset at once.
    pub fn shutdown(&self) {
        for thread in &self.threads {
            thread.inbox.stop();
        }
        let running = std::mem::take(&mut *self.running.lock().unwrap_or_else(PoisonError::into_inner));
        for handle in running {
            // A guard may hold the last reference to the relay, so this can run on one of its threads.
            if handle.thread().id() != thread::current().id() && handle.join().is_err() {
                tracing::error!("a relay thread had panicked");
            }
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// Where a tunnel's bytes go.
fn path(protection: Protection, plaintext: Vec<u8>) -> Path {
    match protection {
        Protection::User(user) => {
            let UserRecords { records, unread, .. } = *user;
            let inward = TlsIn::new(unread, plaintext);
            Path::Tls { records: Box::new(records), outward: TlsOut::default(), inward }
        }
        Protection::Kernel { tls, ended } => {
            Path::Ktls { tls, outward: KtlsOut::default(), inward: KtlsIn::new(plaintext, ended) }
        }
    }
}
