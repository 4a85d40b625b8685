//! What a request looks like: its own length and that of the answer, then anything.

/// Bytes that every request has at least.
pub(crate) const HEADER: usize = 12;
/// The answer's length that means: until the connection ends.
pub(crate) const ENDLESS: u64 = u64::MAX;

/// A request of `length` bytes (at least [`HEADER`]) that asks for `answer` bytes.
pub(crate) fn request(length: u32, answer: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length as usize);
    bytes.extend(length.to_be_bytes());
    bytes.extend(answer.to_be_bytes());
    bytes.resize(length as usize, 0);
    bytes
}

/// Takes requests in, in whatever pieces they come.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    header: [u8; HEADER],
    have: usize,
    /// Bytes of the request that are still to come behind the header.
    left: usize,
}

impl Reader {
    /// Takes bytes; the answer's length when they end a request. `Err` for what no client sends: a length too short, or more than one request.
    pub(crate) fn take(&mut self, mut bytes: &[u8]) -> Result<Option<u64>, &'static str> {
        if self.have < HEADER {
            let now = bytes.len().min(HEADER - self.have);
            self.header[self.have..self.have + now].copy_from_slice(&bytes[..now]);
            self.have += now;
            bytes = &bytes[now..];
            if self.have < HEADER {
                return Ok(None);
            }
            let (length, _) = self.header.split_at(4);
            let length = u32::from_be_bytes(length.try_into().expect("four bytes")) as usize;
            self.left = length.checked_sub(HEADER).ok_or("a request shorter than its header")?;
        }
        self.left = self.left.checked_sub(bytes.len()).ok_or("more than one request at a time")?;
        if self.left > 0 {
            return Ok(None);
        }
        self.have = 0;
        let (_, answer) = self.header.split_at(4);
        Ok(Some(u64::from_be_bytes(answer.try_into().expect("eight bytes"))))
    }
}

#[cfg(test)]
mod tests {
    use super::{Reader, request};

    #[test]
    fn requests_in_any_pieces() {
        let bytes = [request(64, 64), request(12, u64::MAX)].concat();
        for piece in [1, 3, 11, 12, 13, 64] {
            let mut reader = Reader::default();
            let requests = [&bytes[..64], &bytes[64..]];
            let pieces = requests.iter().flat_map(|request| request.chunks(piece));
            let answers: Vec<_> = pieces.filter_map(|piece| reader.take(piece).unwrap()).collect();
            assert_eq!(answers, [64, u64::MAX], "in pieces of {piece}");
        }
    }

    #[test]
    fn what_no_client_sends() {
        assert!(Reader::default().take(&[0; 12]).is_err(), "a length of 0");
        let two = [request(64, 64), request(64, 64)].concat();
        assert!(Reader::default().take(&two).is_err());
    }
}
