//! Which objects concern which others.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::Hash,
    slice,
};

/// Values by key, each as often as it was added: mostly one for a key, which takes no allocation.
#[derive(Debug)]
pub(super) struct Index<K, V>(HashMap<K, Values<V>>);

#[derive(Debug)]
enum Values<V> {
    One(V),
    Many(Vec<V>),
}

impl<K, V> Default for Index<K, V> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<V> Values<V> {
    fn as_slice(&self) -> &[V] {
        match self {
            Self::One(value) => slice::from_ref(value),
            Self::Many(values) => values,
        }
    }
}

impl<K: Hash + Eq, V: Ord + Clone> Index<K, V> {
    /// The values of a key, in order.
    pub(super) fn get(&self, key: &K) -> &[V] {
        self.0.get(key).map_or(&[], Values::as_slice)
    }

    /// Adds a value, once more if it is there.
    pub(super) fn add(&mut self, key: K, value: V) {
        match self.0.entry(key) {
            Entry::Vacant(e) => drop(e.insert(Values::One(value))),
            Entry::Occupied(mut e) => {
                let mut values = e.get().as_slice().to_vec();
                let at = values.partition_point(|v| *v <= value);
                values.insert(at, value);
                e.insert(Values::Many(values));
            }
        }
    }

    /// Removes a value, once.
    pub(super) fn remove(&mut self, key: &K, value: &V) {
        let Some(values) = self.0.get_mut(key) else { return };
        let Ok(at) = values.as_slice().binary_search(value) else { return };
        match values {
            Values::Many(values) if values.len() > 1 => drop(values.remove(at)),
            _ => drop(self.0.remove(key)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Index;

    #[test]
    fn values_are_in_order_and_counted() {
        let mut index = Index::default();
        for value in [5, 3, 5, 4] {
            index.add("a", value);
        }
        index.add("b", 1);
        assert_eq!((index.get(&"a"), index.get(&"b"), index.get(&"c")), (&[3, 4, 5, 5][..], &[1][..], &[][..]));
        index.remove(&"a", &5);
        index.remove(&"a", &9);
        assert_eq!(index.get(&"a"), [3, 4, 5]);
        for value in [3, 4, 5] {
            index.remove(&"a", &value);
        }
        index.remove(&"b", &1);
        assert!(index.0.is_empty(), "nothing is kept of keys without values");
    }
}
