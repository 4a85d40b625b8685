//! Records of the kernel, while the connection is still with tokio.

use std::{io, os::fd::AsFd as _};

use rustls::AlertDescription;
use tokio::{
    io::{AsyncWriteExt as _, Interest},
    net::TcpStream,
};

use super::{bad_record, ended_by, truncated};
use crate::{
    sys::tls::{self, Incoming},
    tunnel::{
        TunnelError,
        ktls::{Broken, Event, KernelTls},
        records::MAX_PLAINTEXT,
    },
};

pub(super) async fn send(ktls: &mut KernelTls, stream: &mut TcpStream, data: &[u8]) -> Result<(), TunnelError> {
    let mut rest = data;
    while !rest.is_empty() {
        while !ktls.refresh(stream.as_fd()).map_err(|e| broken("renewing the tunnel's key", e))? {
            stream.writable().await.map_err(sending)?;
        }
        let taken = stream.write(rest).await.map_err(sending)?;
        ktls.sent(taken);
        rest = &rest[taken..];
    }
    Ok(())
}

/// Appends data to `plaintext`, see [`super::Session::receive`].
pub(super) async fn receive(
    ktls: &mut KernelTls,
    stream: &mut TcpStream,
    plaintext: &mut Vec<u8>,
) -> Result<usize, TunnelError> {
    let mut buffer = vec![0; MAX_PLAINTEXT];
    loop {
        let incoming = next(stream, &mut buffer).await.map_err(receiving)?;
        let Incoming::Records { content_type, length } = incoming else { return Err(truncated()) };
        let event = ktls.received(stream.as_fd(), content_type, &buffer[..length]);
        match event.map_err(|e| broken("receiving a record", e))? {
            Event::Data if length > 0 => {
                plaintext.extend_from_slice(&buffer[..length]);
                return Ok(length);
            }
            Event::Data | Event::Control => {}
            Event::CloseNotify => return Ok(0),
            Event::Alert(description) => return Err(ended_by(description)),
        }
    }
}

/// Sends a fatal alert; `false` when it could not be sent.
pub(super) async fn alert(ktls: &mut KernelTls, stream: &mut TcpStream, alert: AlertDescription) -> bool {
    loop {
        match ktls.send_alert(stream.as_fd(), alert) {
            Ok(true) => return true,
            Ok(false) if stream.writable().await.is_ok() => {}
            _ => return false,
        }
    }
}

/// Waits for records.
pub(super) async fn next(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<Incoming> {
    stream.async_io(Interest::READABLE, || tls::receive(stream.as_fd(), buffer)).await
}

/// What an error of the socket says about the record.
pub(crate) fn from_kernel(error: io::Error) -> Broken {
    use crate::tunnel::records::RecordError;
    match error.raw_os_error() {
        Some(libc::EBADMSG) => RecordError::Decrypt.into(),
        Some(libc::EMSGSIZE | libc::EINVAL) => RecordError::Header.into(),
        _ => error.into(),
    }
}

fn receiving(error: io::Error) -> TunnelError {
    if error.kind() == io::ErrorKind::ConnectionReset {
        return super::reset();
    }
    broken("receiving a record", from_kernel(error))
}

fn sending(source: io::Error) -> TunnelError {
    TunnelError::Io { action: "sending into the tunnel", source }
}

fn broken(action: &'static str, error: Broken) -> TunnelError {
    match error {
        Broken::Record(error) => bad_record(action, error),
        Broken::Socket(source) => TunnelError::Io { action, source },
    }
}
