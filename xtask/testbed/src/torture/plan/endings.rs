//! Every way in which the two ends of a connection can leave it, in every order, with nothing, little and much on the way.

use std::{sync::LazyLock, time::Duration};

use super::{Act, Buffers, Reads, SidePlan, Trigger, Writes, mix};

/// Bytes that an end sends: none, one, what fits every buffer, and more than fits the socket buffers set here and the agents' together.
const SIZES: [u64; 4] = [0, 1, 60_000, 400_000];
/// Socket buffers of ends that read late, bytes.
const SMALL: usize = 8192;
/// How late they read.
const LATE: Duration = Duration::from_millis(30);

/// How an end leaves.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leave {
    HalfClose,
    HalfCloseAfterPeer,
    Reset,
    ResetWhileReceiving,
    ResetAfterPeer,
    HalfCloseThenReset,
    HalfCloseThenResetWhileReceiving,
    HalfCloseThenResetAfterPeer,
    Close,
    CloseWhileReceiving,
}

const LEAVES: [Leave; 10] = [
    Leave::HalfClose,
    Leave::HalfCloseAfterPeer,
    Leave::Reset,
    Leave::ResetWhileReceiving,
    Leave::ResetAfterPeer,
    Leave::HalfCloseThenReset,
    Leave::HalfCloseThenResetWhileReceiving,
    Leave::HalfCloseThenResetAfterPeer,
    Leave::Close,
    Leave::CloseWhileReceiving,
];

impl Leave {
    /// Whether nothing comes from this end before the other's end.
    fn waits(self) -> bool {
        matches!(self, Self::HalfCloseAfterPeer | Self::ResetAfterPeer)
    }

    fn needs_data(self) -> bool {
        matches!(self, Self::ResetWhileReceiving | Self::HalfCloseThenResetWhileReceiving | Self::CloseWhileReceiving)
    }

    /// Half-close and last act; the other end sends `coming` bytes.
    fn steps(self, coming: u64) -> (Option<Trigger>, Option<(Act, Trigger)>) {
        let received = Trigger::Received(coming.div_ceil(2));
        match self {
            Self::HalfClose => (Some(Trigger::Sent), None),
            Self::HalfCloseAfterPeer => (Some(Trigger::PeerEnd), None),
            Self::Reset => (None, Some((Act::Reset, Trigger::Sent))),
            Self::ResetWhileReceiving => (None, Some((Act::Reset, received))),
            Self::ResetAfterPeer => (None, Some((Act::Reset, Trigger::PeerEnd))),
            Self::HalfCloseThenReset => (Some(Trigger::Sent), Some((Act::Reset, Trigger::Sent))),
            Self::HalfCloseThenResetWhileReceiving => (Some(Trigger::Sent), Some((Act::Reset, received))),
            Self::HalfCloseThenResetAfterPeer => (Some(Trigger::Sent), Some((Act::Reset, Trigger::PeerEnd))),
            Self::Close => (None, Some((Act::Close, Trigger::Sent))),
            Self::CloseWhileReceiving => (None, Some((Act::Close, received))),
        }
    }
}

/// One end: how it leaves, and how much it sends.
type End = (Leave, u64);

static CASES: LazyLock<Vec<([End; 2], bool)>> = LazyLock::new(|| {
    let mut cases = Vec::new();
    for client in LEAVES {
        for server in LEAVES {
            for up in SIZES {
                for down in SIZES {
                    let hangs = client.waits() && server.waits();
                    let void = client.needs_data() && down == 0 || server.needs_data() && up == 0;
                    if !hangs && !void {
                        cases.extend([false, true].map(|late| ([(client, up), (server, down)], late)));
                    }
                }
            }
        }
    }
    cases
});

pub(super) fn count() -> u64 {
    CASES.len() as u64
}

/// Number `number` of all, from the start again when there are no more.
pub(super) fn sides(seed: u64, number: u64) -> [SidePlan; 2] {
    let (ends, late) = CASES[(number % count()) as usize];
    [0, 1].map(|side: usize| {
        let ((leave, total), (_, coming)) = (ends[side], ends[1 - side]);
        let (half_close, last) = leave.steps(coming);
        let small = late.then_some(SMALL);
        SidePlan {
            total,
            writes: Writes::UpTo([100, 5000, 100_000][(mix(&[seed, number, side as u64]) % 3) as usize]),
            reads: Reads { most: 1 << 16, pauses: if late { vec![(0, LATE)] } else { Vec::new() } },
            buffers: Buffers { send: small, receive: small },
            hold: None,
            half_close,
            last,
        }
    })
}
