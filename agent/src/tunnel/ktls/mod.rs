//! Records in the kernel: after the handshake the kernel gets the keys, and bytes only pass by. What stays here is what the
//! kernel does not do: alerts, tickets, key updates, and knowing when a key has done enough.
//!
//! [`Support`] is what the kernel can do, [`KernelTls`] is one connection.

mod keys;
mod support;

use std::{io, os::fd::BorrowedFd};

use rustls::{AlertDescription, ContentType, ExtractedSecrets, SupportedCipherSuite};

pub use support::{Availability, Support};

use super::{
    alert,
    post_handshake::{KEY_UPDATE, PostHandshake, Received},
    records::{REKEY_MARGIN, RecordError},
};
use crate::sys::{
    tcp,
    tls::{self, Way},
};
use keys::KernelKeys;

/// What the kernel adds to each record: header, content type and tag; it pads nothing (RFC 8446, section 5.2), bytes.
const OVERHEAD: u64 = 5 + 1 + 16;
/// Records that may still be sent when a key that cannot be replaced has reached its limit: the alert, and what one write makes.
const END_MARGIN: u64 = 1024;
/// A record of the kernel holds 16 KiB, or less when memory is short; a page is what it then gets at least. Only used to
/// guess when the true number is worth asking for.
const LEAST_IN_FULL_RECORD: u64 = 4096;

/// What a record from the kernel meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Application data.
    Data,
    /// Nothing to pass on.
    Control,
    /// The peer's authenticated end of its direction.
    CloseNotify,
    /// A fatal alert.
    Alert(AlertDescription),
}

/// One connection whose records the kernel protects.
pub struct KernelTls {
    post: PostHandshake,
    suite: SupportedCipherSuite,
    /// Whether the kernel can replace keys.
    rekey: bool,
    /// Size of the kernel's parameters, which depends on the cipher.
    parameters: usize,
    /// Records that one of our keys may protect.
    per_key: u64,
    /// Sequence number of the kernel's first record under the present key.
    first: u64,
    /// Records under earlier keys.
    earlier: u64,
    /// How many more records may be sent before their true number is asked for.
    unasked: u64,
    /// Plaintext given to the kernel, of all types.
    sent: u64,
    /// What TCP had taken before the kernel got the keys.
    before: u64,
}

impl KernelTls {
    /// Gives `socket`, on which [`tls::install`] has succeeded, the keys of a handshake, with the numbers of the records that come next. Nothing of those may have been read. An error leaves
    /// the socket unusable, but with nothing sent or received under wrong keys.
    pub(super) fn start(
        socket: BorrowedFd<'_>,
        secrets: ExtractedSecrets,
        post: PostHandshake,
        support: &Support,
        per_key: Option<u64>,
    ) -> io::Result<Self> {
        let suite = post.suite();
        let before = tcp::accepted(socket)?;
        let first = secrets.tx.0;
        let rx = KernelKeys::new(suite, secrets.rx)?;
        let tx = KernelKeys::new(suite, secrets.tx)?;
        tls::set_keys(socket, Way::Receive, rx.parameters())?;
        tls::set_keys(socket, Way::Transmit, tx.parameters())?;
        if support.no_padding {
            tls::expect_no_padding(socket)?;
        }
        let limit = suite.tls13().map_or(0, |suite| suite.common.confidentiality_limit);
        let margin = if support.rekey { REKEY_MARGIN } else { END_MARGIN };
        Ok(Self {
            post: if support.rekey { post } else { post.without_updates() },
            suite,
            rekey: support.rekey,
            parameters: tx.parameters().size(),
            per_key: per_key.unwrap_or(u64::MAX).min(limit.saturating_sub(margin)),
            first,
            earlier: 0,
            unasked: 0,
            sent: 0,
            before,
        })
    }

    /// Takes note that the kernel took `bytes` of application data in one call.
    pub fn sent(&mut self, bytes: usize) {
        self.sent += bytes as u64;
        self.unasked = self.unasked.saturating_sub(1 + bytes as u64 / LEAST_IN_FULL_RECORD);
    }

    /// To be called before application data is sent: replaces our key when it is time to. `Ok(false)`: the socket has no room for that now.
    pub fn refresh(&mut self, socket: BorrowedFd<'_>) -> Result<bool, Broken> {
        if self.unasked > 0 && !self.post.update_requested() {
            return Ok(true);
        }
        let used = self.used(socket)?;
        if used < self.per_key && !self.post.update_requested() {
            self.unasked = self.per_key - used;
            return Ok(true);
        }
        if !self.rekey {
            return Err(RecordError::Exhausted.into());
        }
        match tls::send_record(socket, ContentType::Handshake.into(), &KEY_UPDATE) {
            Ok(()) => self.sent += KEY_UPDATE.len() as u64,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(e) => return Err(e.into()),
        }
        self.earlier += self.used(socket)?;
        let next = self.post.next_tx().map_err(|_| RecordError::Exhausted)?;
        self.first = next.0;
        let keys = KernelKeys::new(self.suite, next)?;
        tls::set_keys(socket, Way::Transmit, keys.parameters())?;
        self.unasked = self.per_key;
        Ok(true)
    }

    /// Judges what `recvmsg` gave: the type of the records, and their content.
    pub fn received(&mut self, socket: BorrowedFd<'_>, typ: u8, payload: &[u8]) -> Result<Event, Broken> {
        Ok(match self.post.record(typ.into(), payload)? {
            Received::Data => Event::Data,
            Received::Control => Event::Control,
            Received::CloseNotify => Event::CloseNotify,
            Received::Alert(alert) => Event::Alert(alert),
            Received::NextKeys(_) if !self.rekey => return Err(RecordError::Exhausted.into()),
            Received::NextKeys(next) => {
                let keys = KernelKeys::new(self.suite, next)?;
                tls::set_keys(socket, Way::Receive, keys.parameters())?;
                Event::Control
            }
        })
    }

    /// Takes note of data that was not shown to [`Self::received`].
    pub fn received_data(&mut self) {
        self.post.received_data();
    }

    /// Sends the end of our direction. `Ok(false)`: the socket has no room now.
    pub fn send_close_notify(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        self.send_alert_record(socket, alert::WARNING, AlertDescription::CloseNotify)
    }

    /// Sends a fatal alert. `Ok(false)`: the socket has no room now.
    pub fn send_alert(&mut self, socket: BorrowedFd<'_>, alert: AlertDescription) -> io::Result<bool> {
        self.send_alert_record(socket, alert::FATAL, alert)
    }

    fn send_alert_record(&mut self, socket: BorrowedFd<'_>, level: u8, alert: AlertDescription) -> io::Result<bool> {
        let message = alert::encode(level, alert);
        match tls::send_record(socket, ContentType::Alert.into(), &message) {
            Ok(()) => {
                self.sent += message.len() as u64;
                Ok(true)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Whether TCP has everything that was sent. The kernel keeps records of its own when a socket's buffer is full, and
    /// neither `shutdown` nor `close` waits for them: a FIN would overtake them.
    pub fn is_flushed(&self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        let records = self.earlier + self.used(socket)?;
        Ok(tcp::accepted(socket)? >= self.before + self.sent + records * OVERHEAD)
    }

    /// Records that the kernel has sent under the present key.
    fn used(&self, socket: BorrowedFd<'_>) -> io::Result<u64> {
        Ok(tls::transmit_sequence(socket, self.parameters)?.saturating_sub(self.first))
    }
}

/// What an error of the socket says about the record.
pub(crate) fn from_kernel(error: io::Error) -> Broken {
    match error.raw_os_error() {
        Some(libc::EBADMSG) => RecordError::Decrypt.into(),
        Some(libc::EMSGSIZE | libc::EINVAL) => RecordError::Header.into(),
        _ => error.into(),
    }
}

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The socket failed.
    #[error(transparent)]
    Socket(#[from] io::Error),
    /// A record cannot be accepted, or none can be sent any more.
    #[error(transparent)]
    Record(#[from] RecordError),
}
