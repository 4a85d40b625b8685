//! TLS 1.3 records in user space, outside of a rustls connection: rustls derives and updates the keys
//! ([`rustls::kernel::KernelConnection`]); this module frames, and `protection` seals and opens in place.
//! The kernel-TLS path has the same shape, with the kernel in place of the AEAD.

mod protection;

use std::ops::Range;

use rustls::{AlertDescription, ContentType, Error, ExtractedSecrets, SupportedCipherSuite};

use self::protection::Key;
use super::{
    alert,
    post_handshake::{KEY_UPDATE, PostHandshake, Received, Schedule},
};

/// Most plaintext in one record (RFC 8446, section 5.1), bytes.
pub const MAX_PLAINTEXT: usize = 16 * 1024;
/// Largest record on the wire: header, plaintext, content type, padding and tag allowance (RFC 8446, section 5.2), bytes.
pub const MAX_RECORD: usize = HEADER + MAX_PLAINTEXT + 256;
/// Bytes of a record's header: content type, version, length.
pub(crate) const HEADER: usize = 5;
/// The tag of every cipher of TLS 1.3, bytes.
const TAG: usize = 16;
/// Bytes behind a record's plaintext: the true content type and the tag.
pub(crate) const TRAILER: usize = 1 + TAG;

/// Rekeying starts this many records before the cipher's confidentiality limit, so that everything already under way
/// still fits (half of AES-GCM's 2^24 records of RFC 8446, section 5.5).
pub(super) const REKEY_MARGIN: u64 = 1 << 23;
/// A record that cannot be accepted; the connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Header says more than TLS allows, or is no TLS record at all.
    #[error("malformed record header")]
    Header,
    /// Authentication failed.
    #[error("record failed authentication")]
    Decrypt,
    /// A handshake message that is not allowed after the handshake, or is malformed.
    #[error("unexpected post-handshake message")]
    Unexpected,
    /// Keys are used up and could not be updated.
    #[error("confidentiality limit of the cipher reached")]
    Exhausted,
}

/// What a record held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opened {
    /// Application data, decrypted in place, at this range of the buffer given to [`Records::open`]. May be empty.
    Data(Range<usize>),
    /// The peer's authenticated end of its direction.
    CloseNotify,
    /// A fatal alert: the peer has given up the connection.
    Alert(AlertDescription),
    /// A ticket or key update; already dealt with (see [`Records::take_control`]).
    Control,
}

/// Record protection in both directions of one connection.
pub struct Records {
    post: PostHandshake,
    tx: Key,
    tx_sequence: u64,
    /// From this sequence number on a key update is due.
    rekey_at: u64,
    /// No record is sealed with this sequence number or a later one.
    tx_limit: u64,
    rx: Key,
    rx_sequence: u64,
    /// A key has been replaced since the handshake.
    updated: bool,
    /// The peer's direction is over: ended, or broken.
    rx_over: bool,
}

impl Records {
    /// Takes over from a handshake. A key protects at most `per_key` records, by default what its cipher can bear.
    pub(super) fn new(secrets: &ExtractedSecrets, schedule: Schedule, per_key: Option<u64>) -> Result<Self, Error> {
        let suite = schedule.suite().tls13().ok_or_else(|| Error::General("records need TLS 1.3".into()))?;
        let (tx_sequence, tx) = &secrets.tx;
        let (rx_sequence, rx) = &secrets.rx;
        let tx_limit = suite.common.confidentiality_limit;
        Ok(Self {
            post: PostHandshake::new(schedule),
            tx: Key::new(tx)?,
            tx_sequence: *tx_sequence,
            rekey_at: per_key.unwrap_or(u64::MAX).min(tx_limit.saturating_sub(REKEY_MARGIN)),
            tx_limit,
            rx: Key::new(rx)?,
            rx_sequence: *rx_sequence,
            updated: false,
            rx_over: false,
        })
    }

    /// What somebody else needs, beside the handshake's keys, to go on from here: the sequence numbers of the next records sent and received.
    /// `None` when those keys are no longer in use.
    pub(super) fn sequences(&self) -> Option<(u64, u64)> {
        (!self.updated).then_some((self.tx_sequence, self.rx_sequence))
    }

    /// The cipher suite.
    pub(super) fn suite(&self) -> SupportedCipherSuite {
        self.post.suite()
    }

    /// What is left when somebody else protects the records.
    pub(super) fn into_post_handshake(self) -> PostHandshake {
        self.post
    }

    /// How many records may be sealed before [`Self::take_control`] is to be asked again; at least one.
    pub fn until_control(&self) -> usize {
        usize::try_from(self.rekey_at.saturating_sub(self.tx_sequence)).unwrap_or(usize::MAX).max(1)
    }

    /// Protects at most [`MAX_PLAINTEXT`] bytes as one application-data record, header included.
    ///
    /// More than that is refused with [`RecordError::Header`].
    pub fn seal(&mut self, plaintext: &[u8]) -> Result<Vec<u8>, RecordError> {
        self.seal_as(ContentType::ApplicationData, plaintext)
    }

    /// The record that ends our direction: alert `close_notify`.
    pub fn seal_close_notify(&mut self) -> Result<Vec<u8>, RecordError> {
        self.seal_as(ContentType::Alert, &alert::encode(alert::WARNING, AlertDescription::CloseNotify))
    }

    /// A fatal alert.
    pub fn seal_alert(&mut self, alert: AlertDescription) -> Result<Vec<u8>, RecordError> {
        self.seal_as(ContentType::Alert, &alert::encode(alert::FATAL, alert))
    }

    /// Opens the record at the start of `buffer` in place: what it held, and its length on the wire. `Ok(None)`: not complete yet.
    ///
    /// After an error, an alert or an end nothing more can be opened.
    pub fn open(&mut self, buffer: &mut [u8]) -> Result<Option<(Opened, usize)>, RecordError> {
        if self.rx_over {
            return Err(RecordError::Unexpected);
        }
        let opened = self.open_next(buffer);
        self.rx_over = matches!(opened, Err(_) | Ok(Some((Opened::CloseNotify | Opened::Alert(_), _))));
        opened
    }

    /// A control record (key update) to send before the next data, if one is due.
    ///
    /// It is sealed now and what is sealed later uses the next keys, so it has to be sent in this place.
    pub fn take_control(&mut self) -> Option<Vec<u8>> {
        if !self.post.update_requested() && self.tx_sequence < self.rekey_at {
            return None;
        }
        self.update_tx(KEY_UPDATE)
    }

    /// Seals a key update and goes on with the next keys. A failure leaves the old ones in place; sealing stops at their limit.
    pub(crate) fn update_tx(&mut self, message: [u8; 5]) -> Option<Vec<u8>> {
        if self.tx_sequence >= self.tx_limit {
            return None;
        }
        let (sequence, secrets) = self.post.next_tx().ok()?;
        let next = Key::new(&secrets).ok()?;
        let record = self.seal_as(ContentType::Handshake, &message).ok()?;
        self.tx = next;
        self.tx_sequence = sequence;
        self.updated = true;
        Some(record)
    }

    /// Protects the plaintext between [`HEADER`] bytes and [`TRAILER`] bytes of room, in place.
    ///
    /// More than [`MAX_PLAINTEXT`] bytes of it are refused with [`RecordError::Header`], as is less than the room.
    pub fn seal_in_place(&mut self, record: &mut [u8]) -> Result<(), RecordError> {
        self.protect(record, ContentType::ApplicationData)
    }

    /// Protects a message of any type, unchecked.
    pub(super) fn seal_as(&mut self, typ: ContentType, plaintext: &[u8]) -> Result<Vec<u8>, RecordError> {
        let mut record = vec![0; HEADER + plaintext.len() + TRAILER];
        record[HEADER..HEADER + plaintext.len()].copy_from_slice(plaintext);
        self.protect(&mut record, typ)?;
        Ok(record)
    }

    fn protect(&mut self, record: &mut [u8], typ: ContentType) -> Result<(), RecordError> {
        if record.len().checked_sub(HEADER + TRAILER).is_none_or(|plaintext| plaintext > MAX_PLAINTEXT) {
            return Err(RecordError::Header);
        }
        if self.tx_sequence >= self.tx_limit {
            return Err(RecordError::Exhausted);
        }
        self.tx.seal(record, typ, self.tx_sequence).map_err(|_| RecordError::Exhausted)?;
        self.tx_sequence += 1;
        Ok(())
    }

    fn open_next(&mut self, buffer: &mut [u8]) -> Result<Option<(Opened, usize)>, RecordError> {
        let Some(length) = body_length(buffer)? else { return Ok(None) };
        let wire = HEADER + length;
        let Some(body) = buffer.get_mut(HEADER..wire) else { return Ok(None) };

        let (typ, length) = self.rx.open(body, self.rx_sequence).map_err(|e| match e {
            Error::DecryptError => RecordError::Decrypt,
            Error::PeerSentOversizedRecord => RecordError::Header,
            _ => RecordError::Unexpected,
        })?;
        self.rx_sequence = self.rx_sequence.checked_add(1).ok_or(RecordError::Exhausted)?;

        let opened = match self.post.record(typ, &body[..length])? {
            Received::Data => Opened::Data(HEADER..HEADER + length),
            Received::CloseNotify => Opened::CloseNotify,
            Received::Alert(description) => Opened::Alert(description),
            Received::Control => Opened::Control,
            Received::NextKeys((sequence, secrets)) => {
                self.rx = Key::new(&secrets).map_err(|_| RecordError::Exhausted)?;
                self.rx_sequence = sequence;
                self.updated = true;
                Opened::Control
            }
        };
        Ok(Some((opened, wire)))
    }

    /// Lowers the limits so that a test reaches them.
    #[cfg(test)]
    pub(crate) fn limit_for_tests(&mut self, rekey_at: u64, limit: u64) {
        self.rekey_at = rekey_at;
        self.tx_limit = limit;
    }
}

/// Length of the body of the record at the start of `buffer`, `None` while the header is incomplete. A
/// wrong header is refused at its first wrong byte.
fn body_length(buffer: &[u8]) -> Result<Option<usize>, RecordError> {
    // After the handshake every record is encrypted, so its outer type is application_data (RFC 8446, section 5.2).
    const PREFIX: [u8; 3] = [23, 3, 3];
    if buffer.iter().zip(PREFIX).any(|(a, b)| *a != b) {
        return Err(RecordError::Header);
    }
    let &[_, _, _, high, low, ..] = buffer else { return Ok(None) };
    let length = usize::from(u16::from_be_bytes([high, low]));
    if HEADER + length > MAX_RECORD { Err(RecordError::Header) } else { Ok(Some(length)) }
}
