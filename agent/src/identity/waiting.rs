//! Who waits for a certificate, in the order of their coming.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use crate::mesh::SpiffeId;

/// Identities that connections wait for. As many as there are waiting connections at most.
#[derive(Default)]
pub(super) struct Waiting {
    queue: Mutex<Queue>,
    /// Told when an identity comes that nobody waited for.
    pub(super) entered: Notify,
}

#[derive(Default)]
struct Queue {
    /// Whom, since when, and by how many.
    places: HashMap<SpiffeId, (u64, usize)>,
    next: u64,
}

impl Waiting {
    /// Waits for `identity` until the returned place is dropped.
    pub(super) fn enter(&self, identity: &SpiffeId) -> Place<'_> {
        let mut queue = self.lock();
        let since = queue.next;
        queue.next += 1;
        let (_, count) = queue.places.entry(identity.clone()).or_insert((since, 0));
        *count += 1;
        if *count == 1 {
            self.entered.notify_one();
        }
        Place { waiting: self, identity: identity.clone() }
    }

    /// Who came first is first.
    pub(super) fn in_order(&self) -> Vec<SpiffeId> {
        let queue = self.lock();
        let mut all: Vec<_> = queue.places.iter().map(|(id, (since, _))| (*since, id.clone())).collect();
        all.sort_unstable_by_key(|(since, _)| *since);
        all.into_iter().map(|(_, id)| id).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the queue; dropped, it is given up.
pub(super) struct Place<'a> {
    waiting: &'a Waiting,
    identity: SpiffeId,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut queue = self.waiting.lock();
        if let Some((_, count)) = queue.places.get_mut(&self.identity) {
            *count -= 1;
            if *count == 0 {
                queue.places.remove(&self.identity);
            }
        }
    }
}
