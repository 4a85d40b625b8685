//! Answers about tokens, for a short time. Keyed by a digest: no token stays in memory.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use super::{Agent, token::Digest};

/// Most answers at once: an agent has one token, two while the kubelet replaces it.
const MAX: usize = 16_384;

/// Only tokens that were accepted: a flood of others does not fill it.
#[derive(Default)]
pub(super) struct Cache(Mutex<HashMap<Digest, (Arc<Agent>, SystemTime)>>);

impl Cache {
    pub(super) fn get(&self, key: &Digest, now: SystemTime) -> Option<Arc<Agent>> {
        self.lock().get(key).filter(|(_, until)| now < *until).map(|(agent, _)| Arc::clone(agent))
    }

    pub(super) fn put(&self, key: Digest, agent: Arc<Agent>, until: SystemTime, now: SystemTime) {
        let mut answers = self.lock();
        if answers.len() >= MAX {
            answers.retain(|_, (_, until)| now < *until);
        }
        if answers.len() < MAX && now < until {
            answers.insert(key, (agent, until));
        }
    }

    pub(super) fn tidy(&self, now: SystemTime) {
        let mut answers = self.lock();
        answers.retain(|_, (_, until)| now < *until);
        answers.shrink_to(MAX / 16);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, (Arc<Agent>, SystemTime)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn answers_end_and_are_bounded() {
        let cache = Cache::default();
        let now = SystemTime::now();
        let agent =
            Arc::new(Agent { node: "n".into(), namespace: "ns".into(), service_account: "sa".into(), pod: "p".into() });
        let key = |n: usize| {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&n.to_be_bytes());
            key
        };
        let second = Duration::from_secs(1);
        cache.put(key(0), Arc::clone(&agent), now + second, now);
        assert!(cache.get(&key(0), now).is_some() && cache.get(&key(1), now).is_none());
        assert!(cache.get(&key(0), now + second).is_none(), "at its end it is over");
        for n in 0..2 * MAX {
            cache.put(key(n), Arc::clone(&agent), now + second, now);
        }
        assert_eq!(cache.lock().len(), MAX);
        cache.put(key(5 * MAX), Arc::clone(&agent), now + 3 * second, now + 2 * second);
        assert_eq!(cache.lock().len(), 1, "what is over makes room");
    }
}
