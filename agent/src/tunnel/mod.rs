//! The authenticated channel between two agents: TLS 1.3 with SPIFFE identities on port 15008, then what the ALPN says.
//!
//! [`TlsConfigs`] builds rustls configurations from certificates, [`handshake`] drives rustls' unbuffered API over a
//! socket, and what comes out is a [`Session`]: the socket, the traffic keys as [`records`], and whatever
//! was read past the handshake. From there on rustls only derives keys; records are protected in user space, or by the
//! kernel once the tunnel's own header has passed ([`Session::offload`]).

pub mod alert;
mod config;
mod driver;
pub mod handshake;
pub mod ktls;
pub mod native;
pub(crate) mod post_handshake;
pub mod records;
mod session;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod verify;

pub use config::{Suite, TlsConfigs, TlsOptions};
pub use session::{Protection, Session, SessionInfo, Tunnel, UserRecords};

use crate::telemetry::RefusalReason;

/// ALPN of the native tunnel.
pub const ALPN_NATIVE: &[u8] = b"underpass/1";

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The socket failed.
    #[error("{action}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The handshake failed; `reason` is how it is counted.
    #[error("{reason}: {detail}")]
    Refused {
        /// Class of the failure.
        reason: RefusalReason,
        /// For people.
        detail: String,
    },
}

impl TunnelError {
    /// How it is counted and logged.
    pub fn reason(&self) -> RefusalReason {
        match self {
            Self::Io { .. } => RefusalReason::TlsHandshake,
            Self::Refused { reason, .. } => *reason,
        }
    }
}
