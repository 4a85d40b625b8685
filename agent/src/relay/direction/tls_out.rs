//! From the application into the tunnel: plaintext in, records out.

use super::{Fault, Phase, Step};
use crate::{
    relay::{
        buffers::{RecordQueue, Scratch},
        socket::{Read, Side},
    },
    tunnel::records::{MAX_PLAINTEXT, Records},
};

/// The direction towards the tunnel.
#[derive(Default)]
pub(in crate::relay) struct TlsOut {
    phase: Phase,
    held: RecordQueue,
}

impl TlsOut {
    /// Bytes held back.
    pub(in crate::relay) fn held(&self) -> usize {
        self.held.len()
    }

    /// Whether the end of the application's stream was read.
    pub(in crate::relay) fn read_all(&self) -> bool {
        self.phase != Phase::Open
    }

    /// Whether a record may still be sent at once: nothing is in the way, and the direction has not ended.
    pub(in crate::relay) fn is_clear(&self) -> bool {
        self.phase == Phase::Open && self.held.is_empty()
    }

    /// See the module.
    pub(in crate::relay) fn step(
        &mut self,
        application: &mut Side,
        tunnel: &mut Side,
        records: &mut Records,
        scratch: &mut Scratch,
    ) -> Result<Step, Fault> {
        if !self.held.is_empty() {
            if !self.held.flush(tunnel).map_err(Fault::Write)? {
                return Ok(Step::Blocked);
            }
            self.held = RecordQueue::default();
        }
        match self.phase {
            Phase::Open => {}
            Phase::Ending => return self.finish(tunnel),
            Phase::Done => return Ok(Step::Done),
        }
        // Taken, not borrowed: whatever a failure leaves in it must not reach another connection.
        let mut queue = std::mem::take(&mut scratch.records);
        let limit = scratch.plaintext_limit();
        let step = match application.read(&mut scratch.bytes[..limit]).map_err(Fault::Read)? {
            Read::Blocked => {
                // Asked only when nothing is held back, so a peer that keeps asking for new keys without reading
                // makes nothing grow.
                take_control(records, &mut queue);
                if queue.is_empty() {
                    scratch.records = queue;
                    return Ok(Step::Blocked);
                }
                Step::Moved(0)
            }
            Read::End => {
                take_control(records, &mut queue);
                queue.push(records.seal_close_notify()?);
                self.phase = Phase::Ending;
                Step::Moved(0)
            }
            Read::Data(length) => {
                for plaintext in scratch.bytes[..length].chunks(MAX_PLAINTEXT) {
                    take_control(records, &mut queue);
                    queue.push(records.seal(plaintext)?);
                }
                Step::Moved(length)
            }
        };
        if !queue.flush(tunnel).map_err(Fault::Write)? {
            self.held = queue;
            return Ok(step);
        }
        scratch.records = queue;
        if self.phase == Phase::Ending { self.finish(tunnel) } else { Ok(step) }
    }

    fn finish(&mut self, tunnel: &Side) -> Result<Step, Fault> {
        tunnel.finish().map_err(Fault::Write)?;
        self.phase = Phase::Done;
        Ok(Step::Done)
    }
}

/// Key updates go before whatever is sealed next: that is already under the new keys.
fn take_control(records: &mut Records, into: &mut RecordQueue) {
    while let Some(control) = records.take_control() {
        into.push(control);
    }
}
