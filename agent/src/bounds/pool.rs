//! Places for peers that have proved nothing yet.

use std::{
    fmt,
    future::{Future, poll_fn},
    hash::Hash,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Instant,
};

use futures_util::task::AtomicWaker;
use tokio::{sync::Notify, time::timeout_at};

use super::{
    Rule,
    book::{Book, Taken},
};

/// Places of which a newcomer always gets one as long as somebody is silent.
pub struct Pool<S> {
    rule: Rule,
    /// Without memory of its own until the first use: most pods of a node never need all of their
    /// pools.
    book: Mutex<Option<Box<Book<S>>>>,
    /// Told when a place is free, or somebody falls silent.
    change: Notify,
    /// Newcomers that wait for that.
    waiting: AtomicUsize,
}

/// There is no place, because everybody who has one is being served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("every place is taken by somebody who is being served; try again")]
pub struct Full {
    until: Option<Instant>,
}

/// The place was given to a newcomer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("nothing was heard, and the place was given to somebody else")]
pub struct Evicted;

/// Wakes a member's task, and knows whose turn it is.
#[derive(Default)]
pub(super) struct Alarm {
    task: AtomicWaker,
    /// The task waits: it is the peer's turn.
    waits: AtomicBool,
    /// Something came that the task has not looked at yet.
    woken: AtomicBool,
    /// Somebody works for it.
    serving: AtomicBool,
    evicted: AtomicBool,
    trusted: AtomicBool,
}

impl Alarm {
    /// Is everybody waiting for the peer?
    pub(super) fn is_silent(&self) -> bool {
        let is = |flag: &AtomicBool| flag.load(Ordering::Acquire);
        is(&self.waits) && !is(&self.woken) && !is(&self.serving)
    }

    #[cfg(test)]
    pub(super) fn waits(&self, waits: bool) {
        self.waits.store(waits, Ordering::Release);
    }

    fn evict(&self) {
        self.evicted.store(true, Ordering::Release);
        self.task.wake();
    }
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.task.wake();
    }
}

impl<S: Hash + Eq + Clone> Pool<S> {
    /// An empty pool; it has no memory of its own until its first use.
    pub fn new(rule: Rule) -> Arc<Self> {
        Arc::new(Self { rule, book: Mutex::default(), change: Notify::new(), waiting: AtomicUsize::new(0) })
    }

    /// A place for a newcomer from `source`, if there is one or somebody yields.
    pub fn try_enter(self: &Arc<Self>, source: &S) -> Result<Entry<S>, Full> {
        let alarm = Arc::new(Alarm::default());
        let entered = self.with(|book| book.enter(source, Arc::clone(&alarm), &self.rule, Instant::now()));
        match entered {
            Ok((member, evicted)) => {
                if let Some(evicted) = evicted {
                    self.rule.bound.evicted();
                    evicted.evict();
                }
                let waker = Waker::from(Arc::clone(&alarm));
                Ok(Entry { pool: Arc::clone(self), member, alarm, waker })
            }
            Err(Taken::Until(until)) => Err(Full { until: Some(until) }),
            Err(Taken::Busy) => Err(Full { until: None }),
        }
    }

    /// Waits for a place: until a member leaves or has been silent for long enough.
    pub async fn enter(self: &Arc<Self>, source: &S) -> Entry<S> {
        match self.try_enter(source) {
            Ok(entry) => entry,
            // Boxed: a thousand accept loops have this future, and hardly one of them ever waits.
            Err(_) => Box::pin(self.wait(source)).await,
        }
    }

    async fn wait(self: &Arc<Self>, source: &S) -> Entry<S> {
        let _waiting = Waiting::among(&self.waiting);
        loop {
            let change = self.change.notified();
            let full = match self.try_enter(source) {
                Ok(entry) => {
                    // There may be room for another one that waits.
                    self.change.notify_one();
                    return entry;
                }
                Err(full) => full,
            };
            // When all are busy: until somebody falls silent, or after a while, because not every
            // member is looked at each time.
            let until = full.until.unwrap_or_else(|| Instant::now() + self.rule.grace);
            let _ = timeout_at(until.into(), change).await;
        }
    }

    /// Counts a newcomer that is sent away for want of a place.
    pub fn refuse(&self) {
        self.rule.bound.refused();
    }

    /// Members now.
    pub fn len(&self) -> usize {
        self.with(|book| book.len())
    }

    /// Is nobody in it?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[cfg(test)]
    pub(super) fn of(&self, source: &S) -> usize {
        self.with(|book| book.of(source))
    }

    fn with<T>(&self, f: impl FnOnce(&mut Book<S>) -> T) -> T {
        let mut book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        f(book.get_or_insert_with(|| Box::new(Book::new())))
    }
}

/// Counts itself while it lives.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn among(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A place in a [`Pool`], given back when it is dropped.
pub struct Entry<S: Hash + Eq + Clone> {
    pool: Arc<Pool<S>>,
    member: u32,
    alarm: Arc<Alarm>,
    /// Of the alarm.
    waker: Waker,
}

impl<S: Hash + Eq + Clone> Entry<S> {
    /// Runs `work`. Whenever it waits, the peer counts as silent and may lose the place.
    pub async fn guard<F: Future>(&mut self, mut work: Pin<&mut F>) -> Result<F::Output, Evicted> {
        poll_fn(|context| self.poll(context, |context| work.as_mut().poll(context))).await
    }

    /// One step of [`Entry::guard`].
    pub fn poll<T>(
        &mut self,
        context: &mut Context<'_>,
        work: impl FnOnce(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<Result<T, Evicted>> {
        self.alarm.task.register(context.waker());
        if self.is_evicted() {
            return Poll::Ready(Err(Evicted));
        }
        self.alarm.waits.store(false, Ordering::Release);
        self.alarm.woken.store(false, Ordering::Release);
        let done = work(&mut Context::from_waker(&self.waker));
        if done.is_pending() {
            self.alarm.waits.store(true, Ordering::Release);
            if self.pool.waiting.load(Ordering::Relaxed) > 0 {
                self.pool.change.notify_one();
            }
        }
        done.map(Ok)
    }

    /// Has a newcomer got the place?
    pub fn is_evicted(&self) -> bool {
        self.alarm.evicted.load(Ordering::Acquire)
    }

    /// Has the peer proved who it is?
    pub fn is_authenticated(&self) -> bool {
        self.alarm.trusted.load(Ordering::Acquire)
    }

    /// For whoever finds out who the peer is.
    pub fn voucher(&self) -> Voucher<S> {
        Voucher { pool: Arc::clone(&self.pool), member: self.member, alarm: Arc::clone(&self.alarm) }
    }
}

impl<S: Hash + Eq + Clone> Drop for Entry<S> {
    fn drop(&mut self) {
        if self.pool.with(|book| book.leave(self.member, &self.alarm)) {
            self.pool.change.notify_one();
        }
    }
}

impl<S: Hash + Eq + Clone> fmt::Debug for Entry<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("member", &self.member).finish_non_exhaustive()
    }
}

/// Says that a member has proved who it is.
pub struct Voucher<S> {
    pool: Arc<Pool<S>>,
    member: u32,
    alarm: Arc<Alarm>,
}

impl<S: Hash + Eq + Clone> Voucher<S> {
    /// The member has got on, and now it is the peer's turn again: its grace begins anew. To be
    /// called only for what cannot be had for single bytes.
    pub fn progress(&self) {
        self.pool.with(|book| book.progress(self.member, &self.alarm, Instant::now()));
    }

    /// The member keeps its place from now on.
    pub fn authenticated(&self) {
        if !self.alarm.trusted.swap(true, Ordering::AcqRel) {
            self.pool.with(|book| book.trust(self.member, &self.alarm));
        }
    }
}

impl<S> Voucher<S> {
    /// Work for this member is under way until the result is dropped: it is not silent meanwhile.
    pub fn serving(&self) -> impl Sized + Send + use<S> {
        self.alarm.serving.store(true, Ordering::Release);
        Serving(Arc::clone(&self.alarm))
    }
}

struct Serving(Arc<Alarm>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.serving.store(false, Ordering::Release);
    }
}

impl<S> Clone for Voucher<S> {
    fn clone(&self) -> Self {
        Self { pool: Arc::clone(&self.pool), member: self.member, alarm: Arc::clone(&self.alarm) }
    }
}

impl<S> fmt::Debug for Voucher<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Voucher").field("member", &self.member).finish_non_exhaustive()
    }
}
