//! The objects of one kind, as far as they are known.

use std::{collections::BTreeMap, mem, sync::Arc};

/// What a watch says.
#[derive(Debug)]
pub(super) enum Delta<K, R> {
    /// An object is like this now; `None` when it is of no use any more.
    Apply(K, Option<R>),
    /// An object is gone.
    Delete(K),
    /// A list begins; what is known stays in force until it is complete.
    ListBegins,
    /// An object of the list.
    Listed(K, Option<R>),
    /// The list is complete: whatever it did not have is gone.
    ListEnds,
}

/// Records by key. An unchanged record keeps its allocation, so that whoever derived something from it sees that at a glance.
#[derive(Debug)]
pub(super) struct Table<K, R> {
    current: BTreeMap<K, Arc<R>>,
    incoming: Option<BTreeMap<K, Arc<R>>>,
    /// The API server has said what there is, at least once.
    synced: bool,
}

impl<K, R> Default for Table<K, R> {
    fn default() -> Self {
        Self { current: BTreeMap::new(), incoming: None, synced: false }
    }
}

impl<K: Ord + Clone, R: PartialEq> Table<K, R> {
    /// Starts with what was known when the agent last ran.
    pub(super) fn restored(records: impl IntoIterator<Item = (K, Arc<R>)>) -> Self {
        let current = records.into_iter().collect();
        Self { current, incoming: None, synced: false }
    }

    /// Takes in a change; `true` when something is different now.
    pub(super) fn take(&mut self, delta: Delta<K, R>) -> bool {
        match delta {
            Delta::Apply(key, Some(record)) => self.set(key, record),
            Delta::Apply(key, None) | Delta::Delete(key) => self.current.remove(&key).is_some(),
            Delta::ListBegins => {
                self.incoming = Some(BTreeMap::new());
                false
            }
            Delta::Listed(key, record) => {
                if let (Some(incoming), Some(record)) = (&mut self.incoming, record) {
                    let known = self.current.get(&key).filter(|old| ***old == record);
                    let record = known.cloned().unwrap_or_else(|| Arc::new(record));
                    incoming.insert(key, record);
                }
                false
            }
            Delta::ListEnds => {
                let first = !mem::replace(&mut self.synced, true);
                let Some(incoming) = self.incoming.take() else { return first };
                let same = incoming.len() == self.current.len()
                    && incoming.iter().zip(&self.current).all(|(new, old)| new.0 == old.0 && Arc::ptr_eq(new.1, old.1));
                self.current = incoming;
                first || !same
            }
        }
    }

    fn set(&mut self, key: K, record: R) -> bool {
        if self.current.get(&key).is_some_and(|old| **old == record) {
            return false;
        }
        self.current.insert(key, Arc::new(record));
        true
    }

    /// Nothing of this kind can exist, e.g. because its CRD does not.
    pub(super) fn none(&mut self) -> bool {
        let first = !mem::replace(&mut self.synced, true);
        self.incoming = None;
        let had = !self.current.is_empty();
        self.current.clear();
        first || had
    }

    pub(super) fn synced(&self) -> bool {
        self.synced
    }

    pub(super) fn get(&self, key: &K) -> Option<&Arc<R>> {
        self.current.get(key)
    }

    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = (&K, &Arc<R>)> {
        self.current.iter()
    }

    pub(super) fn len(&self) -> usize {
        self.current.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{Delta, Table};

    fn listed(table: &mut Table<u8, u8>, records: &[(u8, u8)]) -> bool {
        assert!(!table.take(Delta::ListBegins));
        for (k, r) in records {
            assert!(!table.take(Delta::Listed(*k, Some(*r))));
        }
        table.take(Delta::ListEnds)
    }

    #[test]
    fn a_list_replaces_what_was_known_only_when_it_is_complete() {
        let mut table = Table::restored([(1, Arc::new(1)), (2, Arc::new(2))]);
        assert!(!table.synced());
        table.take(Delta::ListBegins);
        table.take(Delta::Listed(2, Some(2)));
        assert_eq!(table.len(), 2, "an interrupted list takes nothing away");
        let two = Arc::clone(table.get(&2).unwrap());
        assert!(listed(&mut table, &[(2, 2), (3, 3)]));
        assert!(table.synced() && table.get(&1).is_none());
        assert!(Arc::ptr_eq(&two, table.get(&2).unwrap()), "what is the same keeps its place");
        assert!(!listed(&mut table, &[(2, 2), (3, 3)]), "the same list again is no change");
        assert!(listed(&mut table, &[(2, 2)]));
    }

    #[test]
    fn single_changes() {
        let mut table: Table<u8, u8> = Table::default();
        assert!(listed(&mut table, &[]), "the first list is news, even if empty");
        assert!(table.take(Delta::Apply(1, Some(1))));
        assert!(!table.take(Delta::Apply(1, Some(1))));
        assert!(table.take(Delta::Apply(1, None)), "of no use any more");
        assert!(!table.take(Delta::Delete(1)));
        assert!(table.take(Delta::Apply(1, Some(2))) && table.none() && table.len() == 0);
    }
}
