//! An established tunnel before it goes to the relay.

use std::{io::ErrorKind, os::fd::OwnedFd, time::Duration};

use rustls::AlertDescription;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    TunnelError, alert,
    config::ReadMode,
    handshake::READ_CHUNK,
    records::{HEADER, MAX_PLAINTEXT, Opened, Records},
};
use crate::{mesh::SpiffeId, telemetry::RefusalReason};

/// How long and how much a refused peer is listened to.
const DRAIN_TIME: Duration = Duration::from_secs(2);
const DRAIN_BYTES: usize = 1024 * 1024;

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
    pub stream: TcpStream,
    /// Record protection in both directions.
    pub records: Records,
    /// Ciphertext read but not yet opened; starts at a record boundary.
    pub unread: Vec<u8>,
    /// Plaintext opened but not yet consumed: application bytes that came with the PROXY header.
    pub plaintext: Vec<u8>,
    /// Who is at the ends.
    pub info: SessionInfo,
    pub(super) read_mode: ReadMode,
}

impl Session {
    /// Sends `data` as application data and waits until the kernel has it all.
    pub async fn send(&mut self, data: &[u8]) -> Result<(), TunnelError> {
        for chunk in data.chunks(MAX_PLAINTEXT) {
            self.send_control().await?;
            let record = self.records.seal(chunk).map_err(|e| bad_record("sealing a record", e))?;
            write(&mut self.stream, &record).await?;
        }
        Ok(())
    }

    /// Receives at least one byte of application data into `self.plaintext` (tickets and key updates are handled on the way), or
    /// returns 0 at an authenticated end. Never reads past `limit` bytes of plaintext in total.
    ///
    /// A record is opened whole, so the one that crosses `limit` still fits; asked for more after that, this refuses with
    /// [`RefusalReason::ProxyHeader`].
    pub async fn receive(&mut self, limit: usize) -> Result<usize, TunnelError> {
        if self.plaintext.len() >= limit {
            return Err(TunnelError::Refused {
                reason: RefusalReason::ProxyHeader,
                detail: format!("no complete PROXY header in the first {limit} bytes"),
            });
        }
        loop {
            let Some((opened, wire)) =
                self.records.open(&mut self.unread).map_err(|e| bad_record("opening a record", e))?
            else {
                self.fill().await?;
                continue;
            };
            let received = match opened {
                Opened::Data(range) => {
                    let length = range.len();
                    self.plaintext.extend_from_slice(&self.unread[range]);
                    (length > 0).then_some(length)
                }
                Opened::CloseNotify => Some(0),
                Opened::Alert(description) => {
                    return Err(TunnelError::Refused {
                        reason: alert::reason(description),
                        detail: format!("peer ended the tunnel with alert {description:?}"),
                    });
                }
                Opened::Control => None,
            };
            self.unread.drain(..wire);
            if let Some(received) = received {
                return Ok(received);
            }
            self.send_control().await?;
        }
    }

    /// Refuses the peer: fatal alert, `shutdown(WR)`, then reads and discards at most 1 MiB or for 2 s so that unread data
    /// does not turn the alert into a bare reset, then closes.
    pub async fn refuse(mut self, alert: AlertDescription) {
        if let Ok(record) = self.records.seal_alert(alert)
            && write(&mut self.stream, &record).await.is_ok()
        {
            drain(self.stream).await;
        }
    }

    /// Takes it apart for the relay: the descriptor deregistered from tokio, still non-blocking.
    #[expect(clippy::type_complexity, reason = "taken apart once, into variables of these names")]
    pub fn into_parts(self) -> std::io::Result<(OwnedFd, Records, Vec<u8>, Vec<u8>, SessionInfo)> {
        let fd = OwnedFd::from(self.stream.into_std()?);
        Ok((fd, self.records, self.unread, self.plaintext, self.info))
    }

    async fn send_control(&mut self) -> Result<(), TunnelError> {
        match self.records.take_control() {
            Some(record) => write(&mut self.stream, &record).await,
            None => Ok(()),
        }
    }

    /// Reads more ciphertext.
    async fn fill(&mut self) -> Result<(), TunnelError> {
        let missing = match *self.unread {
            [_, _, _, high, low, ..] => HEADER + usize::from(u16::from_be_bytes([high, low])),
            _ => HEADER,
        } - self.unread.len();
        match self.read_mode.read(&mut self.stream, &mut self.unread, missing).await {
            Ok(0) => Err(TunnelError::Refused {
                reason: RefusalReason::Truncated,
                detail: "peer closed the tunnel without close_notify".into(),
            }),
            Ok(_) => Ok(()),
            Err(e) if e.kind() == ErrorKind::ConnectionReset => {
                Err(TunnelError::Refused { reason: RefusalReason::Truncated, detail: "peer reset the tunnel".into() })
            }
            Err(source) => Err(TunnelError::Io { action: "receiving from the tunnel", source }),
        }
    }
}

fn bad_record(action: &str, error: super::records::RecordError) -> TunnelError {
    TunnelError::Refused { reason: RefusalReason::BadRecord, detail: format!("{action}: {error}") }
}

async fn write(stream: &mut TcpStream, record: &[u8]) -> Result<(), TunnelError> {
    stream.write_all(record).await.map_err(|source| TunnelError::Io { action: "sending into the tunnel", source })
}

/// Ends our direction and discards what still comes, within bounds: closing with unread bytes would send a reset, which
/// overtakes the alert.
pub(super) async fn drain(mut stream: TcpStream) {
    if stream.shutdown().await.is_err() {
        return;
    }
    let mut left = DRAIN_BYTES;
    let mut buffer = vec![0; READ_CHUNK];
    let discard = async {
        while left > 0 {
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(n) => left = left.saturating_sub(n),
            }
        }
    };
    // Time running out is the expected end with a peer that does not close.
    let _ = tokio::time::timeout(DRAIN_TIME, discard).await;
}
