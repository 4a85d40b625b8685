//! One socket of a connection: what epoll said about it, and the few operations the relay needs.

use std::{
    io::{self, ErrorKind, IoSlice, IoSliceMut, Read as _},
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
use socket2::Socket;

use crate::sys::tls::{self, Incoming};

/// Neither the socket nor the pipe is waited for.
const SPLICE: SpliceFFlags = SpliceFFlags::SPLICE_F_MOVE.union(SpliceFFlags::SPLICE_F_NONBLOCK);

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
    /// Closing is a reset.
    lingers: bool,
}

impl Side {
    /// What epoll has to report. `EPOLLHUP` and `EPOLLERR` come unasked.
    pub(super) const INTEREST: EpollFlags = EpollFlags::EPOLLIN
        .union(EpollFlags::EPOLLOUT)
        .union(EpollFlags::EPOLLPRI)
        .union(EpollFlags::EPOLLRDHUP)
        .union(EpollFlags::EPOLLET);

    /// A socket that is about to be registered: `EPOLL_CTL_ADD` reports what is already there. `lingers`: it has `SO_LINGER {1,0}`.
    pub(super) fn new(socket: OwnedFd, lingers: bool) -> Self {
        Self {
            socket: socket.into(),
            readable: false,
            writable: true,
            marked: false,
            failed: false,
            undelivered: false,
            user_timeout: 0,
            lingers,
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
        let room = buffer.len();
        self.read_by(room, |mut socket| socket.read(buffer))
    }

    /// The same into several buffers, filled one after the other.
    pub(super) fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<Read> {
        let room = buffers.iter().map(|buffer| buffer.len()).sum();
        self.read_by(room, |mut socket| socket.read_vectored(buffers))
    }

    fn read_by(&mut self, room: usize, mut read: impl FnMut(&Socket) -> io::Result<usize>) -> io::Result<Read> {
        while self.readable {
            match read(&self.socket) {
                Ok(0) => {
                    self.readable = false;
                    return Ok(Read::End);
                }
                Ok(n) => {
                    // Less than was asked for: the queue is empty, and whatever comes later is a new edge.
                    self.readable = n == room || self.marked;
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
        self.send(slices, libc::MSG_NOSIGNAL)
    }

    /// The same before [`Self::finish`]: what is taken may wait for the FIN, so that both leave in one segment.
    pub(super) fn write_before_end(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.send(slices, libc::MSG_NOSIGNAL | libc::MSG_MORE)
    }

    fn send(&mut self, slices: &[IoSlice<'_>], flags: libc::c_int) -> io::Result<usize> {
        while self.writable {
            match self.socket.send_vectored_with_flags(slices, flags) {
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

    /// Holds small segments back until [`Self::finish`], so that the last record and the FIN leave in one.
    pub(super) fn cork(&self) -> io::Result<()> {
        self.socket.set_tcp_cork(true)
    }

    /// Looks at what the proxy set. What every socket of the relay has (no delay, urgent bytes in line, for tunnels the timeouts) was set by whoever made
    /// it, or its listener.
    pub(super) fn prepare(&mut self) -> io::Result<()> {
        self.user_timeout = getsockopt(&self.socket, TcpUserTimeout)?;
        Ok(())
    }

    /// From now on closing the socket, by us or by the kernel after our death, is a reset.
    pub(super) fn reset_on_close(&mut self) -> io::Result<()> {
        if !self.lingers {
            self.socket.set_linger(Some(Duration::ZERO))?;
            self.lingers = true;
        }
        Ok(())
    }

    /// From now on closing the socket leaves what is queued to the kernel to deliver, for as long as it does so for any
    /// program: the user timeout would cut off a peer that reads the rest slowly.
    pub(super) fn deliver_on_close(&mut self) -> io::Result<()> {
        if self.user_timeout > 0 {
            self.socket.set_tcp_user_timeout(None)?;
        }
        if self.lingers {
            self.socket.set_linger(None)?;
            self.lingers = false;
        }
        Ok(())
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
