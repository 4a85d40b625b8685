//! Moves bytes between an application and its upstream, after the handshake, on dedicated threads.
//!
//! One thread per core, epoll, no async runtime, no lock on the byte path. Buffers belong to the thread; a
//! connection holds bytes only while a peer does not take them.

mod engine;
mod table;

pub use engine::{Job, Relay, RelayOptions, Upstream};
pub use table::{
    CloseReason, Connection, ConnectionId, ConnectionInfo, ConnectionTable, DataPath, Direction, NewConnection,
};
