//! Bytes and descriptors over a Unix stream socket.

use std::{
    io,
    net::Shutdown,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::MsgFlags,
};
use serde::{Serialize, de::DeserializeOwned};

use super::LIMIT;
use crate::descriptors;

pub(super) fn encode(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let bytes = serde_json::to_vec(value)?;
    if bytes.len() > LIMIT {
        let reason = format!("{} bytes, and at most {LIMIT} can be sent", bytes.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    Ok(bytes)
}

/// `what` is named in errors.
pub(super) fn decode<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> io::Result<T> {
    serde_json::from_slice(bytes).map_err(|error| {
        if bytes.is_empty() {
            return io::Error::new(io::ErrorKind::UnexpectedEof, format!("the connection ended without {what}"));
        }
        if error.is_eof() {
            let reason = format!("the connection ended in the middle of the {what}");
            return io::Error::new(io::ErrorKind::UnexpectedEof, reason);
        }
        io::Error::new(io::ErrorKind::InvalidData, format!("no valid {what}: {error}"))
    })
}

/// Sends all bytes, the descriptor with the first, then shuts down the direction.
pub(super) fn send(stream: &UnixStream, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let deadline = Deadline::after(stream.write_timeout()?);
    let mut sent = 0;
    while sent < bytes.len() {
        deadline.wait(stream, PollFlags::POLLOUT)?;
        let with = if sent == 0 { descriptor.as_slice() } else { &[] };
        match descriptors::send(stream, &bytes[sent..], with, MsgFlags::MSG_DONTWAIT) {
            Ok(count) => sent += count,
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    stream.shutdown(Shutdown::Write)
}

/// Everything until the sender shuts down its direction, and the first descriptor that came with it.
pub(super) fn receive(stream: &UnixStream) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let deadline = Deadline::after(stream.read_timeout()?);
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    let mut first = None;
    loop {
        deadline.wait(stream, PollFlags::POLLIN)?;
        let (count, descriptors) = match descriptors::receive(stream, &mut chunk, MsgFlags::MSG_DONTWAIT) {
            Ok(received) => received,
            Err(Errno::EAGAIN | Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        };
        for descriptor in descriptors {
            first.get_or_insert(descriptor);
        }
        if count == 0 {
            return Ok((bytes, first));
        }
        bytes.extend_from_slice(&chunk[..count]);
        if bytes.len() > LIMIT {
            let reason = format!("more than {LIMIT} bytes came");
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
    }
}

/// A limit for a whole exchange. A socket's own timeout starts anew with every byte that trickles in.
struct Deadline(Option<Instant>);

impl Deadline {
    fn after(limit: Option<Duration>) -> Self {
        Self(limit.map(|limit| Instant::now() + limit))
    }

    fn wait(&self, stream: &UnixStream, what: PollFlags) -> io::Result<()> {
        loop {
            let timeout = match self.0.map(|end| end.saturating_duration_since(Instant::now())) {
                None => PollTimeout::NONE,
                Some(Duration::ZERO) => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "no end of it came in time"));
                }
                // Rounded up: zero would spin. A limit of more than 24 days is waited for in parts.
                Some(rest) => PollTimeout::try_from(rest.as_millis() + 1).unwrap_or(PollTimeout::MAX),
            };
            match poll(&mut [PollFd::new(stream.as_fd(), what)], timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}
