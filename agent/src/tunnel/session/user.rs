//! Records made and opened here.

use std::io::ErrorKind;

use rustls::{AlertDescription, ExtractedSecrets};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

use super::{bad_record, ended_by, reset, truncated};
use crate::{
    telemetry::KtlsFallback,
    tunnel::{
        TunnelError,
        handshake::{READ_CHUNK, read_more},
        post_handshake::{PostHandshake, Schedule},
        records::{HEADER, MAX_PLAINTEXT, Opened, Records},
        verify::refusal,
    },
};

/// How much is read when more ciphertext is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// What there is.
    Greedy,
    /// The rest of the record that has begun, and nothing behind it.
    Record,
}

/// What a record brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// This many bytes, at least one.
    Data(usize),
    /// The peer's authenticated end.
    End,
}

/// Keys, and ciphertext not opened or not sent yet.
pub struct UserRecords {
    /// Record protection in both directions.
    pub records: Records,
    /// Ciphertext read but not yet opened; starts at a record boundary.
    pub unread: Vec<u8>,
    /// Why the kernel does not do this.
    pub fallback: KtlsFallback,
    /// Goes before anything else that is sent.
    unsent: Vec<u8>,
    /// The handshake's keys, in case that the kernel takes over.
    secrets: ExtractedSecrets,
    /// Records that a key may protect, if somebody said so.
    pub(super) per_key: Option<u64>,
}

impl UserRecords {
    /// Begins behind a handshake that left `unread` and `unsent`.
    pub(in crate::tunnel) fn new(
        secrets: ExtractedSecrets,
        schedule: Schedule,
        unread: Vec<u8>,
        unsent: Vec<u8>,
        per_key: Option<u64>,
    ) -> Result<Self, TunnelError> {
        let records = Records::new(&secrets, schedule, per_key).map_err(|e| refusal(&e))?;
        Ok(Self { records, unread, fallback: KtlsFallback::Disabled, unsent, secrets, per_key })
    }

    /// Sends what is unsent and, as records, `data`, in as few writes as possible.
    pub(super) async fn send(&mut self, stream: &mut TcpStream, data: &[u8]) -> Result<(), TunnelError> {
        for chunk in data.chunks(MAX_PLAINTEXT) {
            if let Some(control) = self.records.take_control() {
                self.unsent.extend(control);
            }
            let record = self.records.seal(chunk).map_err(|e| bad_record("sealing a record", e))?;
            self.unsent.extend(record);
            self.flush(stream).await?;
        }
        self.flush(stream).await
    }

    /// Receives one record and appends its data to `plaintext`. `None`: there was none in it.
    pub(super) async fn next(
        &mut self,
        stream: &mut TcpStream,
        plaintext: &mut Vec<u8>,
        reading: Reading,
    ) -> Result<Option<Received>, TunnelError> {
        let (opened, wire) = loop {
            match self.records.open(&mut self.unread).map_err(|e| bad_record("opening a record", e))? {
                Some(record) => break record,
                None => self.fill(stream, reading).await?,
            }
        };
        let received = match opened {
            Opened::Data(range) => {
                let length = range.len();
                plaintext.extend_from_slice(&self.unread[range]);
                (length > 0).then_some(Received::Data(length))
            }
            Opened::CloseNotify => Some(Received::End),
            Opened::Alert(description) => return Err(ended_by(description)),
            Opened::Control => None,
        };
        self.unread.drain(..wire);
        if received.is_none()
            && let Some(control) = self.records.take_control()
        {
            self.unsent.extend(control);
            self.flush(stream).await?;
        }
        Ok(received)
    }

    /// Sends a fatal alert; `false` when it could not be sent.
    pub(super) async fn alert(&mut self, stream: &mut TcpStream, alert: AlertDescription) -> bool {
        let Ok(record) = self.records.seal_alert(alert) else { return false };
        self.unsent.extend(record);
        self.flush(stream).await.is_ok()
    }

    /// The handshake's keys, if they are still in use, with the numbers of the next records, and what else goes on with them.
    pub(super) fn into_keys(mut self) -> Result<(ExtractedSecrets, PostHandshake), Box<Self>> {
        let Some((tx, rx)) = self.records.sequences() else { return Err(Box::new(self)) };
        (self.secrets.tx.0, self.secrets.rx.0) = (tx, rx);
        Ok((self.secrets, self.records.into_post_handshake()))
    }

    async fn flush(&mut self, stream: &mut TcpStream) -> Result<(), TunnelError> {
        if self.unsent.is_empty() {
            return Ok(());
        }
        let sent = stream.write_all(&self.unsent).await;
        self.unsent = Vec::new();
        sent.map_err(|source| TunnelError::Io { action: "sending into the tunnel", source })
    }

    /// Reads more ciphertext.
    async fn fill(&mut self, stream: &mut TcpStream, reading: Reading) -> Result<(), TunnelError> {
        let missing = match *self.unread {
            [_, _, _, high, low, ..] => HEADER + usize::from(u16::from_be_bytes([high, low])),
            _ => HEADER,
        } - self.unread.len();
        let most = if reading == Reading::Greedy { missing.max(READ_CHUNK) } else { missing };
        match read_more(stream, &mut self.unread, most).await {
            Ok(0) => Err(truncated()),
            Ok(_) => Ok(()),
            Err(e) if e.kind() == ErrorKind::ConnectionReset => Err(reset()),
            Err(source) => Err(TunnelError::Io { action: "receiving from the tunnel", source }),
        }
    }
}
