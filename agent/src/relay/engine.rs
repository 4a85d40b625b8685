//! The relay threads and how work reaches them.

use std::{io, os::fd::OwnedFd, sync::Arc};

use super::{Connection, ConnectionTable};
use crate::{telemetry::Counters, tunnel::Session};

/// The side that is not the application.
pub enum Upstream {
    /// An authenticated tunnel.
    Tunnel(Box<Session>),
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
    /// Largest read from a socket, bytes. Also the most a connection may hold back per direction.
    pub buffer: usize,
}

impl Default for RelayOptions {
    fn default() -> Self {
        Self { threads: 0, buffer: 256 * 1024 }
    }
}

/// Handle to the relay threads.
pub struct Relay {}

impl Relay {
    /// Starts the threads.
    pub fn start(
        options: &RelayOptions,
        table: Arc<ConnectionTable>,
        counters: Arc<Counters>,
    ) -> io::Result<Arc<Self>> {
        let _ = (options, table, counters);
        todo!()
    }

    /// Gives a connection to the least loaded thread.
    pub fn submit(&self, job: Job) {
        let _ = job;
        todo!()
    }
}
