//! Pipes: where bytes are between two splices.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    unistd::pipe2,
};

/// Capacity, bytes. The kernel counts it in pages, and a record takes up to [`PAGES_PER_RECORD`] of them.
pub(super) const CAPACITY: usize = 256 * 1024;
/// Pages that a record of 16 KiB fills when it begins in the middle of one; some are made of smaller pieces.
const PAGES_PER_RECORD: usize = 8;
const PAGE: usize = 4096;
/// Records that surely fit. Kernels before 6.1.190 and 6.12.113 may lose bytes when a pipe is full, so it never is.
pub(super) const RECORDS: usize = CAPACITY / PAGE / PAGES_PER_RECORD;
/// Idle pipes that a thread keeps.
const KEPT: usize = 16;

/// A pipe, and how much is in it.
pub(super) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    /// Bytes in it.
    pub(super) held: usize,
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (read, write) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        fcntl(&write, FcntlArg::F_SETPIPE_SZ(i32::try_from(CAPACITY).map_err(io::Error::other)?))?;
        Ok(Self { read, write, held: 0 })
    }

    pub(super) fn read_end(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }

    pub(super) fn write_end(&self) -> BorrowedFd<'_> {
        self.write.as_fd()
    }
}

/// A thread's empty pipes.
#[derive(Default)]
pub(super) struct Pipes {
    idle: Vec<Pipe>,
    /// A pipe could not be made: not tried again before one comes back.
    exhausted: bool,
}

impl Pipes {
    /// An empty pipe, if there can be one.
    pub(super) fn take(&mut self) -> Option<Pipe> {
        if let Some(pipe) = self.idle.pop() {
            return Some(pipe);
        }
        if self.exhausted {
            return None;
        }
        match Pipe::new() {
            Ok(pipe) => Some(pipe),
            Err(error) => {
                tracing::warn!(%error, "no pipe for splicing (descriptors, or fs.pipe-user-pages-soft); bytes are copied instead");
                self.exhausted = true;
                None
            }
        }
    }

    /// Takes a pipe back, if it is empty; what another connection left in it must reach nobody.
    pub(super) fn put(&mut self, pipe: Pipe) {
        self.exhausted = false;
        if pipe.held == 0 && self.idle.len() < KEPT {
            self.idle.push(pipe);
        }
    }
}
