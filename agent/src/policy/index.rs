//! Which rows of a table a value satisfies, found without looking at every row.
//!
//! A table has a [`Dimension`] for each thing that is known of a connection. Each dimension narrows the set of rows that
//! can still match, so that a thousand rows cost a few hundred word operations. Memory is linear in the values that the
//! policies write down.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

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
    for row in rows {
        bits.set(*row as usize);
    }
    bits
}

/// Finds the patterns that match a value.
pub(super) trait Index {
    /// What policies write.
    type Pattern: Ord;
    /// What connections have.
    type Value: ?Sized;

    /// For a table of `width` rows.
    fn build(postings: BTreeMap<Self::Pattern, Posting>, width: usize) -> Self;
    /// Adds the rows of every pattern that matches.
    fn collect(&self, value: &Self::Value, into: &mut Bits);
}

/// Lists of wanted values that one row can have for one property: a source's field and a condition.
pub(super) const LISTS: usize = 2;

/// What the rows want of one property of a connection.
#[derive(Debug)]
pub(super) struct Dimension<I> {
    /// The first list of each row, the second one of those that have two.
    wanted: Vec<Wanted<I>>,
    /// Absent when no row excludes a value.
    excluded: Option<I>,
    /// Rows that neither want nor exclude anything.
    untouched: Bits,
}

/// One list of wanted values per row.
#[derive(Debug)]
struct Wanted<I> {
    index: I,
    /// Rows without such a list.
    indifferent: Bits,
}

impl<I: Index> Dimension<I> {
    /// Leaves alive the rows that `value` satisfies. An absent value is none that a row wants, and none that it excludes.
    pub(super) fn narrow(&self, value: Option<&I::Value>, alive: &mut Bits, scratch: &mut Bits) {
        for wanted in &self.wanted {
            scratch.copy_from(&wanted.indifferent);
            if let Some(value) = value {
                wanted.index.collect(value, scratch);
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
    wanted: [Rows<P>; LISTS],
    excluded: Rows<P>,
}

/// Rows by pattern, and all of them.
#[derive(Debug)]
struct Rows<P> {
    by_pattern: BTreeMap<P, Vec<u32>>,
    all: Vec<u32>,
}

impl<P> Default for Rows<P> {
    fn default() -> Self {
        Self { by_pattern: BTreeMap::new(), all: Vec::new() }
    }
}

impl<P> Default for DimensionBuilder<P> {
    fn default() -> Self {
        Self { wanted: Default::default(), excluded: Rows::default() }
    }
}

impl<P: Ord> Rows<P> {
    fn add(&mut self, row: u32, pattern: P) {
        push(self.by_pattern.entry(pattern).or_default(), row);
        push(&mut self.all, row);
    }

    fn index<I: Index<Pattern = P>>(self, width: usize) -> Option<I> {
        let postings = self.by_pattern.into_iter().map(|(pattern, rows)| (pattern, Posting::new(&rows, width)));
        (!self.all.is_empty()).then(|| I::build(postings.collect(), width))
    }
}

impl<P: Ord> DimensionBuilder<P> {
    /// In its `list`th list, row `row` wants this value, or another one of the list.
    pub(super) fn want(&mut self, list: usize, row: u32, pattern: P) {
        self.wanted[list].add(row, pattern);
    }

    /// Row `row` excludes this value.
    pub(super) fn exclude(&mut self, row: u32, pattern: P) {
        self.excluded.add(row, pattern);
    }

    pub(super) fn build<I: Index<Pattern = P>>(self, width: usize) -> Dimension<I> {
        let mut untouched = Bits::ones(width);
        untouched.remove(&bits(&self.excluded.all, width));
        let mut wanted = Vec::new();
        for rows in self.wanted {
            let wanting = bits(&rows.all, width);
            untouched.remove(&wanting);
            let mut indifferent = Bits::ones(width);
            indifferent.remove(&wanting);
            wanted.extend(rows.index(width).map(|index| Wanted { index, indifferent }));
        }
        Dimension { wanted, excluded: self.excluded.index(width), untouched }
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

    fn build(postings: BTreeMap<u16, Posting>, _: usize) -> Self {
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

    fn build(postings: BTreeMap<Arc<str>, Posting>, _: usize) -> Self {
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

    fn build(postings: BTreeMap<StringMatch, Posting>, width: usize) -> Self {
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
        Self { exact, prefixes: Nested::build(prefixes, width), suffixes: Nested::build(suffixes, width), present }
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

/// A pattern that covers every value with the same beginning. In order, what begins alike is together.
pub(super) trait Beginning: Ord {
    type Value: ?Sized;

    /// Its place in the order, compared with `value`.
    fn place(&self, value: &Self::Value) -> Ordering;
    /// How much of it must agree.
    fn length(&self) -> usize;
    /// How much of it agrees with `value`; `None` when nothing ever could.
    fn agreement(&self, value: &Self::Value) -> Option<usize>;
    /// Does it cover all that `other` covers?
    fn contains(&self, other: &Self) -> bool;
}

/// Patterns in order, each with the smallest one around it. All that cover a value are the last one at or before its
/// place or around that, and no longer than what that one has in common with the value.
#[derive(Debug)]
pub(super) struct Nested<B> {
    patterns: Vec<(B, Posting)>,
    around: Vec<Option<u32>>,
    /// Of every [`STRIDE`]th pattern of a nest, the rows of it and of all that are around it.
    unions: HashMap<u32, Bits>,
}

/// A search adds up at most so many postings one by one. More would cost time, fewer memory.
const STRIDE: usize = 16;

impl<B: Beginning> Index for Nested<B> {
    type Pattern = B;
    type Value = B::Value;

    fn build(postings: BTreeMap<B, Posting>, width: usize) -> Self {
        let patterns: Vec<(B, Posting)> = postings.into_iter().collect();
        let mut nested = Self { around: Vec::with_capacity(patterns.len()), patterns, unions: HashMap::new() };
        // What is open around the next pattern.
        let mut open: Vec<u32> = Vec::new();
        for (at, (pattern, _)) in nested.patterns.iter().enumerate() {
            while open.pop_if(|last| !nested.patterns[*last as usize].0.contains(pattern)).is_some() {}
            nested.around.push(open.last().copied());
            open.push(at as u32);
            if open.len().is_multiple_of(STRIDE) {
                let mut union = Bits::zeros(width);
                nested.collect_around(at as u32, usize::MAX, &mut union);
                nested.unions.insert(at as u32, union);
            }
        }
        nested
    }

    fn collect(&self, value: &B::Value, into: &mut Bits) {
        let after = self.patterns.partition_point(|(pattern, _)| pattern.place(value) != Ordering::Greater);
        let Some(last) = after.checked_sub(1) else { return };
        if let Some(agreement) = self.patterns[last].0.agreement(value) {
            self.collect_around(last as u32, agreement, into);
        }
    }
}

impl<B: Beginning> Nested<B> {
    /// Adds the rows of a pattern and of those around it, as far as they are no longer than `longest`.
    fn collect_around(&self, pattern: u32, longest: usize, into: &mut Bits) {
        let mut next = Some(pattern);
        while let Some(at) = next {
            let (pattern, posting) = &self.patterns[at as usize];
            if pattern.length() <= longest {
                if let Some(union) = self.unions.get(&at) {
                    return into.add(union);
                }
                posting.add_to(into);
            }
            next = self.around[at as usize];
        }
    }
}

/// How many items two sequences begin with in common.
fn in_common<T: PartialEq>(a: impl Iterator<Item = T>, b: impl Iterator<Item = T>) -> usize {
    a.zip(b).take_while(|(a, b)| a == b).count()
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Prefix(Arc<str>);

impl Beginning for Prefix {
    type Value = str;

    fn place(&self, value: &str) -> Ordering {
        (*self.0).cmp(value)
    }

    fn length(&self) -> usize {
        self.0.len()
    }

    fn agreement(&self, value: &str) -> Option<usize> {
        Some(in_common(self.0.bytes(), value.bytes()))
    }

    fn contains(&self, other: &Self) -> bool {
        other.0.starts_with(&*self.0)
    }
}

/// A suffix: the beginning of what is read from the end.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Suffix(Arc<str>);

impl Ord for Suffix {
    fn cmp(&self, other: &Self) -> Ordering {
        self.place(&other.0)
    }
}

impl PartialOrd for Suffix {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Beginning for Suffix {
    type Value = str;

    fn place(&self, value: &str) -> Ordering {
        self.0.bytes().rev().cmp(value.bytes().rev())
    }

    fn length(&self) -> usize {
        self.0.len()
    }

    fn agreement(&self, value: &str) -> Option<usize> {
        Some(in_common(self.0.bytes().rev(), value.bytes().rev()))
    }

    fn contains(&self, other: &Self) -> bool {
        other.0.ends_with(&*self.0)
    }
}

/// Networks are ordered by family, first address and length; an address is a network of full length.
impl Beginning for IpNet {
    type Value = IpNet;

    fn place(&self, value: &IpNet) -> Ordering {
        self.cmp(value)
    }

    fn length(&self) -> usize {
        self.prefix_len().into()
    }

    fn agreement(&self, value: &IpNet) -> Option<usize> {
        let zeros = match (self, value) {
            (IpNet::V4(a), IpNet::V4(b)) => (u32::from(a.addr()) ^ u32::from(b.addr())).leading_zeros(),
            (IpNet::V6(a), IpNet::V6(b)) => (u128::from(a.addr()) ^ u128::from(b.addr())).leading_zeros(),
            _ => return None,
        };
        Some(zeros as usize)
    }

    fn contains(&self, other: &Self) -> bool {
        IpNet::contains(self, other)
    }
}
