//! An established tunnel before it goes to the relay.
//!
//! The header of the native tunnel is sent and received with records made here, whoever makes them afterwards: it then leaves in one
//! segment with the end of the handshake, and whatever arrives together with it is read at once.

mod user;

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    time::Duration,
};

use rustls::{AlertDescription, SupportedCipherSuite};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

pub use user::UserRecords;
use user::{Reading, Received};

use super::{
    Suite, TunnelError, alert,
    handshake::READ_CHUNK,
    ktls::{Availability, KernelTls, Support},
    records::RecordError,
};
use crate::{
    identity::revocation::Chain,
    mesh::SpiffeId,
    sys::tls,
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
    /// The certificates that it proved it with.
    pub chain: Arc<Chain>,
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
    Kernel {
        /// What is left to do here.
        tls: Box<KernelTls>,
        /// The peer's authenticated end has been received.
        ended: bool,
    },
}

/// An authenticated tunnel: the socket (non-blocking, registered with no reactor any more once taken apart), its
/// record protection, and bytes that arrived behind the handshake.
pub struct Session {
    /// The tunnel's socket as tokio sees it until the relay takes over.
    pub stream: TcpStream,
    /// Record protection until then.
    pub records: Box<UserRecords>,
    /// Plaintext opened but not yet consumed: application bytes that came with the PROXY header.
    pub plaintext: Vec<u8>,
    /// Who is at the ends.
    pub info: SessionInfo,
}

/// A tunnel that is ready for the relay.
pub struct Tunnel {
    stream: TcpStream,
    protection: Protection,
    plaintext: Vec<u8>,
    /// Who is at the ends.
    pub info: SessionInfo,
}

impl Session {
    pub(super) fn new(stream: TcpStream, records: UserRecords, info: SessionInfo) -> Self {
        Self { stream, records: Box::new(records), plaintext: Vec::new(), info }
    }

    /// Sends `data` as application data and waits until the kernel has it all.
    pub async fn send(&mut self, data: &[u8]) -> Result<(), TunnelError> {
        self.records.send(&mut self.stream, data).await
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
            match self.records.next(&mut self.stream, &mut self.plaintext, Reading::Greedy).await? {
                Some(Received::Data(length)) => return Ok(length),
                Some(Received::End) => return Ok(0),
                None => {}
            }
        }
    }

    /// Refuses the peer: fatal alert, `shutdown(WR)`, then reads and discards at most 1 MiB or for 2 s so that unread data
    /// does not turn the alert into a bare reset, then closes.
    pub async fn refuse(mut self, alert: AlertDescription) {
        if self.records.alert(&mut self.stream, alert).await {
            drain(self.stream).await;
        }
    }

    /// Leaves the records to the kernel from here on, if it can have them. Waits for the rest of a record that has begun to arrive: the
    /// kernel can only begin with a whole one. The caller bounds the time.
    pub async fn offload(mut self, support: &Support) -> Result<Tunnel, TunnelError> {
        let protection = match kernel_takes(&self.stream, self.records.records.suite(), support) {
            Ok(()) => {
                let mut ended = false;
                while !ended && !self.records.unread.is_empty() {
                    let next = self.records.next(&mut self.stream, &mut self.plaintext, Reading::Record).await?;
                    ended = next == Some(Received::End);
                }
                give_to_kernel(&self.stream, *self.records, support, ended)?
            }
            Err(fallback) => {
                self.records.fallback = fallback;
                Protection::User(self.records)
            }
        };
        Ok(Tunnel { stream: self.stream, protection, plaintext: self.plaintext, info: self.info })
    }
}

/// Prepares the socket for keys, or says why the kernel cannot have this connection.
fn kernel_takes(stream: &TcpStream, suite: SupportedCipherSuite, support: &Support) -> Result<(), KtlsFallback> {
    match support.availability {
        Availability::Ready => {}
        Availability::Missing(_) => return Err(KtlsFallback::Unavailable),
        Availability::Disabled => return Err(KtlsFallback::Disabled),
    }
    if !Suite::of(suite.suite()).is_some_and(|suite| support.covers(suite)) {
        return Err(KtlsFallback::Cipher);
    }
    tls::install(stream.as_fd()).map_err(|error| {
        tracing::debug!(%error, "this socket cannot have kernel TLS");
        KtlsFallback::Socket
    })
}

fn give_to_kernel(
    stream: &TcpStream,
    records: UserRecords,
    support: &Support,
    ended: bool,
) -> Result<Protection, TunnelError> {
    let per_key = records.per_key;
    match records.into_keys() {
        Ok((secrets, post)) => {
            let tls = KernelTls::start(stream.as_fd(), secrets, post, support, per_key)
                .map_err(|source| TunnelError::Io { action: "giving the kernel the tunnel's keys", source })?;
            Ok(Protection::Kernel { tls: Box::new(tls), ended })
        }
        Err(mut records) => {
            records.fallback = KtlsFallback::Socket;
            Ok(Protection::User(records))
        }
    }
}

impl Tunnel {
    /// Why the kernel does not protect the records; `None` when it does.
    pub fn fallback(&self) -> Option<KtlsFallback> {
        match &self.protection {
            Protection::User(records) => Some(records.fallback),
            Protection::Kernel { .. } => None,
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
