//! Plans that are drawn.

use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};

use super::{Buffers, Reads, Scenario, SidePlan, Trigger, Writes, mix};

/// Most writes and most reads on one connection and direction.
const MOST_PIECES: u64 = 5000;
/// What an idle connection says before and after it idles, bytes at most.
const WORDS: u64 = 300;

pub(super) fn sides(scenario: Scenario, seed: u64, number: u64) -> [SidePlan; 2] {
    let mut rng = StdRng::seed_from_u64(mix(&[seed, number, scenario as u64, 0x9e1a]));
    let rng = &mut rng;
    let totals = [(); 2].map(|()| total(scenario, rng));
    let mut sides = [0, 1].map(|side: usize| {
        let (total, coming) = (totals[side], totals[1 - side]);
        SidePlan {
            total,
            writes: writes(scenario, total, rng),
            reads: Reads { most: read_size(coming, rng), pauses: pauses(scenario, coming, rng) },
            buffers: buffers(scenario, rng),
            hold: None,
            half_close: (scenario != Scenario::Kill).then_some(Trigger::Sent),
            last: None,
        }
    });
    // Now and then one end answers the other's end, as a server does.
    let answers = rng.random_range(0..6);
    if let Some(side) = sides.get_mut(answers)
        && scenario != Scenario::Kill
    {
        side.half_close = Some(Trigger::PeerEnd);
    }
    if scenario == Scenario::Idle {
        // The client says something, the server answers, nothing happens for long, and the same again.
        let [up, down] = totals;
        sides[0].hold = Some((up / 2, Trigger::Released));
        sides[1].hold = Some((down / 2, Trigger::Received(up)));
    }
    sides
}

fn total(scenario: Scenario, rng: &mut StdRng) -> u64 {
    let most: u64 = match scenario {
        Scenario::Kill => return u64::MAX,
        Scenario::Idle => return rng.random_range(2..=WORDS),
        Scenario::Stalled | Scenario::LongStall => return rng.random_range(2_000_000..=6_000_000),
        Scenario::Mixed | Scenario::Endings | Scenario::Memory => 8_000_000,
        Scenario::Rekey => 2_000_000,
        Scenario::Wire => 1_000_000,
        // Slow: a few segments per round trip and timer.
        Scenario::Tiny => 60_000,
    };
    // As many of each order of magnitude, and now and then nothing at all.
    let most = *[0, 1, 100, 5000, 40_000, most / 8, most].choose(rng).expect("not empty");
    rng.random_range(most / 4..=most)
}

fn writes(scenario: Scenario, total: u64, rng: &mut StdRng) -> Writes {
    let least = (total / MOST_PIECES).max(1);
    if total <= MOST_PIECES && rng.random_bool(0.5) {
        return Writes::Exactly(1);
    }
    let sizes: &[u64] = match scenario {
        // Many records.
        Scenario::Rekey => &[1, 50, 400, 20_000],
        Scenario::Kill => &[1, 1000, 20_000, 300_000],
        // Around what fits a record, too.
        _ => &[10, 1500, 16_383, 16_384, 16_385, 70_000, 300_000],
    };
    let least = if scenario == Scenario::Kill { 1 } else { least };
    let size = (*sizes.choose(rng).expect("not empty")).max(least) as usize;
    if rng.random_bool(0.5) { Writes::Exactly(size) } else { Writes::UpTo(size * 2) }
}

fn read_size(coming: u64, rng: &mut StdRng) -> usize {
    let least = if coming == u64::MAX { 1 } else { (coming / MOST_PIECES).max(1) };
    let sizes: [u64; 5] = [1, 100, 5000, 1 << 16, 1 << 18];
    // No more memory than is needed: there may be ten thousand of them.
    (*sizes.choose(rng).expect("not empty")).max(least).min(coming.saturating_add(1)) as usize
}

fn pauses(scenario: Scenario, coming: u64, rng: &mut StdRng) -> Vec<(u64, Duration)> {
    let (count, range) = match scenario {
        Scenario::Stalled => (rng.random_range(1..=2), 300..1500),
        // Beyond the tunnel's user timeout and keepalive, which are 25 s.
        Scenario::LongStall => (1, 33_000..36_000),
        Scenario::Memory => (rng.random_range(0..=2), 20..300),
        Scenario::Idle | Scenario::Kill => return Vec::new(),
        _ => (rng.random_range(0..=1), 1..30),
    };
    let mut all: Vec<_> = (0..count)
        .map(|_| (rng.random_range(0..=coming / 2), Duration::from_millis(rng.random_range(range.clone()))))
        .collect();
    all.sort();
    all
}

fn buffers(scenario: Scenario, rng: &mut StdRng) -> Buffers {
    if !scenario.has_small_buffers() {
        return Buffers::default();
    }
    if scenario == Scenario::Tiny {
        // Less than the kernel's least, which it then takes.
        return Buffers { send: Some(1), receive: Some(1) };
    }
    let mut one = |least| *[None, None, None, Some(least), Some(20_000), Some(200_000)].choose(rng).expect("not empty");
    // The kernel's least for receiving does not fit a single packet: with megabytes to come, plain TCP needs minutes.
    Buffers { send: one(1), receive: one(4096) }
}
