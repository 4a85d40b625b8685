use std::{collections::BTreeMap, sync::Mutex};

use proptest::prelude::*;

use super::super::{
    CaptureError,
    table::{Store, Table, difference},
};

/// A map that refuses to grow beyond its capacity, as the kernel's do, and keeps the order of writes.
struct Fake {
    capacity: usize,
    map: BTreeMap<u16, u8>,
    writes: Mutex<Vec<(char, u16)>>,
    broken: Option<u16>,
}

impl Fake {
    fn new(capacity: usize, entries: &[(u16, u8)]) -> Self {
        Self { capacity, map: entries.iter().copied().collect(), writes: Mutex::default(), broken: None }
    }

    fn log(&self, what: char, key: u16) {
        self.writes.lock().unwrap().push((what, key));
    }
}

impl Store for &mut Fake {
    type Key = u16;
    type Value = u8;

    fn entries(&self) -> Result<BTreeMap<u16, u8>, String> {
        Ok(self.map.clone())
    }

    fn insert(&mut self, key: &u16, value: &u8) -> Result<(), String> {
        if self.broken == Some(*key) {
            return Err("EIO".to_owned());
        }
        if !self.map.contains_key(key) && self.map.len() == self.capacity {
            return Err("ENOSPC".to_owned());
        }
        self.log('+', *key);
        self.map.insert(*key, *value);
        Ok(())
    }

    fn remove(&mut self, key: &u16) -> Result<(), String> {
        self.log('-', *key);
        self.map.remove(key);
        Ok(())
    }
}

fn desired(entries: &[(u16, u8)]) -> BTreeMap<u16, u8> {
    entries.iter().copied().collect()
}

#[test]
fn only_differences_are_written_additions_first() {
    let mut fake = Fake::new(10, &[(1, 1), (2, 2), (3, 3), (20, 9)]);
    let mut table = Table::new("TEST", 10, &mut fake).unwrap();
    table.reconcile(0..=9, &desired(&[(2, 2), (3, 4), (5, 5)])).unwrap();
    assert_eq!(*table.contents(), desired(&[(2, 2), (3, 4), (5, 5), (20, 9)]), "what is out of scope stays");
    assert_eq!(*fake.writes.lock().unwrap(), [('+', 3), ('+', 5), ('-', 1)]);
}

#[test]
fn nothing_is_written_when_the_map_is_too_small() {
    let mut fake = Fake::new(3, &[(1, 1), (20, 9)]);
    let mut table = Table::new("TEST", 3, &mut fake).unwrap();
    let error = table.reconcile(0..=9, &desired(&[(2, 2), (3, 3), (4, 4)])).unwrap_err();
    assert!(matches!(error, CaptureError::Capacity { map: "TEST", capacity: 3, needed: 4 }), "{error}");
    assert!(fake.writes.lock().unwrap().is_empty());
}

#[test]
fn a_full_map_is_replaced_as_room_allows() {
    let mut fake = Fake::new(3, &[(1, 1), (2, 2)]);
    let mut table = Table::new("TEST", 3, &mut fake).unwrap();
    table.reconcile(0..=9, &desired(&[(3, 3), (4, 4), (5, 5)])).unwrap();
    assert_eq!(*fake.writes.lock().unwrap(), [('+', 3), ('-', 1), ('-', 2), ('+', 4), ('+', 5)]);
    assert_eq!(fake.map, desired(&[(3, 3), (4, 4), (5, 5)]));
}

#[test]
fn a_failed_write_is_tried_again_the_next_time() {
    let mut fake = Fake::new(10, &[]);
    fake.broken = Some(2);
    let mut table = Table::new("TEST", 10, &mut fake).unwrap();
    let error = table.reconcile(0..=9, &desired(&[(1, 1), (2, 2)])).unwrap_err();
    assert_eq!(error.to_string(), "write map TEST: EIO");
    assert_eq!(*table.contents(), desired(&[(1, 1)]));
    drop(table);
    fake.broken = None;
    let mut table = Table::new("TEST", 10, &mut fake).unwrap();
    table.reconcile(0..=9, &desired(&[(1, 1), (2, 2)])).unwrap();
    assert_eq!(*fake.writes.lock().unwrap(), [('+', 1), ('+', 2)]);
}

proptest! {
    #[test]
    fn any_state_leads_to_any_other(
        before in proptest::collection::btree_map(0u16..40, 0u8..4, 0..20),
        after in proptest::collection::btree_map(0u16..20, 0u8..4, 0..20),
    ) {
        let entries: Vec<_> = before.iter().map(|(k, v)| (*k, *v)).collect();
        let mut expected: BTreeMap<_, _> = before.range(20..).map(|(k, v)| (*k, *v)).collect();
        expected.extend(after.iter());
        let capacity = before.len().max(expected.len());
        let mut fake = Fake::new(capacity, &entries);
        let mut table = Table::new("TEST", capacity, &mut fake).unwrap();
        table.reconcile(0..=19, &after).unwrap();
        prop_assert_eq!(table.contents(), &expected);
        prop_assert_eq!(&fake.map, &expected);
        let again = difference(&expected, 0..=19, &after);
        prop_assert!(again.add.is_empty() && again.change.is_empty() && again.remove.is_empty());
    }
    #[test]
    fn changes_lead_where_all_of_it_does(
        before in proptest::collection::btree_map(0u16..40, 0u8..4, 0..20),
        changes in proptest::collection::btree_map(0u16..40, proptest::option::of(0u8..4), 0..20),
    ) {
        let entries: Vec<_> = before.iter().map(|(k, v)| (*k, *v)).collect();
        let mut after = before.clone();
        for (key, value) in &changes {
            match value {
                Some(value) => drop(after.insert(*key, *value)),
                None => drop(after.remove(key)),
            }
        }
        let capacity = before.len().max(after.len());
        let (mut by_changes, mut by_all) = (Fake::new(capacity, &entries), Fake::new(capacity, &entries));
        Table::new("TEST", capacity, &mut by_changes).unwrap().change(&changes).unwrap();
        Table::new("TEST", capacity, &mut by_all).unwrap().reconcile(0..=u16::MAX, &after).unwrap();
        prop_assert_eq!(&by_changes.map, &after);
        prop_assert_eq!(by_changes.writes.lock().unwrap().clone(), by_all.writes.lock().unwrap().clone());
        if after.len() > before.len() {
            let mut fake = Fake::new(after.len() - 1, &entries);
            let refused = Table::new("TEST", after.len() - 1, &mut fake).unwrap().change(&changes);
            let too_small = matches!(refused, Err(CaptureError::Capacity { .. }));
            prop_assert!(too_small);
            prop_assert_eq!(&fake.map, &before);
        }
    }
}
