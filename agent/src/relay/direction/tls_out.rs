//! From the application into the tunnel: plaintext in, records out.
//!
//! Plaintext is received where it will lie in its record, sealed there, and all records are sent together: nothing is copied on the way.

use std::io::{IoSlice, IoSliceMut};

use super::{Fault, Phase, Step};
use crate::{
    relay::{
        buffers::{FULL_RECORD, Held, Scratch},
        socket::{Read, Side},
    },
    tunnel::records::{HEADER, MAX_PLAINTEXT, Records, TRAILER},
};

/// Most records made of one read.
const RECORDS: usize = 16;
/// Reads of less than a full record until only one is read at a time again.
const PATIENCE: u8 = 4;

/// The direction towards the tunnel.
#[derive(Default)]
pub(in crate::relay) struct TlsOut {
    phase: Phase,
    held: Held,
    /// Reads of several records left without one that needed them; 0 is reading one at a time.
    bulk: u8,
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
        self.phase == Phase::Open && self.held.len() == 0
    }

    /// See the module.
    pub(in crate::relay) fn step(
        &mut self,
        application: &mut Side,
        tunnel: &mut Side,
        records: &mut Records,
        scratch: &mut Scratch,
    ) -> Result<Step, Fault> {
        if !self.held.flush(tunnel).map_err(Fault::Write)? {
            return Ok(Step::Blocked);
        }
        match self.phase {
            Phase::Open => {}
            Phase::Ending => return self.finish(tunnel),
            Phase::Done => return Ok(Step::Done),
        }
        // Before whatever is sealed next: that is already under the new keys. Asked only when nothing is held back, so a peer that
        // keeps asking for new keys without reading makes nothing grow.
        if let Some(control) = records.take_control() {
            self.held = Held::after_writing(&control, tunnel).map_err(Fault::Write)?;
            return Ok(Step::Moved(0));
        }
        match self.read(application, records, scratch).map_err(Fault::Read)? {
            Read::Blocked => Ok(Step::Blocked),
            Read::End => {
                let record = records.seal_close_notify()?;
                let taken = tunnel.write_before_end(&[IoSlice::new(&record)]).map_err(Fault::Write)?;
                self.phase = Phase::Ending;
                if taken == record.len() {
                    return self.finish(tunnel);
                }
                self.held = Held::from(record).without(taken);
                Ok(Step::Moved(0))
            }
            Read::Data(length) => {
                let sealed = seal(records, &mut scratch.bytes, length)?;
                self.held = Held::after_writing(&scratch.bytes[..sealed], tunnel).map_err(Fault::Write)?;
                Ok(Step::Moved(length))
            }
        }
    }

    /// Reads plaintext with room for a record's framing around each [`MAX_PLAINTEXT`] of it.
    fn read(&mut self, application: &mut Side, records: &Records, scratch: &mut Scratch) -> std::io::Result<Read> {
        let most = scratch.records().min(RECORDS).min(records.until_control());
        if self.bulk == 0 || most == 1 {
            let read = application.read(&mut scratch.bytes[HEADER..HEADER + MAX_PLAINTEXT])?;
            if read == Read::Data(MAX_PLAINTEXT) {
                self.bulk = PATIENCE;
            }
            return Ok(read);
        }
        let mut places: [_; RECORDS] = std::array::from_fn(|_| IoSliceMut::new(&mut []));
        for (place, record) in places.iter_mut().zip(scratch.bytes.chunks_exact_mut(FULL_RECORD)) {
            *place = IoSliceMut::new(&mut record[HEADER..HEADER + MAX_PLAINTEXT]);
        }
        let read = application.read_vectored(&mut places[..most])?;
        match read {
            Read::Data(length) if length > MAX_PLAINTEXT => self.bulk = PATIENCE,
            Read::Data(_) => self.bulk -= 1,
            Read::End | Read::Blocked => {}
        }
        Ok(read)
    }

    fn finish(&mut self, tunnel: &Side) -> Result<Step, Fault> {
        tunnel.finish().map_err(Fault::Write)?;
        self.phase = Phase::Done;
        Ok(Step::Done)
    }
}

/// Seals `length` bytes of plaintext where [`TlsOut::read`] left them; how many bytes the records are.
fn seal(records: &mut Records, bytes: &mut [u8], length: usize) -> Result<usize, Fault> {
    let mut rest = length;
    let mut sealed = 0;
    for place in bytes.chunks_exact_mut(FULL_RECORD) {
        if rest == 0 {
            break;
        }
        let plaintext = rest.min(MAX_PLAINTEXT);
        let record = &mut place[..HEADER + plaintext + TRAILER];
        records.seal_in_place(record)?;
        rest -= plaintext;
        sealed += record.len();
    }
    Ok(sealed)
}
