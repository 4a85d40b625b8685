//! One socket of a connection: what epoll said about it, and the few operations the relay needs.

use std::{
    io::{self, ErrorKind, IoSlice, Read as _},
    net::Shutdown,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{SpliceFFlags, splice},
    sys::{
        epoll::EpollFlags,
        socket::{getsockopt, sockopt::TcpUserTimeout},
    },
};
use socket2::{Socket, TcpKeepalive};

use crate::sys::tls::{self, Incoming};

/// Neither the socket nor the pipe is waited for.
const SPLICE: SpliceFFlags = SpliceFFlags::SPLICE_F_MOVE.union(SpliceFFlags::SPLICE_F_NONBLOCK);

/// How long sent data may stay unacknowledged before a tunnel counts as dead.
const USER_TIMEOUT: Duration = Duration::from_secs(25);
/// Silence before the first keepalive probe.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
/// Between unanswered probes; with the two values around it a vanished node is noticed in 25 s.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// Unanswered probes that end a connection.
const KEEPALIVE_RETRIES: u32 = 3;

/// What a read gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// This many bytes, at least one.
    Data(usize),
    /// The peer's end of its direction.
    End,
    /// Nothing until the next event.
    Blocked,
}

/// A connected, non-blocking socket under edge-triggered epoll. Events are hints: they only allow an attempt, and the
/// attempt's result is what counts, so a stale or repeated event does no harm.
#[expect(clippy::struct_excessive_bools, reason = "independent facts, as epoll reports them")]
pub(super) struct Side {
    socket: Socket,
    /// A read may give something.
    readable: bool,
    /// A write may be taken.
    writable: bool,
    /// A FIN or an urgent mark is queued, at which reads stop: a short read does not mean that the queue is empty.
    marked: bool,
    /// The socket has a pending error.
    failed: bool,
    /// The kernel has taken bytes that nobody has yet seen delivered.
    undelivered: bool,
    /// `TCP_USER_TIMEOUT` in milliseconds, 0 for none.
    user_timeout: u32,
}

impl Side {
    /// What epoll has to report. `EPOLLHUP` and `EPOLLERR` come unasked.
    pub(super) const INTEREST: EpollFlags = EpollFlags::EPOLLIN
        .union(EpollFlags::EPOLLOUT)
        .union(EpollFlags::EPOLLPRI)
        .union(EpollFlags::EPOLLRDHUP)
        .union(EpollFlags::EPOLLET);

    /// A socket that is about to be registered: `EPOLL_CTL_ADD` reports what is already there.
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket: socket.into(),
            readable: false,
            writable: true,
            marked: false,
            failed: false,
            undelivered: false,
            user_timeout: 0,
        }
    }

    /// Takes note of an event.
    pub(super) fn note(&mut self, events: EpollFlags) {
        let over = EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP;
        let mark = EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLPRI;
        self.readable |= events.intersects(EpollFlags::EPOLLIN | mark | over);
        self.writable |= events.intersects(EpollFlags::EPOLLOUT | over);
        self.marked |= events.intersects(mark | over);
        self.failed |= events.contains(EpollFlags::EPOLLERR);
    }

    /// Whether the socket has reported an error (a reset, a timeout).
    pub(super) fn failed(&self) -> bool {
        self.failed
    }

    /// Whether a user timeout may run against bytes that the peer has not acknowledged.
    pub(super) fn is_timed(&self) -> bool {
        self.undelivered && self.user_timeout > 0
    }

    /// Takes note that everything written so far was acknowledged.
    pub(super) fn delivered(&mut self) {
        self.undelivered = false;
    }

    /// The socket's `TCP_USER_TIMEOUT` as its maker wanted it, in milliseconds, 0 for none.
    pub(super) fn user_timeout(&self) -> u32 {
        self.user_timeout
    }

    /// Makes the next read an attempt, event or not.
    pub(super) fn expect_data(&mut self) {
        self.readable = true;
        self.marked = true;
    }

    /// Reads what there is, at most `buffer`.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<Read> {
        while self.readable {
            match (&self.socket).read(buffer) {
                Ok(0) => {
                    self.readable = false;
                    return Ok(Read::End);
                }
                Ok(n) => {
                    // Less than was asked for: the queue is empty, and whatever comes later is a new edge.
                    self.readable = n == buffer.len() || self.marked;
                    return Ok(Read::Data(n));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Read::Blocked)
    }

    /// Writes what the kernel takes; 0 means nothing until the next event. `slices` must hold at least one byte.
    pub(super) fn write(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        while self.writable {
            match self.socket.send_vectored_with_flags(slices, libc::MSG_NOSIGNAL) {
                Ok(n) => {
                    self.undelivered = true;
                    return Ok(n);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(0)
    }

    /// Receives records that the kernel has opened: data, as much as `buffer` takes, or one other record. `Ok(None)`: nothing until the next event.
    pub(super) fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<Incoming>> {
        while self.readable {
            match tls::receive(self.as_fd(), buffer) {
                // However little it was: a record of another type may be next.
                Ok(incoming) => return Ok(Some(incoming)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Moves at most `most` bytes, or one record, into `pipe`. 0 means nothing until the next event; `EINVAL` that the next record is none of data, or
    /// that there is a FIN, which [`Self::receive`] tells apart.
    pub(super) fn splice_into(&mut self, pipe: BorrowedFd<'_>, most: usize) -> io::Result<usize> {
        while self.readable {
            match splice(self.as_fd(), None, pipe, None, most, SPLICE) {
                // FIN, or an empty record.
                Ok(0) => return Err(Errno::EINVAL.into()),
                Ok(n) => return Ok(n),
                Err(Errno::EAGAIN) => self.readable = false,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(0)
    }

    /// Moves `length` bytes, or what the kernel takes, out of `pipe`; 0 means nothing until the next event.
    pub(super) fn splice_from(&mut self, pipe: BorrowedFd<'_>, length: usize) -> io::Result<usize> {
        while self.writable {
            match splice(pipe, None, self.as_fd(), None, length, SPLICE) {
                Ok(n) => {
                    self.undelivered = true;
                    return Ok(n);
                }
                Err(Errno::EAGAIN) => self.writable = false,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(0)
    }

    /// Tries to send something else than data; `Ok(false)` when there is no room until the next event.
    pub(super) fn attempt<E>(&mut self, send: impl FnOnce(BorrowedFd<'_>) -> Result<bool, E>) -> Result<bool, E> {
        if !self.writable {
            return Ok(false);
        }
        self.writable = send(self.socket.as_fd())?;
        self.undelivered |= self.writable;
        Ok(self.writable)
    }

    /// Ends our direction: the kernel sends what it has, then FIN.
    pub(super) fn finish(&self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Write)
    }

    /// Small messages leave at once, and a byte sent as urgent stays in its place in the stream instead of being lost.
    pub(super) fn prepare(&mut self) -> io::Result<()> {
        self.socket.set_tcp_nodelay(true)?;
        self.socket.set_out_of_band_inline(true)?;
        self.user_timeout = getsockopt(&self.socket, TcpUserTimeout)?;
        Ok(())
    }

    /// What every tunnel has, so that a vanished node shows within 30 s. Dialled ones get it before the dial.
    pub(super) fn prepare_accepted_tunnel(&self) -> io::Result<()> {
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_RETRIES);
        self.socket.set_tcp_keepalive(&keepalive)?;
        self.socket.set_tcp_user_timeout(Some(USER_TIMEOUT))
    }

    /// From now on closing the socket, by us or by the kernel after our death, is a reset.
    pub(super) fn reset_on_close(&self) -> io::Result<()> {
        self.socket.set_linger(Some(Duration::ZERO))
    }

    /// From now on closing the socket leaves what is queued to the kernel to deliver, for as long as it does so for any
    /// program: the user timeout would cut off a peer that reads the rest slowly.
    pub(super) fn deliver_on_close(&self) -> io::Result<()> {
        if self.user_timeout > 0 {
            self.socket.set_tcp_user_timeout(None)?;
        }
        self.socket.set_linger(None)
    }

    /// The socket itself, for options.
    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }
}

impl AsFd for Side {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
