//! Places that are held for as long as their holder likes.

use std::{
    collections::HashMap,
    fmt,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use slab::Slab;

use super::Bound;

/// A bound on what is never ended for a newcomer. A holder may have as many places as there are,
/// but at most `steps` times as many as are free: so the last places are for holders that have few.
/// With `steps` of 256 and 65,536 places one holder gets 65,280 of them, and of 257 places all.
pub struct Room<H> {
    total: usize,
    steps: usize,
    bound: Bound,
    held: Mutex<Held<H>>,
}

struct Held<H> {
    places: usize,
    holders: Slab<Holder<H>>,
    names: HashMap<H, u32>,
}

struct Holder<H> {
    name: H,
    places: usize,
}

impl<H: Hash + Eq + Clone> Room<H> {
    /// An empty room; it has no memory of its own until its first use.
    pub fn new(total: usize, steps: usize, bound: Bound) -> Arc<Self> {
        Arc::new(Self {
            total,
            steps,
            bound,
            held: Mutex::new(Held { places: 0, holders: Slab::new(), names: HashMap::new() }),
        })
    }

    /// A place, unless there is none for this holder.
    pub fn try_enter(self: &Arc<Self>, name: H) -> Option<Place<H>> {
        let mut held = self.held();
        let free = self.total.saturating_sub(held.places);
        let known = held.names.get(&name).copied();
        let has = known.map_or(0, |holder| held.holders[holder as usize].places);
        if free == 0 || has >= self.steps.saturating_mul(free) {
            drop(held);
            self.bound.refused();
            return None;
        }
        let holder = known.unwrap_or_else(|| {
            let holder = held.holders.insert(Holder { name: name.clone(), places: 0 }) as u32;
            held.names.insert(name, holder);
            holder
        });
        held.places += 1;
        held.holders[holder as usize].places += 1;
        drop(held);
        Some(Place { room: Arc::clone(self), holder })
    }

    /// Places that are taken.
    pub fn taken(&self) -> usize {
        self.held().places
    }

    fn held(&self) -> MutexGuard<'_, Held<H>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in a [`Room`], given back when it is dropped.
pub struct Place<H: Hash + Eq + Clone> {
    room: Arc<Room<H>>,
    holder: u32,
}

impl<H: Hash + Eq + Clone> Drop for Place<H> {
    fn drop(&mut self) {
        let mut held = self.room.held();
        held.places -= 1;
        let holder = &mut held.holders[self.holder as usize];
        holder.places -= 1;
        if holder.places == 0 {
            let gone = held.holders.remove(self.holder as usize);
            held.names.remove(&gone.name);
        }
    }
}

impl<H: Hash + Eq + Clone> fmt::Debug for Place<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place").field("holder", &self.holder).finish_non_exhaustive()
    }
}
