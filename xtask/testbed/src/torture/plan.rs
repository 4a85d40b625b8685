//! What the two ends of a connection do, made from the scenario, the seed and the connection's number alone.

mod endings;
mod random;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A kind of torture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Scenario {
    /// Random sizes both ways at once, random buffers, pauses, writes of one byte.
    Mixed,
    /// Every order of half-close, reset and close at both ends, with nothing, little and much on the way.
    Endings,
    /// Readers that stop for a second or two while both directions are full.
    Stalled,
    /// A reader that stops for longer than any time limit of the tunnel.
    LongStall,
    /// Socket buffers of a few kilobytes everywhere.
    Tiny,
    /// Loss, reordering, duplicates and delay between the nodes.
    Wire,
    /// Agents that get too little memory for their sockets.
    Memory,
    /// Thousands of idle connections beside busy ones.
    Idle,
    /// New keys every few records.
    Rekey,
    /// kill -9 of the application at either end.
    Kill,
}

impl Scenario {
    /// Whether ends have small socket buffers. On an interface with packets larger than those, such as `lo`, Linux moves but a few
    /// kilobytes per second then, on plain TCP too.
    pub fn has_small_buffers(self) -> bool {
        !matches!(self, Self::Stalled | Self::LongStall | Self::Memory | Self::Idle)
    }
}

/// An end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The one that connects.
    Client,
    /// The one that is connected to.
    Server,
}

impl Side {
    /// The other end.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

/// What happens on one connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The scenario.
    pub scenario: Scenario,
    /// The seed.
    pub seed: u64,
    /// The connection's number.
    pub number: u64,
    /// One of the applications is killed on the way: neither end finishes by itself.
    pub endless: bool,
    /// What the client does, and what the server does.
    pub sides: [SidePlan; 2],
}

/// What one end does. It reads all the time, but for the pauses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SidePlan {
    /// Bytes that it sends.
    pub total: u64,
    /// In which pieces.
    pub writes: Writes,
    /// How it reads.
    pub reads: Reads,
    /// Sizes of its socket's buffers.
    pub buffers: Buffers,
    /// After so many bytes it sends no more until something has happened.
    pub hold: Option<(u64, Trigger)>,
    /// When it closes its direction, once everything is sent. Never: the last act ends it.
    pub half_close: Option<Trigger>,
    /// How it leaves without waiting for the other's end, and when. Comes after the half-close, if there is one.
    pub last: Option<(Act, Trigger)>,
}

impl SidePlan {
    /// Whether the other end can see a clean end of what this one sends.
    pub fn ends(&self) -> bool {
        self.half_close.is_some() || matches!(self.last, Some((Act::Close, _)))
    }
}

/// Sizes of writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writes {
    /// Always as much.
    Exactly(usize),
    /// From one byte to this many.
    UpTo(usize),
}

/// How an end reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reads {
    /// At most this many bytes at a time.
    pub most: usize,
    /// Does nothing for so long once so many bytes have come; in order.
    pub pauses: Vec<(u64, Duration)>,
}

/// `SO_SNDBUF` and `SO_RCVBUF`, bytes; `None` leaves the kernel's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Buffers {
    /// For sending.
    pub send: Option<usize>,
    /// For receiving.
    pub receive: Option<usize>,
}

/// What an end waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// Everything it has to send was taken by its kernel.
    Sent,
    /// So many bytes have come.
    Received(u64),
    /// The other's end has come.
    PeerEnd,
    /// Its process was told to go on; an end that is never told does not.
    Released,
}

/// How an end leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// `SO_LINGER {1, 0}` and close: a reset, whatever is on the way.
    Reset,
    /// close, once everything is sent: a FIN, or a reset if something unread is there or comes later.
    Close,
}

impl Plan {
    /// The plan of a connection.
    pub fn new(scenario: Scenario, seed: u64, number: u64) -> Self {
        let sides = match scenario {
            Scenario::Endings => endings::sides(seed, number),
            _ => random::sides(scenario, seed, number),
        };
        Self { scenario, seed, number, endless: scenario == Scenario::Kill, sides }
    }

    /// How many connections have all the different endings.
    pub fn endings() -> u64 {
        endings::count()
    }

    /// What one end does.
    pub fn side(&self, side: Side) -> &SidePlan {
        &self.sides[side as usize]
    }

    /// What the client sends before anything else.
    pub fn header(&self) -> Header {
        Header { scenario: self.scenario, seed: self.seed, number: self.number }
    }

    /// How long the ends pause together.
    pub fn pauses(&self) -> Duration {
        self.sides.iter().flat_map(|side| &side.reads.pauses).map(|(_, pause)| *pause).sum()
    }
}

/// What tells the server which plan is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    scenario: Scenario,
    seed: u64,
    number: u64,
}

impl Header {
    /// Bytes that it takes.
    pub const LENGTH: usize = 21;
    const MAGIC: [u8; 4] = *b"rack";

    /// As it is sent.
    pub fn bytes(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..4].copy_from_slice(&Self::MAGIC);
        bytes[4] = self.scenario as u8;
        bytes[5..13].copy_from_slice(&self.seed.to_be_bytes());
        bytes[13..].copy_from_slice(&self.number.to_be_bytes());
        bytes
    }

    /// The plan that it names.
    pub fn plan(bytes: &[u8; Self::LENGTH]) -> Result<Plan> {
        ensure!(bytes[..4] == Self::MAGIC, "the stream begins with other bytes than the client sends: {bytes:02x?}");
        let number = |part: &[u8]| u64::from_be_bytes(part.try_into().expect("eight bytes"));
        let scenario = Scenario::value_variants().get(usize::from(bytes[4]));
        let scenario = *scenario.with_context(|| format!("no scenario has number {}", bytes[4]))?;
        Ok(Plan::new(scenario, number(&bytes[5..13]), number(&bytes[13..])))
    }
}

/// One number out of several, each bit of which depends on every bit of them (the finalizer of splitmix64).
pub fn mix(values: &[u64]) -> u64 {
    values.iter().fold(0x9e37_79b9_7f4a_7c15, |state, value| {
        let mut z = (state ^ value).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::ValueEnum;

    use super::{Act, Header, Plan, Scenario, SidePlan, Trigger};

    #[test]
    fn a_header_names_its_plan() {
        for scenario in Scenario::value_variants() {
            let plan = Plan::new(*scenario, 0xdead_beef_0123, 77);
            assert_eq!(Header::plan(&plan.header().bytes()).unwrap(), plan);
        }
        assert!(Header::plan(&[0; Header::LENGTH]).is_err());
    }

    #[test]
    fn plans_depend_on_seed_and_number_and_on_nothing_else() {
        let plan = |seed, number| Plan::new(Scenario::Mixed, seed, number);
        assert_eq!(plan(1, 2), plan(1, 2));
        assert_ne!(plan(1, 2).sides, plan(1, 3).sides);
        assert_ne!(plan(1, 2).sides, plan(2, 2).sides);
    }

    /// Two ends that wait for each other would hang without anything being wrong.
    #[test]
    fn no_plan_waits_for_what_never_comes() {
        let waits_for_end = |side: &SidePlan| {
            let ends = side.half_close.into_iter().chain(side.last.map(|(_, trigger)| trigger));
            side.half_close != Some(Trigger::Sent) && ends.into_iter().any(|trigger| trigger == Trigger::PeerEnd)
        };
        for scenario in Scenario::value_variants() {
            for number in 0..Plan::endings() {
                let plan = Plan::new(*scenario, 5, number);
                let [client, server] = &plan.sides;
                assert!(!(waits_for_end(client) && waits_for_end(server)), "{plan:?}");
                for (side, other) in [(client, server), (server, client)] {
                    let triggers = [side.half_close, side.last.map(|(_, t)| t), side.hold.map(|(_, t)| t)];
                    for trigger in triggers.into_iter().flatten() {
                        assert!(!matches!(trigger, Trigger::Received(n) if n > other.total), "{plan:?}");
                    }
                    assert!(plan.endless || side.half_close.is_some() || side.last.is_some(), "{plan:?}");
                    assert!(side.reads.most > 0 && side.reads.pauses.is_sorted(), "{plan:?}");
                }
            }
        }
    }

    #[test]
    fn endings_have_every_pair_that_can_happen() {
        let act = |side: &SidePlan| (side.half_close, side.last.map(|(act, t)| (act == Act::Reset, t)));
        let kind = |side: &SidePlan| {
            let (half_close, last) = act(side);
            // Without the sizes, which differ.
            format!("{half_close:?} {last:?}").replace(|c: char| c.is_ascii_digit(), "")
        };
        let pairs: BTreeSet<_> = (0..Plan::endings())
            .map(|number| Plan::new(Scenario::Endings, 1, number).sides)
            .map(|[client, server]| (kind(&client), kind(&server)))
            .collect();
        // Ten ways at each end; of the pairs, those four wait for each other in which both wait for the other's end.
        assert_eq!(pairs.len(), 10 * 10 - 4);
    }
}
