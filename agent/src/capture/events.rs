//! What the programs report, into the agent's log.

use std::{
    net::{Ipv6Addr, SocketAddr},
    time::Duration,
};

use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use tokio::{
    io::unix::AsyncFdReadyMutGuard,
    time::{Instant, sleep_until},
};
use underpass_abi::Counter;

use crate::sys::bpf::awaitable;

/// Lines per [`WINDOW`]; a pod that is refused in a loop must not fill the disk.
const LINES: u32 = 20;
/// How long the budget of [`LINES`] is for.
const WINDOW: Duration = Duration::from_secs(1);
/// Records read before other tasks get their turn.
const BATCH: u32 = 256;
/// Length of a record: `underpass_abi::Event`.
const LENGTH: usize = size_of::<underpass_abi::Event>();

/// Something a program refused or could not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// What.
    pub kind: Counter,
    /// Number of the pod concerned, 0 when unknown.
    pub pod_id: u32,
    /// Source of the packet or connection.
    pub source: SocketAddr,
    /// Its destination.
    pub destination: SocketAddr,
}

impl Event {
    /// The counter's name.
    pub fn name(&self) -> &'static str {
        Counter::ALL.iter().find(|(c, _)| *c == self.kind).map_or("unknown", |(_, name)| *name)
    }
}

/// Why a record is not an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    /// Too short or too long.
    #[error("record of {0} bytes, expected {LENGTH}")]
    Length(usize),
    /// No such counter.
    #[error("unknown kind {0}")]
    Kind(u32),
}

/// Reads a record of the `EVENTS` ring: the fields of `underpass_abi::Event` in its order, integers as this machine
/// writes them.
pub fn parse_event(record: &[u8]) -> Result<Event, EventError> {
    let record: &[u8; LENGTH] = record.try_into().map_err(|_| EventError::Length(record.len()))?;
    let [k0, k1, k2, k3, i0, i1, i2, i3, rest @ ..] = record;
    let (addresses, ports) = rest.split_at(32);
    let kind = u32::from_ne_bytes([*k0, *k1, *k2, *k3]);
    let (kind, _) = *Counter::ALL.iter().find(|(c, _)| *c as u32 == kind).ok_or(EventError::Kind(kind))?;
    let end = |n: usize| {
        let address: [u8; 16] = addresses[16 * n..16 * (n + 1)].try_into().expect("two addresses");
        let port = u16::from_ne_bytes([ports[2 * n], ports[2 * n + 1]]);
        SocketAddr::new(Ipv6Addr::from(address).to_canonical(), port)
    };
    let pod_id = u32::from_ne_bytes([*i0, *i1, *i2, *i3]);
    Ok(Event { kind, pod_id, source: end(0), destination: end(1) })
}

/// A budget of lines per second.
#[derive(Debug)]
struct Limit {
    end: Instant,
    left: u32,
    suppressed: u64,
}

impl Limit {
    fn new(now: Instant) -> Self {
        Self { end: now + WINDOW, left: LINES, suppressed: 0 }
    }

    /// May another line be written now? Counts it as suppressed otherwise.
    fn admit(&mut self) -> bool {
        let admitted = self.left > 0;
        if admitted {
            self.left -= 1;
        } else {
            self.suppressed += 1;
        }
        admitted
    }

    /// Begins a new window when the current one is over; returns what the old one suppressed.
    fn roll(&mut self, now: Instant) -> u64 {
        if now < self.end {
            return 0;
        }
        let suppressed = self.suppressed;
        *self = Self::new(now);
        suppressed
    }
}

/// Logs events until the task is dropped.
pub(super) async fn log_events(ring: RingBuf<MapData>) {
    let mut ring = match awaitable(ring) {
        Ok(ring) => ring,
        Err(e) => return tracing::error!(target: "bpf", error = %e, "cannot wait for events; they are only counted"),
    };
    let mut limit = Limit::new(Instant::now());
    loop {
        let ready = tokio::select! {
            ready = ring.readable_mut() => Some(ready),
            () = sleep_until(limit.end), if limit.suppressed > 0 => None,
        };
        match ready {
            Some(Ok(mut guard)) => drain(&mut guard, &mut limit),
            Some(Err(e)) => return tracing::error!(target: "bpf", error = %e, "cannot wait for events any more"),
            None => report(&mut limit),
        }
    }
}

fn drain(guard: &mut AsyncFdReadyMutGuard<'_, RingBuf<MapData>>, limit: &mut Limit) {
    // Not until the ring is empty: a flood must leave this thread to others from time to time.
    for _ in 0..BATCH {
        let Some(record) = guard.get_inner_mut().next() else {
            return guard.clear_ready();
        };
        report(limit);
        match parse_event(&record) {
            Ok(event) if limit.admit() => tracing::warn!(
                target: "bpf",
                kind = event.name(),
                pod = event.pod_id,
                source = %event.source,
                destination = %event.destination,
                "refused",
            ),
            Err(e) if limit.admit() => tracing::error!(target: "bpf", error = %e, "unreadable event"),
            _ => {}
        }
    }
}

fn report(limit: &mut Limit) {
    let suppressed = limit.roll(Instant::now());
    if suppressed > 0 {
        tracing::warn!(target: "bpf", suppressed, "more events than are logged; the counters have them all");
    }
}

/// Sends aya-log's lines to `tracing`.
#[derive(Debug)]
pub(super) struct BpfLog;

impl log::Log for BpfLog {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        // A level is part of a call site in tracing, so each has its own.
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(target: "bpf", program = record.target(), "{}", record.args())
            };
        }
        match record.level() {
            log::Level::Error => line!(error),
            log::Level::Warn => line!(warn),
            log::Level::Info => line!(info),
            log::Level::Debug => line!(debug),
            log::Level::Trace => line!(trace),
        }
    }

    fn flush(&self) {}
}

/// Forwards aya-log's lines until the task is dropped.
pub(super) async fn forward_log(logger: EbpfLogger<BpfLog>) {
    let mut logger = match awaitable(logger) {
        Ok(logger) => logger,
        Err(e) => return tracing::error!(target: "bpf", error = %e, "cannot wait for the programs' log"),
    };
    loop {
        match logger.readable_mut().await {
            Ok(mut guard) => {
                guard.get_inner_mut().flush();
                guard.clear_ready();
            }
            Err(e) => return tracing::error!(target: "bpf", error = %e, "cannot wait for the programs' log any more"),
        }
    }
}

#[cfg(test)]
#[path = "tests/events.rs"]
mod tests;
