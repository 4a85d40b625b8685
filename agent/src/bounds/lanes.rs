//! So many at once to one destination.
//!
//! How many that are is found out. Where a destination, or this node, is short of processor time,
//! many at once are not served sooner but all of them late, in the end too late for any. So a lane
//! begins narrow, widens while everybody gets through soon, and narrows when somebody takes long;
//! the others wait for their turn.

use std::{
    collections::HashMap,
    fmt,
    hash::Hash,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, timeout_at},
};

/// How wide a lane is at first, and at least while somebody is slow.
const FIRST: usize = 16;
const LEAST: usize = 4;
/// Who gets through in this time was not held up: a handshake across the longest cables takes half
/// a second.
const SOON: Duration = Duration::from_millis(500);
/// Longer than a handshake takes anywhere, without anybody in its way.
const SLOW: Duration = Duration::from_secs(2);
/// So many limits may pass at most, however many others get through meanwhile.
const LIMITS: u32 = 6;

/// What a destination takes at once. Whoever is one too many waits for that destination, and holds
/// nobody else up.
pub struct Lanes<D> {
    share: usize,
    lanes: Mutex<HashMap<D, Arc<State>>>,
}

struct State {
    turns: Semaphore,
    width: Mutex<Width>,
}

struct Width {
    /// Turns that there are, free or taken.
    turns: usize,
    /// How many there should be. When there are more, those that end are not given again.
    wanted: usize,
    /// When somebody last got through.
    progress: Option<Instant>,
    /// When the lane was last narrowed.
    narrowed: Option<Instant>,
}

impl<D: Hash + Eq + Clone> Lanes<D> {
    /// At most `share` at once to each destination. It has no memory of its own until its first
    /// use.
    pub fn new(share: usize) -> Arc<Self> {
        Arc::new(Self { share, lanes: Mutex::default() })
    }

    /// A way to `destination`; wait in it for a turn.
    pub fn to(self: &Arc<Self>, destination: D) -> Lane<D> {
        let mut lanes = self.lanes();
        let state = lanes.get(&destination).cloned().unwrap_or_else(|| {
            let state = Arc::new(State::new(self.share));
            lanes.insert(destination.clone(), Arc::clone(&state));
            state
        });
        drop(lanes);
        Lane { all: Arc::clone(self), destination, state }
    }

    /// Destinations that somebody is on the way to.
    pub fn destinations(&self) -> usize {
        self.lanes().len()
    }

    fn lanes(&self) -> MutexGuard<'_, HashMap<D, Arc<State>>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A way to a destination.
pub struct Lane<D: Hash + Eq + Clone> {
    all: Arc<Lanes<D>>,
    destination: D,
    state: Arc<State>,
}

impl<D: Hash + Eq + Clone> Lane<D> {
    /// Waits for a turn, in the order of asking, for as long as somebody gets through: `None` when
    /// nobody has for `limit`.
    pub async fn turn(&self, limit: Duration) -> Option<Turn<'_>> {
        let permit = if let Ok(permit) = self.state.turns.try_acquire() {
            permit
        } else {
            let turn = self.state.while_moving(limit, None, self.state.turns.acquire());
            turn.await?.expect("the semaphore is never closed")
        };
        Some(Turn { share: self.all.share, state: &self.state, permit: Some(permit), began: Instant::now() })
    }
}

/// A turn on the way to a destination.
pub struct Turn<'a> {
    share: usize,
    state: &'a State,
    /// Until it is dropped.
    permit: Option<SemaphorePermit<'a>>,
    began: Instant,
}

impl Turn<'_> {
    /// Does what the turn is for. `None` when nobody has got through for `limit`, or when this has
    /// taken too long although others have.
    pub async fn run<F: Future>(&self, limit: Duration, work: F) -> Option<F::Output> {
        let done = self.state.while_moving(limit, Some(self.began + limit * LIMITS), work).await;
        if done.is_none() {
            self.state.width().narrow(Instant::now());
        }
        done
    }

    /// The destination has answered.
    pub fn got_through(&self) {
        let now = Instant::now();
        if self.state.width().got_through(now - self.began, now, self.share) {
            self.state.turns.add_permits(1);
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut width = self.state.width();
        if width.turns > width.wanted
            && let Some(permit) = self.permit.take()
        {
            permit.forget();
            width.turns -= 1;
        }
    }
}

impl State {
    fn new(share: usize) -> Self {
        let width = Width::new(share);
        Self { turns: Semaphore::new(width.turns), width: Mutex::new(width) }
    }

    fn width(&self) -> MutexGuard<'_, Width> {
        self.width.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `work` for as long as somebody gets through, and not beyond `end`.
    async fn while_moving<F: Future>(&self, limit: Duration, end: Option<Instant>, work: F) -> Option<F::Output> {
        let began = Instant::now();
        let mut work = pin!(work);
        loop {
            let since = self.width().progress.map_or(began, |progress| progress.max(began));
            let until = end.map_or(since + limit, |end| end.min(since + limit));
            match timeout_at(until, work.as_mut()).await {
                Ok(done) => return Some(done),
                Err(_) if end.is_some_and(|end| until >= end) => return None,
                Err(_) if self.width().progress.is_some_and(|progress| progress > since) => {}
                Err(_) => return None,
            }
        }
    }
}

impl Width {
    fn new(share: usize) -> Self {
        let turns = FIRST.min(share);
        Self { turns, wanted: turns, progress: None, narrowed: None }
    }

    /// Somebody got through. Returns whether there is to be one more turn now.
    fn got_through(&mut self, took: Duration, now: Instant, share: usize) -> bool {
        self.progress = Some(now);
        if took > SLOW {
            self.narrow(now);
        } else if took < SOON && self.wanted < share {
            self.wanted += 1;
            if self.turns < self.wanted {
                self.turns += 1;
                return true;
            }
        }
        false
    }

    /// Halves the lane, once for all that were slow at the same time.
    fn narrow(&mut self, now: Instant) {
        if self.narrowed.is_none_or(|before| now - before > SLOW) {
            self.narrowed = Some(now);
            // No wider than it was before.
            self.wanted = (self.wanted / 2).max(LEAST.min(self.wanted));
        }
    }
}

impl<D: Hash + Eq + Clone> Drop for Lane<D> {
    fn drop(&mut self) {
        let mut lanes = self.all.lanes();
        // The map's, and this one's.
        if Arc::strong_count(&self.state) <= 2 {
            lanes.remove(&self.destination);
            if lanes.is_empty() {
                lanes.shrink_to_fit();
            }
        }
    }
}

impl<D: Hash + Eq + Clone> fmt::Debug for Lane<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_is_as_wide_as_everybody_gets_through_soon() {
        /// Somebody gets through after this time.
        fn finish((width, now): &mut (Width, Instant), seconds: u64) -> bool {
            let took = Duration::from_secs(seconds);
            *now += took;
            width.got_through(took, *now, 256)
        }
        let mut lane = (Width::new(256), Instant::now());
        assert_eq!(lane.0.turns, 16);
        assert!((0..20).all(|_| finish(&mut lane, 0)), "one more for each that was quick");
        assert_eq!((lane.0.turns, lane.0.wanted), (36, 36));
        (0..1000).for_each(|_| _ = finish(&mut lane, 0));
        assert_eq!((lane.0.turns, lane.0.wanted), (256, 256), "no wider than its share");

        assert!(!finish(&mut lane, 3));
        let (width, late) = &mut lane;
        (0..100).for_each(|_| width.narrow(*late));
        assert_eq!((lane.0.turns, lane.0.wanted), (256, 128), "once for all that were slow together");
        assert!(!finish(&mut lane, 1));
        assert_eq!(lane.0.wanted, 128, "neither quick nor slow");
        assert!(!finish(&mut lane, 0));
        assert_eq!((lane.0.turns, lane.0.wanted), (256, 129), "those that are too many are not there yet");
        (0..10).for_each(|_| _ = finish(&mut lane, 3));
        assert_eq!(lane.0.wanted, 4, "somebody always goes on");
        assert_eq!(Width::new(2).turns, 2, "and a small share is a small share");
    }

    #[tokio::test]
    async fn turns_that_are_too_many_are_not_given_again() {
        let lanes = Lanes::new(256);
        let lane = lanes.to(());
        let mut turns = Vec::new();
        while let Some(turn) = lane.turn(Duration::ZERO).await {
            turns.push(turn);
        }
        assert_eq!(turns.len(), 16);
        lane.state.width().narrow(Instant::now());
        turns.truncate(8);
        assert!(lane.turn(Duration::ZERO).await.is_none());
        turns.pop();
        assert!(lane.turn(Duration::ZERO).await.is_some());
        turns.clear();
        while let Some(turn) = lane.turn(Duration::ZERO).await {
            turns.push(turn);
        }
        assert_eq!(turns.len(), 8);
    }
}
