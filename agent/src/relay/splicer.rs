//! Moves bulk from one socket to another through a pipe, without a copy here.
//!
//! Whether it is bulk is seen by how much is received at once: a receive of [`START`] starts splicing, rounds that move little end it.

use std::io;

use super::{
    pipe::{Pipe, Pipes},
    socket::Side,
};
use crate::tunnel::records::MAX_PLAINTEXT;

/// A receive of this much starts splicing, bytes.
const START: usize = 3 * MAX_PLAINTEXT;
/// A round of this much is bulk.
const ENOUGH: usize = MAX_PLAINTEXT;
/// So many rounds of less end it.
const PATIENCE: u8 = 4;

/// What a round of splicing came to.
pub(super) struct Filled {
    /// Bytes that are in the pipe now.
    pub(super) moved: usize,
    /// Why no more could be had: nothing for now, or what comes next is no data (`EINVAL`, an end among it), or the socket failed.
    pub(super) stopped: Option<io::Error>,
}

/// One direction's part of it.
#[derive(Default)]
pub(super) struct Splicer {
    /// Has bytes while the other side does not take them.
    pipe: Option<Pipe>,
    /// Rounds of little left; 0 is receiving.
    rounds: u8,
}

impl Splicer {
    /// Bytes on their way.
    pub(super) fn held(&self) -> usize {
        self.pipe.as_ref().map_or(0, |pipe| pipe.held)
    }

    /// Takes note of a receive.
    pub(super) fn received(&mut self, length: usize) {
        if length >= START {
            self.rounds = PATIENCE;
        }
    }

    /// Whether to splice rather than receive.
    pub(super) fn is_due(&self) -> bool {
        self.rounds > 0
    }

    /// Fills an empty pipe from `from`, at most `times` times `each` bytes. `None`: there is no pipe to be had.
    pub(super) fn fill(&mut self, from: &mut Side, pipes: &mut Pipes, times: usize, each: usize) -> Option<Filled> {
        let mut pipe = pipes.take()?;
        let mut stopped = None;
        for _ in 0..times {
            match from.splice_into(pipe.write_end(), each) {
                Ok(0) => break,
                Ok(length) => pipe.held += length,
                Err(error) => {
                    stopped = Some(error);
                    break;
                }
            }
        }
        let moved = pipe.held;
        self.rounds = if moved >= ENOUGH { PATIENCE } else { self.rounds - 1 };
        self.pipe = Some(pipe);
        Some(Filled { moved, stopped })
    }

    /// Empties the pipe; `true` when it is, and has been given back.
    pub(super) fn drain(&mut self, to: &mut Side, pipes: &mut Pipes) -> io::Result<bool> {
        let Some(mut pipe) = self.pipe.take() else { return Ok(true) };
        while pipe.held > 0 {
            let taken = to.splice_from(pipe.read_end(), pipe.held)?;
            if taken == 0 {
                self.pipe = Some(pipe);
                return Ok(false);
            }
            pipe.held -= taken;
        }
        pipes.put(pipe);
        Ok(true)
    }
}
