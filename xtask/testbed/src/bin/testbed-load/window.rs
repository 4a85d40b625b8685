//! The part of a run that is measured: it begins when all has warmed up, counted from when every connection has had an answer, and ends after a
//! time or an amount.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, OnceLock,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::counters::{Counters, Group};

/// When the measured part begins and ends.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Seconds that are measured.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = seconds)]
    time: f64,
    /// Seconds before, from when every connection has had an answer.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.3, value_parser = seconds)]
    warm_up: f64,
    /// Measure so many (bytes or answers) instead of a time; before, half of it is not measured.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    amount: Option<u64>,
    /// Tell the processor time of a cgroup under this name; several of one name are added up.
    #[arg(long, value_name = "NAME=DIRECTORY")]
    cpu: Vec<Group>,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "write a number of seconds, like 0.5".to_owned())?;
    if (0.0..=3600.0).contains(&seconds) { Ok(seconds) } else { Err("must be from 0 to 3600".into()) }
}

/// Where a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    WarmUp,
    Measured,
    Over,
}

impl Phase {
    fn of(number: u8) -> Self {
        match number {
            0 => Self::WarmUp,
            1 => Self::Measured,
            _ => Self::Over,
        }
    }
}

/// Counts for all threads, and reads the counters as the phase changes.
pub(crate) struct Window {
    options: Options,
    /// Connections that have had no answer yet.
    awaited: AtomicU64,
    /// When there were none left.
    started: OnceLock<Instant>,
    count: AtomicU64,
    phase: AtomicU8,
    /// The position (nanoseconds since all had an answer, or the count) at which the phase ends.
    until: AtomicU64,
    readings: Mutex<Vec<Result<Reading>>>,
}

struct Reading {
    at: Instant,
    count: u64,
    counters: Counters,
}

/// What is printed in the end.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Length of the measured part.
    seconds: f64,
    /// Bytes or answers in it.
    count: u64,
    /// Processor time of the whole machine, seconds, and what was left.
    machine_cpu_s: f64,
    machine_idle_s: f64,
    /// Of the whole machine.
    context_switches: u64,
    /// Processor time of the cgroups asked for, seconds.
    cpu_s: BTreeMap<String, f64>,
    /// Of the answers, when they are counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    latency_us: Option<Latency>,
}

#[derive(Debug, Serialize)]
struct Latency {
    p50: f64,
    p99: f64,
    p999: f64,
}

impl Window {
    /// For so many connections.
    pub(crate) fn new(options: &Options, connections: u32) -> Self {
        let (warm_up, _) = lengths(options);
        Self {
            options: options.clone(),
            awaited: AtomicU64::new(connections.into()),
            started: OnceLock::new(),
            count: AtomicU64::new(0),
            phase: AtomicU8::new(Phase::WarmUp as u8),
            // At 0 somebody has had no answer.
            until: AtomicU64::new(warm_up.max(1)),
            readings: Mutex::default(),
        }
    }

    /// A connection has had its first answer, or a part of it.
    pub(crate) fn served(&self) {
        if self.awaited.fetch_sub(1, Relaxed) == 1 {
            self.started.get_or_init(Instant::now);
        }
    }

    /// Counts `more` and says where the run is now.
    pub(crate) fn advance(&self, more: u64) -> Phase {
        let count = self.count.fetch_add(more, Relaxed) + more;
        if self.position(count) >= self.until.load(Relaxed) {
            self.turn();
        }
        Phase::of(self.phase.load(Relaxed))
    }

    fn position(&self, count: u64) -> u64 {
        if self.options.amount.is_some() {
            count
        } else {
            self.started.get().map_or(0, |started| nanos(started.elapsed()))
        }
    }

    /// The next phase, unless another thread was faster.
    fn turn(&self) {
        let mut readings = self.lock();
        let count = self.count.load(Relaxed);
        let position = self.position(count);
        if position < self.until.load(Relaxed) {
            return;
        }
        // What the reading takes is none of the measured part.
        let before = Instant::now();
        let counters = Counters::read(&self.options.cpu);
        let at = if readings.is_empty() { Instant::now() } else { before };
        readings.push(counters.map(|counters| Reading { at, count, counters }));
        let (_, measured) = lengths(&self.options);
        let (phase, until) = match readings.len() {
            1 => (Phase::Measured, self.position(count).saturating_add(measured)),
            _ => (Phase::Over, u64::MAX),
        };
        self.until.store(until, Relaxed);
        self.phase.store(phase as u8, Relaxed);
    }

    /// The outcome, once the run is over.
    pub(crate) fn report(self, latencies: Option<&Histogram<u64>>) -> Result<Report> {
        let mut readings = self.readings.into_inner().expect("nothing panics while holding it").into_iter();
        let mut next = || readings.next().context("the run was not over")?;
        let (begin, end) = (next()?, next()?);
        let spent = end.counters.since(&begin.counters);
        let micros = |histogram: &Histogram<u64>, part: f64| histogram.value_at_quantile(part) as f64 / 1e3;
        Ok(Report {
            seconds: end.at.duration_since(begin.at).as_secs_f64(),
            count: end.count - begin.count,
            machine_cpu_s: spent.busy,
            machine_idle_s: spent.idle,
            context_switches: spent.context_switches,
            cpu_s: spent.groups,
            latency_us: latencies.map(|h| Latency {
                p50: micros(h, 0.5),
                p99: micros(h, 0.99),
                p999: micros(h, 0.999),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Result<Reading>>> {
        self.readings.lock().expect("nothing panics while holding it")
    }
}

/// Positions from the start to the measured part, and from there to its end.
fn lengths(options: &Options) -> (u64, u64) {
    let time = |seconds: f64| nanos(Duration::from_secs_f64(seconds));
    options.amount.map_or_else(|| (time(options.warm_up), time(options.time)), |amount| (amount.div_ceil(2), amount))
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::{Options, Phase, Window};

    #[test]
    fn an_amount_is_measured_behind_a_warm_up() {
        let window = Window::new(&Options { time: 0.0, warm_up: 0.0, amount: Some(80), cpu: Vec::new() }, 1);
        assert_eq!(window.advance(39), Phase::WarmUp);
        assert_eq!(window.advance(3), Phase::Measured);
        assert_eq!(window.advance(79), Phase::Measured);
        assert_eq!(window.advance(5), Phase::Over);
        let report = window.report(None).unwrap();
        assert_eq!(report.count, 84);
        assert!(report.latency_us.is_none());
    }

    #[test]
    fn a_time_is_measured() {
        let window = Window::new(&Options { time: 0.01, warm_up: 0.0, amount: None, cpu: Vec::new() }, 2);
        window.served();
        assert_eq!(window.advance(1), Phase::WarmUp, "one has had no answer");
        window.served();
        let mut last = Phase::WarmUp;
        while last != Phase::Over {
            let phase = window.advance(1);
            assert!(phase >= last);
            last = phase;
        }
        let report = window.report(None).unwrap();
        assert!(report.seconds >= 0.01 && report.count > 1, "{report:?}");
    }
}
