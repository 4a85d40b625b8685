//! The ways bytes can go. Each direction is a small state machine that one step takes as far as its sockets allow:
//! flush what is held back, else read once and pass it on.

mod ktls_in;
mod ktls_out;
mod plain;
mod tls_in;
mod tls_out;

use std::io;

use rustls::AlertDescription;

pub(super) use ktls_in::KtlsIn;
pub(super) use ktls_out::KtlsOut;
pub(super) use plain::Plain;
pub(super) use tls_in::TlsIn;
pub(super) use tls_out::TlsOut;

use crate::tunnel::{ktls::Broken, records::RecordError};

/// How far a direction is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// Reading and writing.
    #[default]
    Open,
    /// The end was read; what is held back goes out, then the end is passed on.
    Ending,
    /// The end was passed on.
    Done,
}

/// What a step achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// This many application bytes came in, and perhaps there is more to do.
    Moved(usize),
    /// Nothing to do until one of the sockets reports an event.
    Blocked,
    /// Nothing to do until one of the sockets reports an event, or, since the last of it causes none, until somebody looks again.
    Settling,
    /// The direction has ended cleanly.
    Done,
}

/// Why a direction cannot go on; both sockets are then reset.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// The socket it reads from failed.
    #[error("reading: {0}")]
    Read(#[source] io::Error),
    /// The socket it writes to failed.
    #[error("writing: {0}")]
    Write(#[source] io::Error),
    /// FIN without `close_notify`.
    #[error("the peer's TCP stream ended without close_notify")]
    Truncated,
    /// A fatal alert.
    #[error("the peer sent the alert {0:?}")]
    Alert(AlertDescription),
    /// A record that cannot be opened or sealed.
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl Fault {
    /// What broke a connection of the kernel's, met while reading or while writing.
    fn kernel(broken: Broken, socket: fn(io::Error) -> Self) -> Self {
        match broken {
            Broken::Record(error) => Self::Record(error),
            Broken::Socket(error) => socket(error),
        }
    }
}
