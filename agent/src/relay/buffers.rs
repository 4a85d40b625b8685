//! The buffers of a relay thread, and what a connection keeps of them while a peer does not take it.

use std::{io, io::IoSlice, ops::Range};

use super::{pipe::Pipes, socket::Side};
use crate::tunnel::records::{HEADER, MAX_PLAINTEXT, MAX_RECORD, TRAILER};

/// Slices in one write. 16 records of 16 KiB fill the default buffer; twice that leaves room for short ones.
const SLICES: usize = 32;
/// Pieces up to this many bytes are moved together instead of costing a slice each.
const SMALL: usize = 2048;
/// A full record that we make, bytes.
pub(super) const FULL_RECORD: usize = HEADER + MAX_PLAINTEXT + TRAILER;
/// Least buffer that can work: a partial record, and a read behind it.
pub(super) const MIN_BUFFER: usize = 2 * MAX_RECORD;

/// The working memory of one relay thread. Nothing in it outlives a step of a direction.
pub(super) struct Scratch {
    /// Room for one read.
    pub(super) bytes: Box<[u8]>,
    /// The plaintext in `bytes` after records were opened.
    pub(super) plaintext: Ranges,
    /// Pipes for splicing, all empty.
    pub(super) pipes: Pipes,
}

impl Scratch {
    /// Memory for reads of at most `buffer` bytes, which also bounds what a connection holds per direction.
    pub(super) fn new(buffer: usize) -> Self {
        let bytes = vec![0; buffer.max(MIN_BUFFER)].into_boxed_slice();
        Self { bytes, plaintext: Ranges::default(), pipes: Pipes::default() }
    }

    /// Full records that fit the buffer.
    pub(super) fn records(&self) -> usize {
        self.bytes.len() / FULL_RECORD
    }
}

/// Pieces of one buffer in order.
#[derive(Default)]
pub(super) struct Ranges {
    ranges: Vec<Range<usize>>,
}

impl Ranges {
    /// Forgets all pieces.
    pub(super) fn clear(&mut self) {
        self.ranges.clear();
    }

    /// Bytes in all pieces.
    pub(super) fn len(&self) -> usize {
        self.ranges.iter().map(ExactSizeIterator::len).sum()
    }

    /// Adds a piece of `bytes` that lies behind all others. A small one is moved up to its predecessor: what is between
    /// them is framing that has been dealt with.
    pub(super) fn push(&mut self, piece: Range<usize>, bytes: &mut [u8]) {
        match self.ranges.last_mut() {
            _ if piece.is_empty() => {}
            Some(last) if last.end <= piece.start && piece.len() <= SMALL => {
                let length = piece.len();
                bytes.copy_within(piece, last.end);
                last.end += length;
            }
            _ => self.ranges.push(piece),
        }
    }

    /// Writes all pieces; what `to` does not take is returned.
    pub(super) fn write(&self, bytes: &[u8], to: &mut Side) -> io::Result<Held> {
        let mut rest = &self.ranges[..];
        let mut done = 0;
        while let Some(first) = rest.first() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            slices[0] = IoSlice::new(&bytes[first.start + done..first.end]);
            let count = rest.len().min(SLICES);
            for (slice, range) in slices.iter_mut().zip(rest).skip(1) {
                *slice = IoSlice::new(&bytes[range.clone()]);
            }
            let mut taken = to.write(&slices[..count])?;
            if taken == 0 {
                return Ok(hold(bytes, rest, done));
            }
            while let Some(first) = rest.first() {
                let left = first.len() - done;
                if taken < left {
                    done += taken;
                    break;
                }
                taken -= left;
                done = 0;
                rest = &rest[1..];
            }
        }
        Ok(Held::default())
    }
}

/// Copies the pieces, without the first `done` bytes, which were taken.
fn hold(bytes: &[u8], pieces: &[Range<usize>], done: usize) -> Held {
    let mut held = Vec::with_capacity(pieces.iter().map(ExactSizeIterator::len).sum());
    for piece in pieces {
        held.extend_from_slice(&bytes[piece.clone()]);
    }
    Held { bytes: held, start: done }
}

/// Bytes that a peer has not taken yet.
#[derive(Default)]
pub(super) struct Held {
    bytes: Vec<u8>,
    start: usize,
}

impl From<Vec<u8>> for Held {
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, start: 0 }
    }
}

impl Held {
    /// Writes `data` and keeps what `to` does not take.
    pub(super) fn after_writing(mut data: &[u8], to: &mut Side) -> io::Result<Self> {
        while !data.is_empty() {
            let taken = to.write(&[IoSlice::new(data)])?;
            if taken == 0 {
                return Ok(Self::from(data.to_vec()));
            }
            data = &data[taken..];
        }
        Ok(Self::default())
    }

    /// Bytes left.
    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// What is left.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// The same without its first `taken` bytes; the memory is freed when nothing is left.
    pub(super) fn without(mut self, taken: usize) -> Self {
        self.start += taken;
        if self.start < self.bytes.len() { self } else { Self::default() }
    }

    /// Writes on; `true` when nothing is left, the memory then being freed.
    pub(super) fn flush(&mut self, to: &mut Side) -> io::Result<bool> {
        while self.start < self.bytes.len() {
            let taken = to.write(&[IoSlice::new(&self.bytes[self.start..])])?;
            if taken == 0 {
                return Ok(false);
            }
            self.start += taken;
        }
        *self = Self::default();
        Ok(true)
    }
}
