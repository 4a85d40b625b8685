//! An established tunnel before it goes to the relay.

use std::{os::fd::OwnedFd, time::Duration};

use rustls::AlertDescription;

use super::{TunnelError, records::Records};
use crate::mesh::SpiffeId;

/// What the handshake established.
#[derive(Debug, Clone)]
pub struct SessionInfo {
    /// Who we are.
    pub local: SpiffeId,
    /// Who the peer proved to be.
    pub peer: SpiffeId,
    /// Cipher suite, e.g. `TLS13_AES_256_GCM_SHA384`.
    pub cipher: &'static str,
    /// Key exchange group, e.g. `X25519MLKEM768`.
    pub key_exchange: &'static str,
    /// Whether a session was resumed.
    pub resumed: bool,
}

/// An authenticated tunnel: the socket (non-blocking, registered with no reactor any more once taken apart), its
/// record protection, and bytes that arrived behind the handshake.
pub struct Session {
    /// The tunnel's socket as tokio sees it until the relay takes over.
    pub stream: tokio::net::TcpStream,
    /// Record protection in both directions.
    pub records: Records,
    /// Ciphertext read but not yet opened; starts at a record boundary.
    pub unread: Vec<u8>,
    /// Plaintext opened but not yet consumed: application bytes that came with the PROXY header.
    pub plaintext: Vec<u8>,
    /// Who is at the ends.
    pub info: SessionInfo,
}

impl Session {
    /// Sends `data` as application data and waits until the kernel has it all.
    pub async fn send(&mut self, data: &[u8]) -> Result<(), TunnelError> {
        let _ = data;
        todo!()
    }

    /// Receives at least one byte of application data into `self.plaintext` (tickets and key updates are handled on the way), or
    /// returns 0 at an authenticated end. Never reads past `limit` bytes of plaintext in total.
    pub async fn receive(&mut self, limit: usize) -> Result<usize, TunnelError> {
        let _ = limit;
        todo!()
    }

    /// Refuses the peer: fatal alert, `shutdown(WR)`, then reads and discards at most 1 MiB or for 2 s so that unread data
    /// does not turn the alert into a bare reset, then closes.
    pub async fn refuse(self, alert: AlertDescription) {
        let _ = (alert, Duration::from_secs(2));
        todo!()
    }

    /// Takes it apart for the relay: the descriptor deregistered from tokio, still non-blocking.
    pub fn into_parts(self) -> std::io::Result<(OwnedFd, Records, Vec<u8>, Vec<u8>, SessionInfo)> {
        todo!()
    }
}
