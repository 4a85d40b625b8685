//! A map, what it holds, and how to get from there to what it should hold.

use std::{collections::BTreeMap, ops::RangeInclusive};

use super::CaptureError;

/// The map itself.
pub trait Store {
    /// As the mirror orders it.
    type Key: Ord + Copy;
    /// As the programs read it.
    type Value: PartialEq + Copy;
    /// All entries.
    fn entries(&self) -> Result<BTreeMap<Self::Key, Self::Value>, String>;
    /// Inserts or replaces one.
    fn insert(&mut self, key: &Self::Key, value: &Self::Value) -> Result<(), String>;
    /// Removes one; no error when it was not there.
    fn remove(&mut self, key: &Self::Key) -> Result<(), String>;
}

/// A map with a mirror of its contents, so that a change costs system calls only for what differs. Sound as long as
/// nobody else writes the map, which the lock on the pin directory sees to.
#[derive(Debug)]
pub struct Table<S: Store> {
    name: &'static str,
    capacity: usize,
    store: S,
    mirror: BTreeMap<S::Key, S::Value>,
}

/// The writes that lead from one state to another.
#[derive(Debug, PartialEq, Eq)]
pub struct Difference<K, V> {
    /// Missing entries.
    pub add: Vec<(K, V)>,
    /// Entries with another value.
    pub change: Vec<(K, V)>,
    /// Entries too many.
    pub remove: Vec<K>,
}

/// Compares the entries of `current` that lie in `scope` with `desired`, which lies in `scope`.
pub fn difference<K: Ord + Copy, V: PartialEq + Copy>(
    current: &BTreeMap<K, V>,
    scope: RangeInclusive<K>,
    desired: &BTreeMap<K, V>,
) -> Difference<K, V> {
    let mut d = Difference { add: Vec::new(), change: Vec::new(), remove: Vec::new() };
    for (k, v) in desired {
        match current.get(k) {
            None => d.add.push((*k, *v)),
            Some(old) if old != v => d.change.push((*k, *v)),
            Some(_) => {}
        }
    }
    d.remove = current.range(scope).map(|(k, _)| *k).filter(|k| !desired.contains_key(k)).collect();
    d
}

impl<S: Store> Table<S> {
    /// Reads what the map holds.
    pub fn new(name: &'static str, capacity: usize, store: S) -> Result<Self, CaptureError> {
        let mirror =
            store.entries().map_err(|reason| CaptureError::Bpf { action: format!("read map {name}"), reason })?;
        Ok(Self { name, capacity, store, mirror })
    }

    /// What the map holds.
    pub fn contents(&self) -> &BTreeMap<S::Key, S::Value> {
        &self.mirror
    }

    /// How many entries are used at most.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Would the map be large enough for `desired` in `scope`, beside what else it holds?
    pub fn check(
        &self,
        scope: RangeInclusive<S::Key>,
        desired: &BTreeMap<S::Key, S::Value>,
    ) -> Result<(), CaptureError> {
        let needed = self.mirror.len() - self.mirror.range(scope).count() + desired.len();
        if needed > self.capacity {
            return Err(CaptureError::Capacity { map: self.name, capacity: self.capacity, needed });
        }
        Ok(())
    }

    /// Makes the entries in `scope` those of `desired`: additions and changes before removals, as far as the map has
    /// room for both at once.
    pub fn reconcile(
        &mut self,
        scope: RangeInclusive<S::Key>,
        desired: &BTreeMap<S::Key, S::Value>,
    ) -> Result<(), CaptureError> {
        self.check(scope.clone(), desired)?;
        self.write(&difference(&self.mirror, scope, desired))
    }

    /// Makes single entries what `changes` says, absent where it says `None`; in the same order. Nothing is written when the map is too
    /// small.
    pub fn change(&mut self, changes: &BTreeMap<S::Key, Option<S::Value>>) -> Result<(), CaptureError> {
        let mut d = Difference { add: Vec::new(), change: Vec::new(), remove: Vec::new() };
        for (k, v) in changes {
            match (self.mirror.get(k), v) {
                (None, Some(v)) => d.add.push((*k, *v)),
                (Some(old), Some(v)) if old != v => d.change.push((*k, *v)),
                (Some(_), None) => d.remove.push(*k),
                _ => {}
            }
        }
        let needed = self.mirror.len() + d.add.len() - d.remove.len();
        if needed > self.capacity {
            return Err(CaptureError::Capacity { map: self.name, capacity: self.capacity, needed });
        }
        self.write(&d)
    }

    fn write(&mut self, difference: &Difference<S::Key, S::Value>) -> Result<(), CaptureError> {
        let Difference { add, change, remove } = difference;
        let room = self.capacity.saturating_sub(self.mirror.len()).min(add.len());
        for (k, v) in change.iter().chain(&add[..room]) {
            self.insert(*k, *v)?;
        }
        for k in remove {
            self.remove(k)?;
        }
        for (k, v) in &add[room..] {
            self.insert(*k, *v)?;
        }
        Ok(())
    }

    /// Inserts or replaces one entry.
    pub fn insert(&mut self, key: S::Key, value: S::Value) -> Result<(), CaptureError> {
        if !self.mirror.contains_key(&key) && self.mirror.len() >= self.capacity {
            let needed = self.mirror.len() + 1;
            return Err(CaptureError::Capacity { map: self.name, capacity: self.capacity, needed });
        }
        self.store
            .insert(&key, &value)
            .map_err(|reason| CaptureError::Bpf { action: format!("write map {}", self.name), reason })?;
        self.mirror.insert(key, value);
        Ok(())
    }

    /// Removes one entry, if there.
    pub fn remove(&mut self, key: &S::Key) -> Result<(), CaptureError> {
        if self.mirror.contains_key(key) {
            self.store
                .remove(key)
                .map_err(|reason| CaptureError::Bpf { action: format!("remove from map {}", self.name), reason })?;
            self.mirror.remove(key);
        }
        Ok(())
    }
}
