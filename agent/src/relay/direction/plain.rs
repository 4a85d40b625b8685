//! Bytes as they are, from one socket to the other: few are received and sent, many are spliced.

use std::io;

use super::{Fault, Phase, Step};
use crate::relay::{
    buffers::{Held, Scratch},
    pipe::CAPACITY,
    socket::{Read, Side},
    splicer::{Filled, Splicer},
};

/// One direction of a plain pass-through.
#[derive(Default)]
pub(in crate::relay) struct Plain {
    phase: Phase,
    held: Held,
    splicer: Splicer,
    /// The socket has failed behind what is on its way.
    lost: Option<io::Error>,
}

impl Plain {
    /// Bytes held back.
    pub(in crate::relay) fn held(&self) -> usize {
        self.held.len() + self.splicer.held()
    }

    /// Whether the end of the incoming stream was read.
    pub(in crate::relay) fn read_all(&self) -> bool {
        self.phase != Phase::Open
    }

    /// See the module.
    pub(in crate::relay) fn step(
        &mut self,
        from: &mut Side,
        to: &mut Side,
        scratch: &mut Scratch,
    ) -> Result<Step, Fault> {
        if !self.held.flush(to).map_err(Fault::Write)?
            || !self.splicer.drain(to, &mut scratch.pipes).map_err(Fault::Write)?
        {
            return Ok(Step::Blocked);
        }
        if let Some(error) = self.lost.take() {
            return Err(Fault::Read(error));
        }
        match self.phase {
            Phase::Open => {}
            Phase::Ending => return self.finish(to),
            Phase::Done => return Ok(Step::Done),
        }
        if self.splicer.is_due()
            && let Some(step) = self.splice(from, to, scratch)?
        {
            return Ok(step);
        }
        match from.read(&mut scratch.bytes).map_err(Fault::Read)? {
            Read::Blocked => Ok(Step::Blocked),
            Read::End => {
                self.phase = Phase::Ending;
                self.finish(to)
            }
            Read::Data(length) => {
                self.splicer.received(length);
                self.held = Held::after_writing(&scratch.bytes[..length], to).map_err(Fault::Write)?;
                Ok(Step::Moved(length))
            }
        }
    }

    /// Fills a pipe and empties it again. `None`: what comes next has to be received.
    fn splice(&mut self, from: &mut Side, to: &mut Side, scratch: &mut Scratch) -> Result<Option<Step>, Fault> {
        let most = CAPACITY.min(scratch.bytes.len());
        let Some(Filled { moved, stopped }) = self.splicer.fill(from, &mut scratch.pipes, 1, most) else {
            return Ok(None);
        };
        match stopped {
            None if moved == 0 => return Ok(Some(Step::Blocked)),
            Some(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
            lost => self.lost = lost,
        }
        self.splicer.drain(to, &mut scratch.pipes).map_err(Fault::Write)?;
        Ok(Some(Step::Moved(moved)))
    }

    fn finish(&mut self, to: &Side) -> Result<Step, Fault> {
        to.finish().map_err(Fault::Write)?;
        self.phase = Phase::Done;
        Ok(Step::Done)
    }
}
