//! The bytes of one direction of one connection, made again at the other end and compared there.

use std::fmt;

use rand::{RngCore, SeedableRng, rngs::StdRng};

use super::plan::{Side, mix};

/// Bytes made at once. A generator gives other bytes when asked for other lengths, so this is part of what they are.
const BLOCK: usize = 4096;
/// Bytes of a mismatch that are looked for elsewhere in the stream.
const SAMPLE: usize = 16;
/// How far behind the mismatch, bytes.
const AHEAD: usize = 4 << 20;

/// An endless stream of bytes: another one for every seed, connection and side that sends.
pub struct Source {
    rng: StdRng,
    block: [u8; BLOCK],
    used: usize,
}

impl Source {
    /// The stream from its first byte.
    pub fn new(seed: u64, number: u64, sender: Side) -> Self {
        let rng = StdRng::seed_from_u64(mix(&[seed, number, sender as u64]));
        Self { rng, block: [0; BLOCK], used: BLOCK }
    }

    /// The next bytes.
    pub fn fill(&mut self, mut into: &mut [u8]) {
        while !into.is_empty() {
            let length = into.len().min(self.ready().len());
            let (now, later) = into.split_at_mut(length);
            now.copy_from_slice(&self.ready()[..length]);
            self.used += length;
            into = later;
        }
    }

    /// At least one byte that comes next, not yet taken.
    fn ready(&mut self) -> &[u8] {
        if self.used == BLOCK {
            self.rng.fill_bytes(&mut self.block);
            self.used = 0;
        }
        &self.block[self.used..]
    }
}

/// Compares what arrives with what was to come.
pub struct Verifier {
    key: (u64, u64, Side),
    source: Source,
    /// Bytes that were right.
    verified: u64,
}

/// The first byte that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// Its position in the stream.
    pub at: u64,
    /// Where the bytes that came instead belong, if they are from the same stream.
    pub belongs: Option<u64>,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "byte {} is wrong: ", self.at)?;
        match self.belongs {
            Some(place) if place > self.at => write!(f, "{} bytes are missing or come later", place - self.at),
            Some(place) => write!(f, "bytes from {place} on came again"),
            None => f.write_str("what came instead is from nowhere near in this stream"),
        }
    }
}

impl Verifier {
    /// For what `sender` sends on a connection.
    pub fn new(seed: u64, number: u64, sender: Side) -> Self {
        Self { key: (seed, number, sender), source: Source::new(seed, number, sender), verified: 0 }
    }

    /// Bytes that were right so far.
    pub fn verified(&self) -> u64 {
        self.verified
    }

    /// Takes the next bytes that arrived.
    pub fn check(&mut self, arrived: &[u8]) -> Result<(), Mismatch> {
        let mut rest = arrived;
        while !rest.is_empty() {
            let expected = self.source.ready();
            let length = rest.len().min(expected.len());
            let wrong = rest[..length].iter().zip(expected).position(|(a, b)| a != b);
            let right = wrong.unwrap_or(length);
            self.source.used += right;
            self.verified += right as u64;
            rest = &rest[right..];
            if wrong.is_some() {
                return Err(Mismatch { at: self.verified, belongs: self.place(rest) });
            }
        }
        Ok(())
    }

    /// Where `bytes` are in the stream, if they are many enough to tell.
    fn place(&self, bytes: &[u8]) -> Option<u64> {
        let (seed, number, sender) = self.key;
        let sample = bytes.get(..SAMPLE)?;
        let mut all = vec![0; self.verified as usize + AHEAD];
        Source::new(seed, number, sender).fill(&mut all);
        memchr::memmem::find(&all, sample).map(|place| place as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::{Mismatch, Side, Source, Verifier};

    /// The first bytes of what the client sends on connection 7.
    fn stream(length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        Source::new(1, 7, Side::Client).fill(&mut bytes);
        bytes
    }

    /// What the verifier says when it gets `bytes` in pieces of `piece`.
    fn verify(bytes: &[u8], piece: usize) -> Result<u64, Mismatch> {
        let mut verifier = Verifier::new(1, 7, Side::Client);
        bytes.chunks(piece).try_for_each(|part| verifier.check(part))?;
        Ok(verifier.verified())
    }

    #[test]
    fn the_same_bytes_pass_however_they_are_cut() {
        let bytes = stream(20_000);
        for piece in [1, 7, 4096, 5000, 20_000] {
            assert_eq!(verify(&bytes, piece), Ok(20_000));
        }
        let mut cut = vec![0; 20_000];
        let mut source = Source::new(1, 7, Side::Client);
        cut.chunks_mut(333).for_each(|part| source.fill(part));
        assert!(cut == bytes);
    }

    #[test]
    fn a_lost_byte_is_noticed_wherever_it_was() {
        for at in [0, 1, 4095, 4096, 9_999] {
            let mut bytes = stream(20_000);
            bytes.remove(at);
            for piece in [1, 1000, 20_000] {
                let found = verify(&bytes, piece).unwrap_err();
                // Two neighbours may be equal: then the second one counts as lost.
                assert!((at as u64..at as u64 + 3).contains(&found.at), "{found}");
            }
            let whole = verify(&bytes, 20_000).unwrap_err();
            assert_eq!(whole.belongs, Some(whole.at + 1), "{whole}");
        }
    }

    #[test]
    fn a_lost_record_a_repeated_one_and_two_swapped_ones_are_noticed_and_told_apart() {
        let bytes = stream(100_000);
        let (one, two, three) = (&bytes[..16_384], &bytes[16_384..32_768], &bytes[32_768..49_152]);
        let lost = verify(&[one, three].concat(), 1 << 16).unwrap_err();
        assert_eq!(lost, Mismatch { at: 16_384, belongs: Some(32_768) });
        let repeated = verify(&[one, two, two, three].concat(), 1 << 16).unwrap_err();
        assert_eq!(repeated, Mismatch { at: 32_768, belongs: Some(16_384) });
        let swapped = verify(&[one, three, two].concat(), 1 << 16).unwrap_err();
        assert_eq!(swapped, Mismatch { at: 16_384, belongs: Some(32_768) });
    }

    #[test]
    fn a_repeated_byte_two_swapped_bytes_and_a_changed_bit_are_noticed() {
        let bytes = stream(10_000);
        // A place whose neighbours differ, so that the change is one.
        let at = (5_000..9_000).find(|&at| bytes[at] != bytes[at + 1]).unwrap();
        let mut repeated = bytes.clone();
        repeated.insert(at, bytes[at]);
        assert_eq!(verify(&repeated, 10_001).unwrap_err().at, at as u64 + 1);
        let mut swapped = bytes.clone();
        swapped.swap(at, at + 1);
        assert_eq!(verify(&swapped, 100).unwrap_err().at, at as u64);
        let mut changed = bytes;
        changed[9_999] ^= 1;
        assert_eq!(verify(&changed, 4096).unwrap_err(), Mismatch { at: 9_999, belongs: None });
    }

    #[test]
    fn bytes_of_another_connection_or_of_the_other_direction_are_noticed() {
        for (seed, number, sender) in [(2, 7, Side::Client), (1, 8, Side::Client), (1, 7, Side::Server)] {
            let mut bytes = [0; 64];
            Source::new(seed, number, sender).fill(&mut bytes);
            let found = verify(&bytes, 64).unwrap_err();
            assert!(found.at < 4 && found.belongs.is_none(), "{found}");
        }
    }
}
