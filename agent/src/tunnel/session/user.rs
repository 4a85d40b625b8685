//! Records made and opened here.

use std::io::ErrorKind;

use rustls::AlertDescription;
use tokio::net::TcpStream;

use super::{bad_record, ended_by, write};
use crate::{
    telemetry::KtlsFallback,
    tunnel::{
        TunnelError,
        config::ReadMode,
        records::{HEADER, MAX_PLAINTEXT, Opened, Records},
    },
};

/// Keys, and ciphertext not opened yet.
pub struct UserRecords {
    /// Record protection in both directions.
    pub records: Records,
    /// Ciphertext read but not yet opened; starts at a record boundary.
    pub unread: Vec<u8>,
    /// Why the kernel does not do this.
    pub fallback: KtlsFallback,
    pub(in crate::tunnel) read_mode: ReadMode,
}

impl UserRecords {
    pub(super) async fn send(&mut self, stream: &mut TcpStream, data: &[u8]) -> Result<(), TunnelError> {
        for chunk in data.chunks(MAX_PLAINTEXT) {
            self.send_control(stream).await?;
            let record = self.records.seal(chunk).map_err(|e| bad_record("sealing a record", e))?;
            write(stream, &record).await?;
        }
        Ok(())
    }

    /// Appends one record's data to `plaintext`, see [`super::Session::receive`].
    pub(super) async fn receive(
        &mut self,
        stream: &mut TcpStream,
        plaintext: &mut Vec<u8>,
    ) -> Result<usize, TunnelError> {
        loop {
            let Some((opened, wire)) =
                self.records.open(&mut self.unread).map_err(|e| bad_record("opening a record", e))?
            else {
                self.fill(stream).await?;
                continue;
            };
            let received = match opened {
                Opened::Data(range) => {
                    let length = range.len();
                    plaintext.extend_from_slice(&self.unread[range]);
                    (length > 0).then_some(length)
                }
                Opened::CloseNotify => Some(0),
                Opened::Alert(description) => return Err(ended_by(description)),
                Opened::Control => None,
            };
            self.unread.drain(..wire);
            if let Some(received) = received {
                return Ok(received);
            }
            self.send_control(stream).await?;
        }
    }

    /// Sends a fatal alert; `false` when it could not be sent.
    pub(super) async fn alert(&mut self, stream: &mut TcpStream, alert: AlertDescription) -> bool {
        match self.records.seal_alert(alert) {
            Ok(record) => write(stream, &record).await.is_ok(),
            Err(_) => false,
        }
    }

    async fn send_control(&mut self, stream: &mut TcpStream) -> Result<(), TunnelError> {
        match self.records.take_control() {
            Some(record) => write(stream, &record).await,
            None => Ok(()),
        }
    }

    /// Reads more ciphertext.
    async fn fill(&mut self, stream: &mut TcpStream) -> Result<(), TunnelError> {
        let missing = match *self.unread {
            [_, _, _, high, low, ..] => HEADER + usize::from(u16::from_be_bytes([high, low])),
            _ => HEADER,
        } - self.unread.len();
        match self.read_mode.read(stream, &mut self.unread, missing).await {
            Ok(0) => Err(super::truncated()),
            Ok(_) => Ok(()),
            Err(e) if e.kind() == ErrorKind::ConnectionReset => Err(super::reset()),
            Err(source) => Err(TunnelError::Io { action: "receiving from the tunnel", source }),
        }
    }
}
