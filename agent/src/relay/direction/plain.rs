//! Bytes as they are, from one socket to the other.

use super::{Fault, Phase, Step};
use crate::relay::{
    buffers::{Held, Scratch},
    socket::{Read, Side},
};

/// One direction of a plain pass-through.
#[derive(Default)]
pub(in crate::relay) struct Plain {
    phase: Phase,
    held: Held,
}

impl Plain {
    /// Bytes held back.
    pub(in crate::relay) fn held(&self) -> usize {
        self.held.len()
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
        if !self.held.flush(to).map_err(Fault::Write)? {
            return Ok(Step::Blocked);
        }
        match self.phase {
            Phase::Open => {}
            Phase::Ending => return self.finish(to),
            Phase::Done => return Ok(Step::Done),
        }
        match from.read(&mut scratch.bytes).map_err(Fault::Read)? {
            Read::Blocked => Ok(Step::Blocked),
            Read::End => {
                self.phase = Phase::Ending;
                self.finish(to)
            }
            Read::Data(length) => {
                self.held = Held::after_writing(&scratch.bytes[..length], to).map_err(Fault::Write)?;
                Ok(Step::Moved(length))
            }
        }
    }

    fn finish(&mut self, to: &Side) -> Result<Step, Fault> {
        to.finish().map_err(Fault::Write)?;
        self.phase = Phase::Done;
        Ok(Step::Done)
    }
}
