//! Talking to the node's agent, within a time that is known beforehand.

use std::{
    io,
    os::{
        fd::{AsRawFd as _, BorrowedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt::SendTimeout},
        time::TimeVal,
    },
};

use crate::protocol::{self, Answer, Command, Request};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoAnswer {
    /// No agent runs, or it ended meanwhile. The projection speaks for it.
    #[error("the Underpass agent is not running on this node ({0})")]
    Absent(io::Error),
    /// Something is there. What the projection says may be older than what that knows.
    #[error("the Underpass agent on this node does not answer: {0}")]
    Broken(io::Error),
}

/// Asks once. All of it takes at most `limit`.
pub(super) fn ask(
    path: &Path,
    command: Command,
    netns: Option<BorrowedFd<'_>>,
    limit: Duration,
) -> Result<Answer, NoAnswer> {
    let end = Instant::now() + limit;
    exchange(path, &Request::new(command), netns, end).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound
        | io::ErrorKind::ConnectionRefused
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::UnexpectedEof => NoAnswer::Absent(error),
        io::ErrorKind::TimedOut => NoAnswer::Broken(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no answer within {:.1} s", limit.as_secs_f32()),
        )),
        _ => NoAnswer::Broken(error),
    })
}

fn exchange(path: &Path, request: &Request, netns: Option<BorrowedFd<'_>>, end: Instant) -> io::Result<Answer> {
    let stream = open(path, end)?;
    stream.set_write_timeout(Some(remaining(end)?))?;
    protocol::send_request(&stream, request, netns)?;
    stream.set_read_timeout(Some(remaining(end)?))?;
    protocol::receive_answer(&stream)
}

/// Connects. The standard library's would wait without end for an agent that is stopped and has a full queue.
fn open(path: &Path, end: Instant) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let limit = remaining(end)?;
    let limit = TimeVal::new(
        i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        // Not zero, which would be no limit.
        i64::from(limit.subsec_micros().max(1)),
    );
    setsockopt(&socket, SendTimeout, &limit)?;
    match connect(socket.as_raw_fd(), &address) {
        Ok(()) => Ok(UnixStream::from(socket)),
        Err(Errno::EAGAIN) => Err(io::ErrorKind::TimedOut.into()),
        Err(error) => Err(error.into()),
    }
}

fn remaining(end: Instant) -> io::Result<Duration> {
    let rest = end.saturating_duration_since(Instant::now());
    if rest.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(rest) }
}
