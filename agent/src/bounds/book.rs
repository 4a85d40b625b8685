//! Who is in a pool, in the order in which they would yield. Every operation takes constant time.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::Arc,
    time::{Duration, Instant},
};

use slab::Slab;

use super::{Rule, pool::Alarm};

/// No index.
const NONE: u32 = u32::MAX;
/// Places that an empty book keeps its memory for.
const KEPT: usize = 64;
/// Members of a source above its share have this part of the grace.
const HURRY: u32 = 10;
/// Members that are asked whether they are silent before all of them count as busy. The longer
/// somebody is there, the less is left to do for him, so it is nearly always the first.
const LOOKED_AT: usize = 128;

/// Neighbours in a list.
#[derive(Clone, Copy)]
struct Link {
    before: u32,
    after: u32,
}

impl Link {
    const ALONE: Self = Self { before: NONE, after: NONE };
}

/// Both ends of a list through a slab.
#[derive(Clone, Copy)]
struct List {
    first: u32,
    last: u32,
}

impl List {
    const EMPTY: Self = Self { first: NONE, last: NONE };

    /// Appends `index`. `links` finds the neighbours of an index in this list.
    fn push<T>(&mut self, slab: &mut Slab<T>, links: fn(&mut T) -> &mut Link, index: u32) {
        *links(&mut slab[index as usize]) = Link { before: self.last, after: NONE };
        match self.last {
            NONE => self.first = index,
            last => links(&mut slab[last as usize]).after = index,
        }
        self.last = index;
    }

    /// Takes `index` out.
    fn cut<T>(&mut self, slab: &mut Slab<T>, links: fn(&mut T) -> &mut Link, index: u32) {
        let Link { before, after } = std::mem::replace(links(&mut slab[index as usize]), Link::ALONE);
        match before {
            NONE => self.first = after,
            before => links(&mut slab[before as usize]).after = after,
        }
        match after {
            NONE => self.last = before,
            after => links(&mut slab[after as usize]).before = before,
        }
    }
}

struct Member {
    source: u32,
    /// When it came, or last got on.
    since: Instant,
    /// It has proved who it is: it stays, and is in no list.
    trusted: bool,
    /// Among all.
    all: Link,
    /// Among those of its source.
    own: Link,
    alarm: Arc<Alarm>,
}

struct Source<S> {
    name: S,
    /// Places that members have or had trusted.
    members: u32,
    /// Those that may yield.
    strangers: u32,
    list: List,
    /// Among sources with as many strangers.
    peers: Link,
}

/// The members of a pool.
pub(super) struct Book<S> {
    members: Slab<Member>,
    sources: Slab<Source<S>>,
    names: HashMap<S, u32>,
    /// Members that may yield, the one that has not got on for longest first.
    strangers: List,
    /// Sources by their number of strangers; place 0 is never used.
    by_number: Vec<List>,
    /// The largest of these numbers.
    most: usize,
}

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// Somebody may yield then, unless the peer says something.
    Until(Instant),
    /// Nobody is silent.
    Busy,
}

impl<S: Hash + Eq + Clone> Book<S> {
    pub(super) fn new() -> Self {
        Self {
            members: Slab::new(),
            sources: Slab::new(),
            names: HashMap::new(),
            strangers: List::EMPTY,
            by_number: Vec::new(),
            most: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// Members of a source.
    #[cfg(test)]
    pub(super) fn of(&self, source: &S) -> usize {
        self.names.get(source).map_or(0, |index| self.sources[*index as usize].members as usize)
    }

    /// A place for a newcomer, and who loses it, if anybody does.
    pub(super) fn enter(
        &mut self,
        name: &S,
        alarm: Arc<Alarm>,
        rule: &Rule,
        now: Instant,
    ) -> Result<(u32, Option<Arc<Alarm>>), Taken> {
        let mut evicted = None;
        if let Some(first) = self.exhausted(name, rule) {
            let victim = self.silent(first, |m| m.own.after, rule.grace / HURRY, now)?;
            evicted = Some(self.remove(victim));
        } else if self.members.len() >= rule.total {
            let victim = self.victim(rule, now)?;
            evicted = Some(self.remove(victim));
        }
        let source = self.names.get(name).copied().unwrap_or_else(|| {
            let new = Source { name: name.clone(), members: 0, strangers: 0, list: List::EMPTY, peers: Link::ALONE };
            let source = self.sources.insert(new) as u32;
            self.names.insert(name.clone(), source);
            source
        });
        self.sources[source as usize].members += 1;
        let new = Member { source, since: now, trusted: false, all: Link::ALONE, own: Link::ALONE, alarm };
        let member = self.members.insert(new) as u32;
        self.link(member);
        self.count(source, 1);
        Ok((member, evicted))
    }

    /// The first of a source's members when the source may not have another one.
    fn exhausted(&self, name: &S, rule: &Rule) -> Option<u32> {
        let source = &self.sources[*self.names.get(name).filter(|_| rule.strict)? as usize];
        (source.members as usize >= rule.share).then_some(source.list.first)
    }

    /// Who yields now: of the source with the most, if that is more than its share, else of all.
    fn victim(&self, rule: &Rule, now: Instant) -> Result<u32, Taken> {
        let mut taken = Taken::Busy;
        if self.most > rule.share {
            let source = self.by_number[self.most].first;
            let first = self.sources[source as usize].list.first;
            match self.silent(first, |m| m.own.after, rule.grace / HURRY, now) {
                Ok(member) => return Ok(member),
                Err(why) => taken = why,
            }
        }
        self.silent(self.strangers.first, |m| m.all.after, rule.grace, now).map_err(|why| match (taken, why) {
            (Taken::Until(one), Taken::Until(other)) => Taken::Until(one.min(other)),
            (Taken::Busy, until) | (until, Taken::Busy) => until,
        })
    }

    /// The first in a list that is silent and has been there for the grace.
    fn silent(&self, first: u32, after: fn(&Member) -> u32, grace: Duration, now: Instant) -> Result<u32, Taken> {
        let mut next = first;
        for _ in 0..LOOKED_AT {
            let Some(member) = self.members.get(next as usize) else { break };
            if member.since + grace > now {
                return Err(Taken::Until(member.since + grace));
            }
            if member.alarm.is_silent() {
                return Ok(next);
            }
            next = after(member);
        }
        Err(Taken::Busy)
    }

    /// A member has got on: its time begins again.
    pub(super) fn progress(&mut self, member: u32, whose: &Arc<Alarm>, now: Instant) {
        if self.has(member, whose) && !self.members[member as usize].trusted {
            self.unlink(member);
            self.members[member as usize].since = now;
            self.link(member);
        }
    }

    /// It never yields again.
    pub(super) fn trust(&mut self, member: u32, whose: &Arc<Alarm>) {
        if self.has(member, whose) && !self.members[member as usize].trusted {
            self.unlink(member);
            self.members[member as usize].trusted = true;
            self.count(self.members[member as usize].source, -1);
        }
    }

    /// Takes a member out; `false` when it had been evicted before.
    pub(super) fn leave(&mut self, member: u32, whose: &Arc<Alarm>) -> bool {
        let there = self.has(member, whose);
        if there {
            self.remove(member);
            self.shrink();
        }
        there
    }

    /// Is the place still `whose`? It may be a newcomer's by now.
    fn has(&self, member: u32, whose: &Arc<Alarm>) -> bool {
        self.members.get(member as usize).is_some_and(|m| Arc::ptr_eq(&m.alarm, whose))
    }

    fn remove(&mut self, member: u32) -> Arc<Alarm> {
        let source = self.members[member as usize].source;
        if !self.members[member as usize].trusted {
            self.unlink(member);
            self.count(source, -1);
        }
        let alarm = self.members.remove(member as usize).alarm;
        let of = &mut self.sources[source as usize];
        of.members -= 1;
        if of.members == 0 {
            let gone = self.sources.remove(source as usize);
            self.names.remove(&gone.name);
        }
        alarm
    }

    /// Puts a member at the end of both lists.
    fn link(&mut self, member: u32) {
        self.strangers.push(&mut self.members, |m| &mut m.all, member);
        let source = self.members[member as usize].source as usize;
        self.sources[source].list.push(&mut self.members, |m| &mut m.own, member);
    }

    fn unlink(&mut self, member: u32) {
        self.strangers.cut(&mut self.members, |m| &mut m.all, member);
        let source = self.members[member as usize].source as usize;
        self.sources[source].list.cut(&mut self.members, |m| &mut m.own, member);
    }

    /// Puts a source where its new number of strangers belongs.
    fn count(&mut self, source: u32, change: i32) {
        let before = self.sources[source as usize].strangers as usize;
        let after = before.saturating_add_signed(change as isize);
        self.sources[source as usize].strangers = after as u32;
        if before > 0 {
            self.by_number[before].cut(&mut self.sources, |s| &mut s.peers, source);
        }
        if after > 0 {
            if self.by_number.len() <= after {
                self.by_number.resize(after + 1, List::EMPTY);
            }
            self.by_number[after].push(&mut self.sources, |s| &mut s.peers, source);
        }
        if after > self.most {
            self.most = after;
        } else if before == self.most && self.by_number[before].first == NONE {
            // This source is now the largest, with one less.
            self.most = after;
        }
    }

    /// A pod that was flooded once must not keep the memory for as long as it lives.
    fn shrink(&mut self) {
        if self.members.is_empty() && self.members.capacity().max(self.by_number.capacity()) > KEPT {
            *self = Self::new();
        }
    }
}
