//! An established tunnel before it goes to the relay.

pub(crate) mod kernel;
mod user;

use std::{
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use rustls::{AlertDescription, ExtractedSecrets};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

pub use user::UserRecords;

use super::{
    Suite, TlsConfigs, TunnelError, alert,
    handshake::READ_CHUNK,
    ktls::{Availability, KernelTls, Support},
    post_handshake::Schedule,
    records::{RecordError, Records},
    verify::refusal,
};
use crate::{
    mesh::SpiffeId,
    sys::tls::{self, Incoming},
    telemetry::{KtlsFallback, RefusalReason},
};

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

/// Who protects the records.
pub enum Protection {
    /// We do.
    User(Box<UserRecords>),
    /// The kernel does.
    Kernel(Box<KernelTls>),
}

/// An authenticated tunnel: the socket (non-blocking, registered with no reactor any more once taken apart), its
/// record protection, and bytes that arrived behind the handshake.
pub struct Session {
    /// The tunnel's socket as tokio sees it until the relay takes over.
    pub stream: TcpStream,
    /// Who protects the records.
    pub protection: Protection,
    /// Plaintext opened but not yet consumed: application bytes that came with the PROXY header.
    pub plaintext: Vec<u8>,
    /// Who is at the ends.
    pub info: SessionInfo,
}

impl Protection {
    /// Begins behind a handshake: with the kernel where it can, else here. `unread` came behind the handshake.
    pub(super) fn start(
        stream: &TcpStream,
        secrets: ExtractedSecrets,
        schedule: Schedule,
        unread: Vec<u8>,
        configs: &TlsConfigs,
    ) -> Result<Self, TunnelError> {
        let support = configs.ktls();
        let per_key = configs.records_per_key();
        match kernel_takes(stream, &schedule, &unread, support) {
            Ok(()) => {
                let ktls = KernelTls::start(stream.as_fd(), secrets, schedule, support, per_key)
                    .map_err(|source| TunnelError::Io { action: "giving the kernel the tunnel's keys", source })?;
                Ok(Self::Kernel(Box::new(ktls)))
            }
            Err(fallback) => Self::user(secrets, schedule, unread, configs, fallback),
        }
    }

    /// Begins behind a handshake, without the kernel.
    pub(super) fn user(
        secrets: ExtractedSecrets,
        schedule: Schedule,
        unread: Vec<u8>,
        configs: &TlsConfigs,
        fallback: KtlsFallback,
    ) -> Result<Self, TunnelError> {
        let records = Records::new(secrets, schedule, configs.records_per_key()).map_err(|e| refusal(&e))?;
        Ok(Self::User(Box::new(UserRecords { records, unread, fallback, read_mode: configs.read_mode() })))
    }
}

/// Prepares the socket for keys, or says why the kernel cannot have this connection.
fn kernel_takes(stream: &TcpStream, schedule: &Schedule, unread: &[u8], support: &Support) -> Result<(), KtlsFallback> {
    match support.availability {
        Availability::Ready => {}
        Availability::Missing(_) => return Err(KtlsFallback::Unavailable),
        Availability::Disabled => return Err(KtlsFallback::Disabled),
    }
    if !Suite::of(schedule.suite().suite()).is_some_and(|suite| support.covers(suite)) {
        return Err(KtlsFallback::Cipher);
    }
    if !unread.is_empty() {
        return Err(KtlsFallback::Socket);
    }
    tls::install(stream.as_fd()).map_err(|error| {
        tracing::debug!(%error, "this socket cannot have kernel TLS");
        KtlsFallback::Socket
    })
}

impl Session {
    /// Sends `data` as application data and waits until the kernel has it all.
    pub async fn send(&mut self, data: &[u8]) -> Result<(), TunnelError> {
        match &mut self.protection {
            Protection::User(records) => records.send(&mut self.stream, data).await,
            Protection::Kernel(ktls) => kernel::send(ktls, &mut self.stream, data).await,
        }
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
        match &mut self.protection {
            Protection::User(records) => records.receive(&mut self.stream, &mut self.plaintext).await,
            Protection::Kernel(ktls) => kernel::receive(ktls, &mut self.stream, &mut self.plaintext).await,
        }
    }

    /// Refuses the peer: fatal alert, `shutdown(WR)`, then reads and discards at most 1 MiB or for 2 s so that unread data
    /// does not turn the alert into a bare reset, then closes.
    pub async fn refuse(mut self, alert: AlertDescription) {
        match &mut self.protection {
            Protection::User(records) => {
                if records.alert(&mut self.stream, alert).await {
                    drain(self.stream).await;
                }
            }
            Protection::Kernel(ktls) => {
                if kernel::alert(ktls, &mut self.stream, alert).await {
                    drain_with(self.stream, async |stream, buffer| match kernel::next(stream, buffer).await {
                        Ok(Incoming::Records { length, .. }) => Some(length),
                        _ => None,
                    })
                    .await;
                }
            }
        }
    }

    /// Why the kernel does not protect the records; `None` when it does.
    pub fn fallback(&self) -> Option<KtlsFallback> {
        match &self.protection {
            Protection::User(records) => Some(records.fallback),
            Protection::Kernel(_) => None,
        }
    }

    /// Takes it apart for the relay: the descriptor deregistered from tokio, still non-blocking, and plaintext that is already here.
    pub fn into_parts(self) -> std::io::Result<(OwnedFd, Protection, Vec<u8>)> {
        let fd = OwnedFd::from(self.stream.into_std()?);
        Ok((fd, self.protection, self.plaintext))
    }
}

fn truncated() -> TunnelError {
    TunnelError::Refused {
        reason: RefusalReason::Truncated,
        detail: "peer closed the tunnel without close_notify".into(),
    }
}

fn reset() -> TunnelError {
    TunnelError::Refused { reason: RefusalReason::Truncated, detail: "peer reset the tunnel".into() }
}

fn ended_by(alert: AlertDescription) -> TunnelError {
    TunnelError::Refused { reason: alert::reason(alert), detail: format!("peer ended the tunnel with alert {alert:?}") }
}

fn bad_record(action: &str, error: RecordError) -> TunnelError {
    TunnelError::Refused { reason: RefusalReason::BadRecord, detail: format!("{action}: {error}") }
}

async fn write(stream: &mut TcpStream, record: &[u8]) -> Result<(), TunnelError> {
    stream.write_all(record).await.map_err(|source| TunnelError::Io { action: "sending into the tunnel", source })
}

/// Ends our direction and discards what still comes, within bounds: closing with unread bytes would send a reset, which
/// overtakes the alert.
pub(super) async fn drain(stream: TcpStream) {
    drain_with(stream, async |stream, buffer| match stream.read(buffer).await {
        Ok(0) | Err(_) => None,
        Ok(n) => Some(n),
    })
    .await;
}

async fn drain_with(mut stream: TcpStream, next: impl AsyncFn(&mut TcpStream, &mut [u8]) -> Option<usize>) {
    if stream.shutdown().await.is_err() {
        return;
    }
    let mut left = DRAIN_BYTES;
    let mut buffer = vec![0; READ_CHUNK];
    let discard = async {
        while left > 0 {
            match next(&mut stream, &mut buffer).await {
                None => return,
                // An empty record is work too.
                Some(n) => left = left.saturating_sub(n.max(1)),
            }
        }
    };
    // Time running out is the expected end with a peer that does not close.
    let _ = tokio::time::timeout(DRAIN_TIME, discard).await;
}
