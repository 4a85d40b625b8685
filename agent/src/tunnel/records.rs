//! TLS 1.3 records in user space, outside of a rustls connection: rustls derives and updates the keys
//! ([`rustls::kernel::KernelConnection`]) and protects each record (its AEAD objects); this module only frames.
//! The kernel-TLS path has the same shape, with the kernel in place of the AEAD objects.

use std::ops::Range;

use rustls::AlertDescription;

/// Most plaintext in one record (RFC 8446, section 5.1), bytes.
pub const MAX_PLAINTEXT: usize = 16 * 1024;
/// Largest record on the wire: header, plaintext, content type, padding and tag allowance (RFC 8446, section 5.2), bytes.
pub const MAX_RECORD: usize = 5 + MAX_PLAINTEXT + 256;

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
pub struct Records {}

impl Records {
    /// Protects at most [`MAX_PLAINTEXT`] bytes as one application-data record, header included.
    pub fn seal(&mut self, plaintext: &[u8]) -> Result<Vec<u8>, RecordError> {
        let _ = plaintext;
        todo!()
    }

    /// The record that ends our direction: alert `close_notify`.
    pub fn seal_close_notify(&mut self) -> Result<Vec<u8>, RecordError> {
        todo!()
    }

    /// A fatal alert.
    pub fn seal_alert(&mut self, alert: AlertDescription) -> Result<Vec<u8>, RecordError> {
        let _ = alert;
        todo!()
    }

    /// Opens the record at the start of `buffer` in place: what it held, and its length on the wire. `Ok(None)`: not complete yet.
    pub fn open(&mut self, buffer: &mut [u8]) -> Result<Option<(Opened, usize)>, RecordError> {
        let _ = buffer;
        todo!()
    }

    /// A control record (key update) to send before the next data, if one is due.
    pub fn take_control(&mut self) -> Option<Vec<u8>> {
        todo!()
    }
}
