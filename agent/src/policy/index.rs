//! Which rows of a table a value satisfies, found without looking at every row.
//!
//! A table has a [`Dimension`] for each thing that is known of a connection. Each dimension narrows the set of rows that
//! can still match, so that a thousand rows cost a few hundred word operations. Memory is linear in the values that the
//! policies write down.

use std::{cmp::Ordering, collections::BTreeMap, collections::HashMap, sync::Arc};

use ipnet::IpNet;

use super::bits::Bits;
use crate::mesh::StringMatch;

/// Rows as a list, or as bits where that takes less room.
#[derive(Debug)]
pub(super) enum Posting {
    Few(Box<[u32]>),
    Many(Bits),
}

impl Posting {
    fn new(rows: &[u32], width: usize) -> Self {
        if rows.len() * u32::BITS as usize <= width {
            return Self::Few(rows.into());
        }
        Self::Many(bits(rows, width))
    }

    fn add_to(&self, into: &mut Bits) {
        match self {
            Self::Few(rows) => rows.iter().for_each(|row| into.set(*row as usize)),
            Self::Many(rows) => into.add(rows),
        }
    }
}

fn bits(rows: &[u32], width: usize) -> Bits {
    let mut bits = Bits::zeros(width);
    rows.iter().for_each(|row| bits.set(*row as usize));
    bits
}

/// Finds the patterns that match a value.
pub(super) trait Index {
    /// What policies write.
    type Pattern: Ord;
    /// What connections have.
    type Value: ?Sized;

    fn build(postings: BTreeMap<Self::Pattern, Posting>) -> Self;
    /// Adds the rows of every pattern that matches.
    fn collect(&self, value: &Self::Value, into: &mut Bits);
}

/// What the rows want of one property of a connection.
#[derive(Debug)]
pub(super) struct Dimension<I> {
    /// Absent when no row wants a particular value.
    wanted: Option<I>,
    /// Rows that want no particular value.
    indifferent: Bits,
    /// Absent when no row excludes a value.
    excluded: Option<I>,
    /// Rows that neither want nor exclude anything.
    untouched: Bits,
}

impl<I: Index> Dimension<I> {
    /// Leaves alive the rows that `value` satisfies. An absent value is none that a row wants, and none that it excludes.
    pub(super) fn narrow(&self, value: Option<&I::Value>, alive: &mut Bits, scratch: &mut Bits) {
        if let Some(wanted) = &self.wanted {
            scratch.copy_from(&self.indifferent);
            if let Some(value) = value {
                wanted.collect(value, scratch);
            }
            alive.keep(scratch);
        }
        if let (Some(excluded), Some(value)) = (&self.excluded, value) {
            scratch.clear_all();
            excluded.collect(value, scratch);
            alive.remove(scratch);
        }
    }

    /// Leaves alive the rows to which the value does not matter.
    pub(super) fn narrow_to_untouched(&self, alive: &mut Bits) {
        alive.keep(&self.untouched);
    }
}

/// Collects what the rows want, row by row.
#[derive(Debug)]
pub(super) struct DimensionBuilder<P> {
    wanted: BTreeMap<P, Vec<u32>>,
    excluded: BTreeMap<P, Vec<u32>>,
    wanting: Vec<u32>,
    touched: Vec<u32>,
}

impl<P> Default for DimensionBuilder<P> {
    fn default() -> Self {
        Self { wanted: BTreeMap::new(), excluded: BTreeMap::new(), wanting: Vec::new(), touched: Vec::new() }
    }
}

impl<P: Ord> DimensionBuilder<P> {
    /// Row `row` wants this value, or another one that is named for it.
    pub(super) fn want(&mut self, row: u32, pattern: P) {
        push(self.wanted.entry(pattern).or_default(), row);
        push(&mut self.wanting, row);
        push(&mut self.touched, row);
    }

    /// Row `row` excludes this value.
    pub(super) fn exclude(&mut self, row: u32, pattern: P) {
        push(self.excluded.entry(pattern).or_default(), row);
        push(&mut self.touched, row);
    }

    pub(super) fn build<I: Index<Pattern = P>>(self, width: usize) -> Dimension<I> {
        let without = |rows: &[u32]| {
            let mut bits = Bits::ones(width);
            rows.iter().for_each(|row| bits.clear(*row as usize));
            bits
        };
        let index = |postings: BTreeMap<P, Vec<u32>>| {
            (!postings.is_empty())
                .then(|| I::build(postings.into_iter().map(|(p, rows)| (p, Posting::new(&rows, width))).collect()))
        };
        Dimension {
            indifferent: without(&self.wanting),
            untouched: without(&self.touched),
            wanted: index(self.wanted),
            excluded: index(self.excluded),
        }
    }
}

/// Rows come in ascending order, so a repetition is the last one.
fn push(rows: &mut Vec<u32>, row: u32) {
    if rows.last() != Some(&row) {
        rows.push(row);
    }
}

impl Index for HashMap<u16, Posting> {
    type Pattern = u16;
    type Value = u16;

    fn build(postings: BTreeMap<u16, Posting>) -> Self {
        postings.into_iter().collect()
    }

    fn collect(&self, value: &u16, into: &mut Bits) {
        if let Some(posting) = self.get(value) {
            posting.add_to(into);
        }
    }
}

impl Index for HashMap<Arc<str>, Posting> {
    type Pattern = Arc<str>;
    type Value = str;

    fn build(postings: BTreeMap<Arc<str>, Posting>) -> Self {
        postings.into_iter().collect()
    }

    fn collect(&self, value: &str, into: &mut Bits) {
        if let Some(posting) = self.get(value) {
            posting.add_to(into);
        }
    }
}

/// Exact strings by hash, prefixes and suffixes by order.
#[derive(Debug)]
pub(super) struct StringIndex {
    exact: HashMap<Arc<str>, Posting>,
    prefixes: Nested<Prefix>,
    suffixes: Nested<Suffix>,
    present: Option<Posting>,
}

impl Index for StringIndex {
    type Pattern = StringMatch;
    type Value = str;

    fn build(postings: BTreeMap<StringMatch, Posting>) -> Self {
        let (mut exact, mut prefixes, mut suffixes) = (HashMap::new(), BTreeMap::new(), BTreeMap::new());
        let mut present = None;
        for (pattern, posting) in postings {
            match pattern {
                StringMatch::Exact(text) => drop(exact.insert(text, posting)),
                StringMatch::Prefix(text) => drop(prefixes.insert(Prefix(text), posting)),
                StringMatch::Suffix(text) => drop(suffixes.insert(Suffix(text), posting)),
                StringMatch::Present => present = Some(posting),
            }
        }
        Self { exact, prefixes: Nested::build(prefixes), suffixes: Nested::build(suffixes), present }
    }

    fn collect(&self, value: &str, into: &mut Bits) {
        self.exact.collect(value, into);
        self.prefixes.collect(value, into);
        self.suffixes.collect(value, into);
        if let Some(posting) = &self.present {
            posting.add_to(into);
        }
    }
}

/// A pattern that stands for a range of an order, where two ranges are nested or apart.
pub(super) trait Range: Ord {
    type Value: ?Sized;

    /// Where the range begins, compared with `value`.
    fn begins(&self, value: &Self::Value) -> Ordering;
    fn covers(&self, value: &Self::Value) -> bool;
    /// `self` comes before `other`; does it contain it?
    fn contains(&self, other: &Self) -> bool;
}

/// Patterns in order, each with the smallest one around it. All that cover a value are the last one that begins at or
/// before it, as far as it covers it, and those around.
#[derive(Debug)]
pub(super) struct Nested<R> {
    ranges: Vec<(R, Posting)>,
    around: Vec<Option<u32>>,
}

impl<R: Range> Index for Nested<R> {
    type Pattern = R;
    type Value = R::Value;

    fn build(postings: BTreeMap<R, Posting>) -> Self {
        let ranges: Vec<(R, Posting)> = postings.into_iter().collect();
        let mut around = Vec::with_capacity(ranges.len());
        let mut open: Vec<usize> = Vec::new();
        for (i, (range, _)) in ranges.iter().enumerate() {
            while open.pop_if(|last| !ranges[*last].0.contains(range)).is_some() {}
            around.push(open.last().map(|outer| *outer as u32));
            open.push(i);
        }
        Self { ranges, around }
    }

    fn collect(&self, value: &R::Value, into: &mut Bits) {
        let after = self.ranges.partition_point(|(range, _)| range.begins(value) != Ordering::Greater);
        let mut next = after.checked_sub(1);
        while let Some(at) = next {
            let (range, posting) = &self.ranges[at];
            if range.covers(value) {
                posting.add_to(into);
            }
            next = self.around[at].map(|outer| outer as usize);
        }
    }
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Prefix(Arc<str>);

impl Range for Prefix {
    type Value = str;

    fn begins(&self, value: &str) -> Ordering {
        (*self.0).cmp(value)
    }

    fn covers(&self, value: &str) -> bool {
        value.starts_with(&*self.0)
    }

    fn contains(&self, other: &Self) -> bool {
        self.covers(&other.0)
    }
}

/// A prefix, read from the end.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Suffix(Arc<str>);

impl Ord for Suffix {
    fn cmp(&self, other: &Self) -> Ordering {
        self.begins(&other.0)
    }
}

impl PartialOrd for Suffix {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Range for Suffix {
    type Value = str;

    fn begins(&self, value: &str) -> Ordering {
        self.0.bytes().rev().cmp(value.bytes().rev())
    }

    fn covers(&self, value: &str) -> bool {
        value.ends_with(&*self.0)
    }

    fn contains(&self, other: &Self) -> bool {
        self.covers(&other.0)
    }
}

/// Networks are ordered by family, first address and length; an address is a network of full length.
impl Range for IpNet {
    type Value = IpNet;

    fn begins(&self, value: &IpNet) -> Ordering {
        self.cmp(value)
    }

    fn covers(&self, value: &IpNet) -> bool {
        IpNet::contains(self, value)
    }

    fn contains(&self, other: &Self) -> bool {
        IpNet::contains(self, other)
    }
}
