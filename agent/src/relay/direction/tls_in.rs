//! From the tunnel to the application: records in, plaintext out.

use rustls::AlertDescription;

use super::{Fault, Phase, Step};
use crate::{
    relay::{
        buffers::{Held, Scratch},
        socket::{Read, Side},
    },
    tunnel::records::{MAX_RECORD, Opened, RecordError, Records},
};

/// Reads spent on looking for an alert in a tunnel that no longer takes anything.
const LAST_READS: usize = 8;

/// The direction from the tunnel.
pub(in crate::relay) struct TlsIn {
    phase: Phase,
    /// Ciphertext read but not opened: the start of one record, or whatever came with the hand-over.
    ciphertext: Vec<u8>,
    /// Whether `ciphertext` may hold a complete record.
    unopened: bool,
    held: Held,
}

/// What came out of one read.
struct Batch {
    plaintext: usize,
    /// What ends the direction after this plaintext.
    fault: Option<Fault>,
}

impl TlsIn {
    /// Starts behind a handshake, with the ciphertext and the plaintext it read too much.
    pub(in crate::relay) fn new(unread: Vec<u8>, plaintext: Vec<u8>) -> Self {
        let unopened = !unread.is_empty();
        Self { phase: Phase::Open, ciphertext: unread, unopened, held: Held::from(plaintext) }
    }

    /// Bytes held back.
    pub(in crate::relay) fn held(&self) -> usize {
        self.held.len() + self.ciphertext.len()
    }

    /// Whether the peer's authenticated end was read.
    pub(in crate::relay) fn read_all(&self) -> bool {
        self.phase != Phase::Open
    }

    /// See the module.
    pub(in crate::relay) fn step(
        &mut self,
        tunnel: &mut Side,
        application: &mut Side,
        records: &mut Records,
        scratch: &mut Scratch,
    ) -> Result<Step, Fault> {
        if !self.held.flush(application).map_err(Fault::Write)? {
            return Ok(Step::Blocked);
        }
        match self.phase {
            Phase::Open => {}
            Phase::Ending => return self.finish(application),
            Phase::Done => return Ok(Step::Done),
        }
        let Some(batch) = self.receive(tunnel, records, scratch)? else { return Ok(Step::Blocked) };
        self.held = scratch.plaintext.write(&scratch.bytes, application).map_err(Fault::Write)?;
        match batch.fault {
            Some(fault) => Err(fault),
            None => Ok(Step::Moved(batch.plaintext)),
        }
    }

    /// Looks for the alert with which the peer explained why it no longer takes anything. Data on the way is dropped: the connection
    /// is over.
    pub(in crate::relay) fn last_words(
        &mut self,
        tunnel: &mut Side,
        records: &mut Records,
        scratch: &mut Scratch,
    ) -> Option<AlertDescription> {
        tunnel.expect_data();
        for _ in 0..LAST_READS {
            match self.receive(tunnel, records, scratch) {
                Ok(Some(Batch { fault: Some(Fault::Alert(alert)), .. })) => return Some(alert),
                Ok(Some(Batch { fault: None, .. })) if self.phase == Phase::Open => {}
                _ => return None,
            }
        }
        None
    }

    /// Reads once and opens every complete record, leaving the plaintext in `scratch`. `None` when there is nothing to read.
    fn receive(
        &mut self,
        tunnel: &mut Side,
        records: &mut Records,
        scratch: &mut Scratch,
    ) -> Result<Option<Batch>, Fault> {
        scratch.plaintext.clear();
        let start = self.ciphertext.len().min(scratch.bytes.len());
        let filled = if self.unopened {
            scratch.bytes[..start].copy_from_slice(&self.ciphertext[..start]);
            start
        } else {
            // The whole, leftover included, never exceeds the buffer, and so neither does what may have to be held back.
            match tunnel.read(&mut scratch.bytes[start..]).map_err(Fault::Read)? {
                Read::Blocked => return Ok(None),
                Read::End => return Err(Fault::Truncated),
                Read::Data(length) => {
                    scratch.bytes[..start].copy_from_slice(&self.ciphertext);
                    start + length
                }
            }
        };
        let (opened, fault) = self.open(records, scratch, filled);
        let batch = Batch { plaintext: scratch.plaintext.len(), fault };
        if self.unopened {
            self.ciphertext.drain(..opened);
            // Only a hand-over larger than the buffer takes more than one round.
            self.unopened = opened > 0 && filled == scratch.bytes.len();
        } else {
            self.ciphertext.clear();
            self.ciphertext.extend_from_slice(&scratch.bytes[opened..filled]);
        }
        if self.phase != Phase::Open || self.ciphertext.is_empty() {
            self.ciphertext = Vec::new();
            self.unopened = false;
        } else if !self.unopened && self.ciphertext.len() >= MAX_RECORD && batch.fault.is_none() {
            return Err(RecordError::Header.into());
        }
        Ok(Some(batch))
    }

    /// Opens the records in the first `filled` bytes; how many bytes they were, and what ends the direction, if anything.
    fn open(&mut self, records: &mut Records, scratch: &mut Scratch, filled: usize) -> (usize, Option<Fault>) {
        let mut at = 0;
        while at < filled {
            let (opened, length) = match records.open(&mut scratch.bytes[at..filled]) {
                Ok(Some(record)) => record,
                Ok(None) => break,
                Err(error) => return (at, Some(error.into())),
            };
            match opened {
                Opened::Data(range) => {
                    scratch.plaintext.push(at + range.start..at + range.end, &mut scratch.bytes);
                }
                Opened::Control => {}
                Opened::CloseNotify => {
                    // Whatever follows is not authenticated to belong to the stream, and is ignored.
                    self.phase = Phase::Ending;
                    return (filled, None);
                }
                Opened::Alert(alert) => return (at, Some(Fault::Alert(alert))),
            }
            at += length;
        }
        (at, None)
    }

    fn finish(&mut self, application: &Side) -> Result<Step, Fault> {
        application.finish().map_err(Fault::Write)?;
        self.phase = Phase::Done;
        Ok(Step::Done)
    }
}
