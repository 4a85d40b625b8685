//! The series of Istio's TCP metrics, never more than a limit: who scans the mesh must not fill the memory of the agent, nor of whoever
//! scrapes it.
//!
//! A connection holds its series from its beginning to its end, so counting takes no lock. Series that nobody has used for a while give
//! way to new ones; while there is no room, connections are counted under labels whose values are `other`.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock, RwLockWriteGuard,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use super::labels::{FLAGS, Labels, Reporter, ResponseFlag};

/// Samples that every set of labels has: connections opened, closed in order and open, bytes sent and received.
const SAMPLES: usize = 5;
/// Samples of the rest, for both reporters and all flags: they always have room.
const RESERVED: usize = 2 * (SAMPLES + 2 * FLAGS - 1);
/// A series in whose way nobody is goes after this time without a connection.
const EXPIRY: Duration = Duration::from_hours(1);
/// A series is not taken away for another before this time without a connection: a few intervals between scrapes, so that nothing that
/// is counted goes unseen.
const KEPT: Duration = Duration::from_mins(5);
/// Looking for series to take away reads all of them, so it is not done more often than this.
const SWEEP: Duration = Duration::from_secs(1);

/// What is counted under one set of labels.
#[derive(Debug, Default)]
pub struct Series {
    opened: AtomicU64,
    closed: [AtomicU64; FLAGS],
    failed: [AtomicU64; FLAGS],
    sent: AtomicU64,
    received: AtomicU64,
    /// When it was last used, in seconds after the agent's start.
    used: AtomicU64,
}

impl Series {
    /// Connections that were established.
    pub fn opened(&self) -> u64 {
        self.opened.load(Relaxed)
    }

    /// Established connections that ended so.
    pub fn closed(&self, flag: ResponseFlag) -> u64 {
        self.closed[flag as usize].load(Relaxed)
    }

    /// Established connections that have not ended.
    pub fn open(&self) -> u64 {
        // Ends are read first: what begins and ends in between must not make it negative.
        let closed: u64 = self.closed.iter().map(|n| n.load(Relaxed)).sum();
        self.opened().saturating_sub(closed)
    }

    /// Connections that were not established, and why.
    pub fn failed(&self, flag: ResponseFlag) -> u64 {
        self.failed[flag as usize].load(Relaxed)
    }

    /// Bytes from the server to the client, as Istio means it.
    pub fn sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    /// Bytes from the client to the server.
    pub fn received(&self) -> u64 {
        self.received.load(Relaxed)
    }

    /// Counts bytes.
    pub(super) fn moved(&self, sent: u64, received: u64) {
        self.sent.fetch_add(sent, Relaxed);
        self.received.fetch_add(received, Relaxed);
    }

    /// Samples it has beside the usual ones.
    fn extra(&self) -> usize {
        self.closed.iter().skip(1).chain(&self.failed).filter(|n| n.load(Relaxed) > 0).count()
    }
}

/// All series.
#[derive(Debug)]
pub struct Traffic {
    start: Instant,
    limit: usize,
    series: RwLock<HashMap<Arc<Labels>, Arc<Series>>>,
    /// For what there is no room for, by reporter.
    other: [(Arc<Labels>, Arc<Series>); 2],
    /// Samples that all series have together.
    samples: AtomicUsize,
    /// Connections that were counted under `other`.
    overflow: AtomicU64,
    /// When series were last looked for that could go, in milliseconds after the start.
    swept: AtomicU64,
}

impl Traffic {
    /// Fewest samples that can be asked for: both sets of labels for the rest must fit.
    pub const MIN_LIMIT: usize = 100;

    /// With at most `limit` samples in all, at least [`Self::MIN_LIMIT`].
    pub fn new(limit: usize) -> Self {
        let other = Reporter::ALL.map(|reporter| (Arc::new(Labels::other(reporter)), Arc::default()));
        Self {
            start: Instant::now(),
            limit: limit.max(Self::MIN_LIMIT),
            series: RwLock::default(),
            samples: AtomicUsize::new(RESERVED),
            other,
            overflow: AtomicU64::new(0),
            swept: AtomicU64::new(0),
        }
    }

    /// Most samples there may be.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Samples there are.
    pub fn samples(&self) -> usize {
        self.samples.load(Relaxed)
    }

    /// Connections that were counted under `other`.
    pub fn overflow(&self) -> u64 {
        self.overflow.load(Relaxed)
    }

    /// Counts a connection that is established. It keeps what this returns until it ends.
    pub fn open(&self, labels: Labels) -> (Arc<Labels>, Arc<Series>) {
        let (labels, series) = self.find(labels);
        series.opened.fetch_add(1, Relaxed);
        (labels, series)
    }

    /// Counts the end of a connection. Where there is no room for one more sample it is one that ended in order: it must not stay open.
    pub fn close(&self, series: &Series, flag: ResponseFlag) {
        self.touch(series);
        let counter = &series.closed[flag as usize];
        if flag == ResponseFlag::None || self.has_room(series, counter) {
            counter.fetch_add(1, Relaxed);
        } else {
            self.overflow.fetch_add(1, Relaxed);
            series.closed[ResponseFlag::None as usize].fetch_add(1, Relaxed);
        }
    }

    /// Counts a connection that was not established.
    pub fn fail(&self, labels: Labels, flag: ResponseFlag) -> Arc<Labels> {
        let (labels, series) = self.find(labels);
        let counter = &series.failed[flag as usize];
        if self.has_room(&series, counter) {
            counter.fetch_add(1, Relaxed);
        } else {
            self.overflow.fetch_add(1, Relaxed);
            let (_, other) = &self.other[labels.reporter as usize];
            other.failed[flag as usize].fetch_add(1, Relaxed);
        }
        labels
    }

    /// Everything there is to expose, after what has not been used for long is gone.
    pub fn exposed(&self) -> Vec<(Arc<Labels>, Arc<Series>)> {
        let mut all = self.write();
        self.expire(&mut all, EXPIRY);
        let rest = self.other.iter().filter(|(_, s)| s.opened() > 0 || s.extra() > 0).cloned();
        all.iter().map(|(l, s)| (Arc::clone(l), Arc::clone(s))).chain(rest).collect()
    }

    fn find(&self, labels: Labels) -> (Arc<Labels>, Arc<Series>) {
        let found = |(labels, series): (&Arc<Labels>, &Arc<Series>)| {
            self.touch(series);
            (Arc::clone(labels), Arc::clone(series))
        };
        let all = self.series.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = all.get_key_value(&labels) {
            return found(known);
        }
        drop(all);
        let mut all = self.write();
        // Another connection may have been quicker.
        if let Some(known) = all.get_key_value(&labels) {
            return found(known);
        }
        if !self.reserve(SAMPLES) {
            self.sweep(&mut all);
            if !self.reserve(SAMPLES) {
                self.overflow.fetch_add(1, Relaxed);
                let (_, series) = &self.other[labels.reporter as usize];
                // The access log still says who it was.
                return (Arc::new(labels), Arc::clone(series));
            }
        }
        let new = (Arc::new(labels), Arc::<Series>::default());
        self.touch(&new.1);
        all.insert(Arc::clone(&new.0), Arc::clone(&new.1));
        new
    }

    /// Whether a sample of a series may appear, if it has not already.
    fn has_room(&self, series: &Series, counter: &AtomicU64) -> bool {
        let rest = self.other.iter().any(|(_, other)| std::ptr::eq(&raw const **other, series));
        rest || counter.load(Relaxed) > 0 || self.reserve(1)
    }

    fn reserve(&self, samples: usize) -> bool {
        let fits = |n: usize| (n + samples <= self.limit).then_some(n + samples);
        self.samples.fetch_update(Relaxed, Relaxed, fits).is_ok()
    }

    fn sweep(&self, all: &mut HashMap<Arc<Labels>, Arc<Series>>) {
        let now = self.start.elapsed().as_millis() as u64;
        let last = self.swept.load(Relaxed);
        if last == 0 || now.saturating_sub(last) >= SWEEP.as_millis() as u64 {
            self.swept.store(now.max(1), Relaxed);
            self.expire(all, KEPT);
        }
    }

    /// Takes away series without connections that have not been used for `idle`.
    fn expire(&self, all: &mut HashMap<Arc<Labels>, Arc<Series>>, idle: Duration) {
        let now = self.start.elapsed().as_secs();
        all.retain(|_, series| {
            let unused = now.saturating_sub(series.used.load(Relaxed)) >= idle.as_secs();
            !unused || Arc::strong_count(series) > 1
        });
        // Counted anew: two connections that began a sample together have both taken room for it.
        self.samples.store(RESERVED + all.values().map(|s| SAMPLES + s.extra()).sum::<usize>(), Relaxed);
    }

    fn touch(&self, series: &Series) {
        series.used.store(self.start.elapsed().as_secs(), Relaxed);
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<Arc<Labels>, Arc<Series>>> {
        self.series.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
impl Traffic {
    /// As if every series had last been used `age` earlier than it was.
    pub(super) fn age(&mut self, age: Duration) {
        self.start = self.start.checked_sub(age).expect("the machine runs longer than that");
    }
}
