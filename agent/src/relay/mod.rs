//! Moves bytes between an application and its upstream, after the handshake, on dedicated threads.
//!
//! One thread per core, epoll, no async runtime, no lock on the byte path. Buffers belong to the thread; a
//! connection holds bytes only while a peer does not take them.
//!
//! Read it from the outside in: `engine` starts the threads and places connections, `thread` waits for events and
//! gives turns, `slot` is one connection's turn and its end, `direction` has one small state machine for each way
//! bytes can go. A new data path is a new variant of `slot::Path` with its own directions.

mod access;
mod buffers;
mod direction;
mod engine;
mod health;
mod inbox;
mod pipe;
mod settling;
mod slot;
mod socket;
mod splicer;
mod stall;
mod table;
#[cfg(test)]
mod tests;
mod thread;
mod totals;

pub use engine::{Job, Relay, RelayOptions, Upstream};
pub use health::ThreadHealth;
pub use table::{
    CloseReason, Connection, ConnectionId, ConnectionInfo, ConnectionOrder, ConnectionTable, DataPath, Direction,
    NewConnection,
};
pub use totals::Totals;
