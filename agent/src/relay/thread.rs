//! A relay thread: waits for events and gives connections their turns.

use std::{
    collections::{HashMap, VecDeque},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};
use slab::Slab;

use super::{
    CloseReason, Connection, ConnectionId, ConnectionTable, access,
    buffers::Scratch,
    health::Beat,
    inbox::{Inbox, Message},
    settling::Settling,
    slot::{End, Slot, Turn},
    socket::Side,
    stall::Watch,
};
use crate::telemetry::{Counters, RefusalReason};

/// Events taken from the kernel at once.
const EVENTS: usize = 512;
/// The event number of the inbox; connections have two numbers each, from 0.
const INBOX: u64 = u64::MAX;

/// What all relay threads need.
pub(super) struct Shared {
    pub(super) table: Arc<ConnectionTable>,
    pub(super) counters: Arc<Counters>,
    pub(super) buffer: usize,
    pub(super) stall_interval: Duration,
}

impl Shared {
    /// Closes a connection's sockets and settles it; its guard goes last.
    pub(super) fn end(&self, slot: Slot, end: End) {
        // Guards are the proxy's. One that panics must not take the connections of a whole thread with it.
        if catch_unwind(AssertUnwindSafe(|| self.settle(slot, end))).is_err() {
            tracing::error!("what was to live as long as a connection panicked when dropped");
        }
    }

    fn settle(&self, slot: Slot, mut end: End) {
        let connection = Arc::clone(&slot.connection);
        // Somebody's wish goes before what it caused or coincided with.
        end.reason = connection.settle(end.reason);
        let guard = slot.close(end.reason);
        self.ended(&connection, &end);
        drop(guard);
    }

    /// Takes a connection off the table, counts and logs it.
    pub(super) fn ended(&self, connection: &Connection, end: &End) {
        self.table.totals().take(connection);
        self.table.totals().end(end.reason);
        self.table.remove(connection.id);
        if end.reason == CloseReason::Finished {
            self.counters.closed_clean.fetch_add(1, Relaxed);
        } else {
            self.counters.closed_reset.fetch_add(1, Relaxed);
        }
        if let Some(refusal) = end.refusal {
            self.counters.refuse(refusal);
        }
        access::ended(connection, end);
    }
}

/// A relay thread's state.
pub(super) struct Worker {
    epoll: Epoll,
    inbox: Arc<Inbox>,
    load: Arc<AtomicUsize>,
    beat: Arc<Beat>,
    shared: Arc<Shared>,
    slots: Slab<Box<Slot>>,
    keys: HashMap<ConnectionId, usize>,
    /// Connections that wait for a turn, each at most once.
    ready: VecDeque<usize>,
    /// Connections with bytes that a user timeout may run against: application, upstream.
    watched: HashMap<usize, [Watch; 2]>,
    /// When to look at them next.
    look: Option<Instant>,
    /// Connections to be looked at again soon.
    settling: Settling,
    scratch: Scratch,
}

impl Worker {
    pub(super) fn new(
        inbox: Arc<Inbox>,
        load: Arc<AtomicUsize>,
        beat: Arc<Beat>,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&*inbox, EpollEvent::new(EpollFlags::EPOLLIN, INBOX))?;
        let scratch = Scratch::new(shared.buffer);
        Ok(Self {
            epoll,
            inbox,
            load,
            beat,
            shared,
            slots: Slab::new(),
            keys: HashMap::new(),
            ready: VecDeque::new(),
            watched: HashMap::new(),
            look: None,
            settling: Settling::default(),
            scratch,
        })
    }

    /// Serves connections until asked to stop.
    pub(super) fn run(mut self) {
        let mut events = vec![EpollEvent::empty(); EVENTS];
        let mut messages = Vec::new();
        let mut running = true;
        while running {
            self.beat.rest();
            let waited = self.epoll.wait(&mut events, self.patience());
            self.beat.work();
            let happened = match waited {
                Ok(count) => &events[..count],
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    // Only a defect can make the descriptor or the buffer invalid; serving blindly would be worse.
                    tracing::error!(%error, "epoll_wait failed; ending this relay thread's connections");
                    break;
                }
            };
            let mut mail = false;
            for event in happened {
                if event.data() == INBOX {
                    mail = true;
                } else {
                    self.note(event);
                }
            }
            // After the events: an arriving connection may reuse the number of one that ended before this batch was fetched.
            if mail {
                running = self.inbox.take(&mut messages);
                for message in messages.drain(..) {
                    self.obey(message);
                }
            }
            for key in self.settling.due(Instant::now()) {
                self.queue(key);
            }
            self.give_turns();
            self.look_at_watched();
        }
        self.stop(messages);
    }

    /// How long to wait for events.
    fn patience(&self) -> EpollTimeout {
        if !self.ready.is_empty() {
            return EpollTimeout::ZERO;
        }
        let Some(look) = self.look.into_iter().chain(self.settling.next()).min() else { return EpollTimeout::NONE };
        let wait = look.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        EpollTimeout::try_from(wait).unwrap_or(EpollTimeout::MAX)
    }

    fn note(&mut self, event: &EpollEvent) {
        let key = (event.data() >> 1) as usize;
        let Some(slot) = self.slots.get_mut(key) else { return };
        let side = if event.data() & 1 == 0 { &mut slot.application } else { &mut slot.upstream };
        side.note(event.events());
        self.queue(key);
    }

    fn queue(&mut self, key: usize) {
        let slot = &mut self.slots[key];
        if !slot.queued {
            slot.queued = true;
            self.ready.push_back(key);
        }
    }

    fn obey(&mut self, message: Message) {
        match message {
            Message::Adopt(slot) => self.adopt(slot),
            Message::Close(id) => {
                if let Some(&key) = self.keys.get(&id)
                    && let Some(reason) = self.slots[key].connection.close_reason()
                {
                    self.end(key, reason.into());
                }
            }
        }
    }

    fn adopt(&mut self, slot: Box<Slot>) {
        let key = self.slots.insert(slot);
        let slot = &mut self.slots[key];
        self.keys.insert(slot.connection.id, key);
        if let Some(reason) = slot.connection.close_reason() {
            return self.end(key, reason.into());
        }
        let registered = slot.prepare().map_err(|error| ("setting socket options", error)).and_then(|()| {
            let sides = [&slot.application, &slot.upstream];
            (0..).zip(sides).try_for_each(|(number, side)| {
                let event = EpollEvent::new(Side::INTEREST, ((key as u64) << 1) | number);
                self.epoll.add(side, event).map_err(|error| ("registering with epoll", error.into()))
            })
        });
        match registered {
            // Bytes from the hand-over cause no event.
            Ok(()) => self.queue(key),
            Err((action, error)) => {
                let end = End::internal(Some(RefusalReason::Resources), format!("{action}: {error}"));
                self.end(key, end);
            }
        }
    }

    /// One turn for everybody who waits; who wants more waits again, behind new events.
    fn give_turns(&mut self) {
        for _ in 0..self.ready.len() {
            let Some(key) = self.ready.pop_front() else { return };
            let Some(slot) = self.slots.get_mut(key) else { continue };
            if slot.is_parting() {
                slot.queued = false;
                self.leave(key, None);
                continue;
            }
            // A defect met by one connection must not end the others. Nothing of the shared state outlives a turn
            // in a half-changed form: the scratch memory is filled anew each time, and the slot is thrown away.
            let turn = catch_unwind(AssertUnwindSafe(|| slot.turn(&mut self.scratch)));
            slot.queued = false;
            match turn {
                Ok(Turn::Idle) => self.watch(key),
                Ok(Turn::Settling) => {
                    self.watch(key);
                    self.settling.add(key, Instant::now());
                }
                Ok(Turn::More) => {
                    self.watch(key);
                    self.queue(key);
                }
                Ok(Turn::Over(end)) => self.end(key, end),
                Err(_) => {
                    self.scratch = Scratch::new(self.shared.buffer);
                    self.end(key, End::internal(None, "the agent panicked on this connection".to_owned()));
                }
            }
        }
    }

    fn watch(&mut self, key: usize) {
        let slot = &mut self.slots[key];
        if !slot.watched && (slot.application.is_timed() || slot.upstream.is_timed()) {
            slot.watched = true;
            let now = Instant::now();
            self.watched.insert(key, [Watch::new(now), Watch::new(now)]);
            self.look.get_or_insert(now + self.shared.stall_interval);
        }
    }

    fn look_at_watched(&mut self) {
        let Some(look) = self.look else { return };
        let now = Instant::now();
        if now < look {
            return;
        }
        let interval = self.shared.stall_interval;
        let mut gone = Vec::new();
        self.watched.retain(|&key, [application, upstream]| {
            let slot = &mut self.slots[key];
            if !application.look(&mut slot.application, now, interval) {
                gone.push((key, CloseReason::ApplicationReset));
            } else if !upstream.look(&mut slot.upstream, now, interval) {
                gone.push((key, CloseReason::UpstreamReset));
            }
            slot.watched = slot.application.is_timed() || slot.upstream.is_timed();
            slot.watched
        });
        self.look = (!self.watched.is_empty()).then_some(now + interval);
        for (key, reason) in gone {
            self.end(key, End::timed_out(reason));
        }
    }

    fn end(&mut self, key: usize, end: End) {
        self.leave(key, Some(end));
    }

    /// Closes a connection that is over, now or in a moment.
    fn leave(&mut self, key: usize, end: Option<End>) {
        let now = Instant::now();
        match self.slots[key].leave(end, now) {
            Some(end) => self.close(key, end),
            None => self.settling.add(key, now),
        }
    }

    fn close(&mut self, key: usize, end: End) {
        let slot = self.slots.remove(key);
        self.keys.remove(&slot.connection.id);
        self.watched.remove(&key);
        self.settling.remove(key);
        // Closing takes the sockets out of epoll. Should a child process between fork and exec keep one open past that, an event of it
        // meets nobody, or whoever has the number by then, to whom it is a hint.
        self.load.fetch_sub(1, Relaxed);
        self.shared.end(*slot, end);
    }

    /// Ends everything, including what still arrives while stopping.
    fn stop(&mut self, mut messages: Vec<Message>) {
        self.inbox.stop();
        self.inbox.take(&mut messages);
        for message in messages.drain(..) {
            if let Message::Adopt(slot) = message {
                self.load.fetch_sub(1, Relaxed);
                self.shared.end(*slot, CloseReason::Shutdown.into());
            }
        }
        let keys: Vec<usize> = self.slots.iter().map(|(key, _)| key).collect();
        for key in keys {
            self.close(key, CloseReason::Shutdown.into());
        }
    }
}

impl Drop for Worker {
    /// A thread that ends, for whatever reason, takes no more connections: they go to others.
    fn drop(&mut self) {
        self.inbox.stop();
        self.beat.end();
    }
}
