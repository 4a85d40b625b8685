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

/// Objects that have become different, each with what it was before.
pub(super) type Changes<K, R> = BTreeMap<K, Option<Arc<R>>>;

/// Records by key. An unchanged record keeps its allocation, so that whoever derived something from it sees that at a glance.
#[derive(Debug)]
pub(super) struct Table<K, R> {
    current: BTreeMap<K, Arc<R>>,
    incoming: Option<BTreeMap<K, Arc<R>>>,
    /// The API server has said what there is, at least once.
    synced: bool,
    /// The kind has been listed, by this agent or the one that left the copy: it is known to exist.
    listed: bool,
    /// Since they were last asked for; `None` until then: everything is new to whoever asks first.
    changes: Option<Changes<K, R>>,
}

impl<K, R> Default for Table<K, R> {
    fn default() -> Self {
        Self { current: BTreeMap::new(), incoming: None, synced: false, listed: false, changes: None }
    }
}

impl<K: Ord + Clone, R: PartialEq> Table<K, R> {
    /// Starts with what was known when the agent last ran, and whether the kind had been listed
    /// then.
    pub(super) fn restored(records: impl IntoIterator<Item = (K, Arc<R>)>, listed: bool) -> Self {
        let current: BTreeMap<_, _> = records.into_iter().collect();
        Self { listed: listed || !current.is_empty(), current, ..Self::default() }
    }

    /// Takes in a change; `true` when something is different now.
    pub(super) fn take(&mut self, delta: Delta<K, R>) -> bool {
        match delta {
            Delta::Apply(key, Some(record)) => self.set(key, record),
            Delta::Apply(key, None) | Delta::Delete(key) => {
                let Some(old) = self.current.remove(&key) else { return false };
                self.note(key, Some(old));
                true
            }
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
                let first = !mem::replace(&mut self.listed, true) || first;
                let Some(incoming) = self.incoming.take() else { return first };
                let before = mem::replace(&mut self.current, incoming);
                self.compare(before) || first
            }
        }
    }

    fn set(&mut self, key: K, record: R) -> bool {
        if self.current.get(&key).is_some_and(|old| **old == record) {
            return false;
        }
        let old = self.current.insert(key.clone(), Arc::new(record));
        self.note(key, old);
        true
    }

    /// Notes what is different from `before`, if anything is.
    fn compare(&mut self, mut before: BTreeMap<K, Arc<R>>) -> bool {
        let mut differences = Vec::new();
        for (key, record) in &self.current {
            let old = before.remove(key);
            if old.as_ref().is_none_or(|old| !Arc::ptr_eq(old, record)) {
                differences.push((key.clone(), old));
            }
        }
        differences.extend(before.into_iter().map(|(key, old)| (key, Some(old))));
        let any = !differences.is_empty();
        for (key, old) in differences {
            self.note(key, old);
        }
        any
    }

    /// What counts is how it was when changes were last asked for.
    fn note(&mut self, key: K, old: Option<Arc<R>>) {
        if let Some(changes) = &mut self.changes {
            changes.entry(key).or_insert(old);
        }
    }

    /// What has changed since this was last called. `None` the first time: everything.
    pub(super) fn changes(&mut self) -> Option<Changes<K, R>> {
        self.changes.replace(BTreeMap::new())
    }

    /// Nothing of this kind can exist, e.g. because its CRD does not.
    pub(super) fn none(&mut self) -> bool {
        let first = !mem::replace(&mut self.synced, true);
        (self.incoming, self.listed) = (None, false);
        let before = mem::take(&mut self.current);
        self.compare(before) || first
    }

    pub(super) fn synced(&self) -> bool {
        self.synced
    }

    /// Is the kind known to exist?
    pub(super) fn listed(&self) -> bool {
        self.listed
    }

    pub(super) fn get(&self, key: &K) -> Option<&Arc<R>> {
        self.current.get(key)
    }

    /// A record with its key.
    pub(super) fn entry(&self, key: &K) -> Option<(&K, &Arc<R>)> {
        self.current.get_key_value(key)
    }

    /// Keys from `first` on, in order.
    pub(super) fn keys_from(&self, first: K) -> impl Iterator<Item = &K> {
        self.current.range(first..).map(|(key, _)| key)
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
        let mut table = Table::restored([(1, Arc::new(1)), (2, Arc::new(2))], true);
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
        assert!(table.take(Delta::Apply(1, Some(2))) && table.listed() && table.none() && table.len() == 0);
        assert!(!table.listed() && listed(&mut table, &[]) && table.listed(), "it exists again");
    }

    #[test]
    fn changes_are_told_once_with_what_was_before() {
        let mut table: Table<u8, u8> = Table::restored([(1, Arc::new(1)), (2, Arc::new(2)), (3, Arc::new(3))], true);
        assert!(table.changes().is_none(), "everything is new to whoever asks first");
        assert!(table.changes().unwrap().is_empty());
        let told = |table: &mut Table<u8, u8>| {
            let changes = table.changes().unwrap();
            changes.into_iter().map(|(k, old)| (k, old.map(|old| *old))).collect::<Vec<_>>()
        };
        table.take(Delta::Apply(1, Some(7)));
        table.take(Delta::Delete(1));
        table.take(Delta::Apply(9, Some(9)));
        assert_eq!(told(&mut table), [(1, Some(1)), (9, None)]);
        assert!(listed(&mut table, &[(2, 2), (3, 4), (5, 5)]));
        assert_eq!(told(&mut table), [(3, Some(3)), (5, None), (9, Some(9))]);
        assert!(table.none());
        assert_eq!(told(&mut table), [(2, Some(2)), (3, Some(4)), (5, Some(5))]);
    }
}
