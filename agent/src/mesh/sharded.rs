//! A map in parts. A copy costs as much as there are parts, and one with a few changes shares all the other parts with its
//! original: a mesh of tens of thousands of pods changes one pod at a time.

use std::{
    borrow::Borrow,
    collections::{HashMap, hash_map::RandomState},
    fmt,
    hash::{BuildHasher as _, Hash},
    sync::{Arc, LazyLock},
};

/// Parts of a map. With 50,000 entries each has 200, so that neither a copy nor the first change to a part takes long.
const SHARDS: usize = 256;

/// One state for all maps: a key is in the same part of each, whoever made it. Random, so that nobody can choose names that all
/// fall into one part.
static STATE: LazyLock<RandomState> = LazyLock::new(RandomState::new);

type Shard<K, V> = HashMap<K, V, RandomState>;

/// A hash map whose copies share what is the same.
#[derive(Clone)]
pub(super) struct Sharded<K, V> {
    shards: Box<[Arc<Shard<K, V>>]>,
    len: usize,
}

impl<K, V> Default for Sharded<K, V> {
    fn default() -> Self {
        let empty = Arc::new(Shard::with_hasher(STATE.clone()));
        Self { shards: vec![empty; SHARDS].into(), len: 0 }
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for Sharded<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.shards.iter().flat_map(|shard| shard.iter())).finish()
    }
}

/// Which part a key is in. Not by the bits that the maps within go by, the lowest and the highest.
fn place<Q: Hash + ?Sized>(key: &Q) -> usize {
    (STATE.hash_one(key) >> 40) as usize % SHARDS
}

impl<K, V> Sharded<K, V> {
    /// How many entries there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// All entries, in no particular order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flat_map(|shard| shard.iter())
    }

    /// All keys.
    pub(super) fn keys(&self) -> impl Iterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    /// All values.
    pub(super) fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }
}

impl<K: Hash + Eq, V> Sharded<K, V> {
    /// The value of a key.
    pub(super) fn get<Q>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.shards[place(key)].get(key)
    }

    /// Has it this key?
    pub(super) fn contains(&self, key: &K) -> bool {
        self.get(key).is_some()
    }

    /// Keys that only one of the two has. Looks only into parts that are not shared.
    pub(super) fn keys_apart<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = &'a K> {
        fn missing<'a, K: Hash + Eq, V>(of: &'a Shard<K, V>, from: &'a Shard<K, V>) -> impl Iterator<Item = &'a K> {
            of.keys().filter(|key| !from.contains_key(*key))
        }
        self.shards
            .iter()
            .zip(&other.shards)
            .filter(|(a, b)| !Arc::ptr_eq(a, b))
            .flat_map(|(a, b)| missing(a, b).chain(missing(b, a)))
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Sharded<K, V> {
    /// Inserts or replaces; the value that was there before.
    pub(super) fn insert(&mut self, key: K, value: V) -> Option<V> {
        let before = Arc::make_mut(&mut self.shards[place(&key)]).insert(key, value);
        self.len += usize::from(before.is_none());
        before
    }

    /// Removes; the value that was there.
    pub(super) fn remove<Q>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let shard = &mut self.shards[place(key)];
        // Without a copy when there is nothing to remove.
        if !shard.contains_key(key) {
            return None;
        }
        self.len -= 1;
        Arc::make_mut(shard).remove(key)
    }
}

impl<K: Hash + Eq, V: PartialEq> PartialEq for Sharded<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.shards.iter().zip(&other.shards).all(|(a, b)| Arc::ptr_eq(a, b) || a == b)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};

    use proptest::prelude::*;

    use super::Sharded;

    fn sharded(entries: &[(u16, u8)]) -> Sharded<u16, u8> {
        let mut map = Sharded::default();
        for (k, v) in entries {
            map.insert(*k, *v);
        }
        map
    }

    proptest! {
        #[test]
        fn it_is_a_map_and_copies_are_independent(
            before in proptest::collection::vec((0u16..900, 0u8..3), 0..400),
            changes in proptest::collection::vec((0u16..900, proptest::option::of(0u8..3)), 0..50),
        ) {
            let original = sharded(&before);
            let mut model: HashMap<u16, u8> = before.iter().copied().collect();
            let untouched = model.clone();
            let mut copy = original.clone();
            for (key, value) in changes {
                if let Some(value) = value {
                    prop_assert_eq!(copy.insert(key, value), model.insert(key, value));
                } else {
                    prop_assert_eq!(copy.remove(&key), model.remove(&key));
                }
            }
            prop_assert_eq!(&copy.iter().map(|(k, v)| (*k, *v)).collect::<HashMap<_, _>>(), &model);
            prop_assert_eq!(&original.iter().map(|(k, v)| (*k, *v)).collect::<HashMap<_, _>>(), &untouched);
            prop_assert_eq!(copy.len(), model.len());
            prop_assert!((0..900).all(|k| copy.get(&k) == model.get(&k) && copy.contains(&k) == model.contains_key(&k)));
            prop_assert_eq!(copy == original, model == untouched);
            let apart: BTreeSet<u16> = copy.keys_apart(&original).copied().collect();
            let (a, b): (BTreeSet<u16>, BTreeSet<u16>) = (model.keys().copied().collect(), untouched.keys().copied().collect());
            prop_assert_eq!(apart, a.symmetric_difference(&b).copied().collect::<BTreeSet<_>>());
            // Made from nothing by somebody else.
            let entries: Vec<_> = model.into_iter().collect();
            prop_assert!(sharded(&entries) == copy);
        }
    }
}
