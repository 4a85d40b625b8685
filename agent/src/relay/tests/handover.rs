//! Bytes that arrived before the relay took over.

use std::io::Write;

use super::*;
use crate::tunnel::records::Records;

/// What a peer sent: some plaintext was already opened, then records of several kinds.
struct Recorded {
    ours: Records,
    wire: Vec<u8>,
    expected: Vec<u8>,
}

fn record() -> Recorded {
    let (ours, mut theirs) = testing::pair();
    theirs.limit_for_tests(3, u64::MAX);
    let mut expected = b"behind the header;".to_vec();
    let mut wire = Vec::new();
    for data in [b"first;".as_slice(), b"", b"second record;", b"third;", b"x"] {
        wire.extend(theirs.take_control().unwrap_or_default());
        wire.extend(theirs.seal(data).expect("a record"));
        expected.extend_from_slice(data);
    }
    wire.extend(theirs.seal_close_notify().expect("a record"));
    Recorded { ours, wire, expected }
}

/// Wherever the hand-over cuts the stream, and wherever the rest is cut again, the application gets the same bytes.
#[test]
fn every_split_point() {
    let mut random = StdRng::seed_from_u64(seed());
    let node = Node::new();
    let length = record().wire.len();
    for split in 0..=length {
        let Recorded { ours, wire, expected } = record();
        let (a, b) = sockets();
        let plaintext = b"behind the header;".to_vec();
        let unread = wire[..split].to_vec();
        let (application, watched) = node.user_tunnel(Direction::Inbound, a, ours, unread, plaintext);
        let again = random.random_range(split..=length);
        for piece in [&wire[split..again], &wire[again..]] {
            (&b).write_all(piece).expect("sending");
        }
        assert_eq!(read_all(&application), (expected, Ok(())), "split at {split} and {again}");
        application.shutdown(Shutdown::Write).expect("ending");
        assert_eq!(watched.ended(), CloseReason::Finished);
    }
}

/// More than a buffer's worth in both forms.
#[test]
fn a_large_hand_over() {
    let seed = seed();
    let node = Node::with(&RelayOptions { threads: 1, buffer: 0 });
    for cut in [0, 1, 1000] {
        let (ours, mut theirs) = testing::pair();
        let expected = expected(seed, 1_500_000);
        let (plaintext, sealed) = expected.split_at(500_000);
        let mut wire: Vec<u8> = sealed.chunks(1000).flat_map(|c| theirs.seal(c).expect("a record")).collect();
        wire.extend(theirs.seal_close_notify().expect("a record"));
        let rest = wire.split_off(wire.len() - cut);
        let (a, mut b) = sockets();
        let (application, watched) = node.user_tunnel(Direction::Inbound, a, ours, wire, plaintext.to_vec());
        b.write_all(&rest).expect("sending");
        let (got, end) = read_all(&application);
        assert_eq!(end, Ok(()));
        assert!(got == expected, "lost or changed bytes, seed {seed}");
        drop(application);
        assert_eq!(watched.ended(), CloseReason::Finished);
    }
}

/// Leftovers that are no record at all end the connection instead of waiting for more.
#[test]
fn a_broken_hand_over() {
    let node = Node::new();
    let (ours, _) = testing::pair();
    let (a, _b) = sockets();
    let (application, watched) = node.user_tunnel(Direction::Inbound, a, ours, b"plaintext".to_vec(), Vec::new());
    assert_reset(&application);
    assert_eq!(watched.ended(), CloseReason::BadRecord);
}
