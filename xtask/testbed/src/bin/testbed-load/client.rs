//! Clients that always have something to do: each connection waits for an answer and asks again at once.

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use nix::sys::epoll::EpollFlags;

use crate::{
    sockets::{CHUNK, Poll, Target},
    window::{Options, Phase, Window},
    wire::{ENDLESS, HEADER, request},
};

/// Latencies: significant digits, and the longest one that is told from longer ones, nanoseconds.
const DIGITS: u8 = 3;
const LONGEST: u64 = 60_000_000_000;

#[derive(Debug, clap::Args)]
pub(crate) struct Bulk {
    #[command(flatten)]
    target: Target,
    /// Connections at a time.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    connections: u32,
    /// Threads that share them.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: u32,
    #[command(flatten)]
    window: Options,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Rr {
    #[command(flatten)]
    load: Bulk,
    /// Bytes of a request and of its answer.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(HEADER as i64..=1 << 16))]
    size: u32,
}

impl Bulk {
    pub(crate) fn run(&self) -> Result<()> {
        let (report, _) = self.drive(&Task { request: request(HEADER as u32, ENDLESS), answer: None, keep: true })?;
        println!("{}", serde_json::to_string(&report.report(None)?)?);
        Ok(())
    }

    /// Runs the threads until the window closes.
    fn drive(&self, task: &Task) -> Result<(Window, Histogram<u64>)> {
        let window = Window::new(&self.window, self.connections);
        let threads = self.threads.min(self.connections);
        let shares = (0..threads).map(|i| self.connections / threads + u32::from(i < self.connections % threads));
        let mut all = Histogram::new_with_max(LONGEST, DIGITS).context("making a histogram")?;
        std::thread::scope(|scope| {
            let window = &window;
            let workers: Vec<_> = shares
                .map(|share| scope.spawn(move || Worker::new(&self.target, task, window)?.run(share as usize)))
                .collect();
            workers.into_iter().try_for_each(|worker| -> Result<()> {
                all.add(worker.join().expect("a worker does not panic")?).context("adding histograms")
            })
        })?;
        Ok((window, all))
    }
}

impl Rr {
    pub(crate) fn run(&self, keep: bool) -> Result<()> {
        let size = u64::from(self.size);
        let (window, latencies) =
            self.load.drive(&Task { request: request(self.size, size), answer: Some(size), keep })?;
        ensure!(!latencies.is_empty(), "no answer came within the measured time");
        println!("{}", serde_json::to_string(&window.report(Some(&latencies))?)?);
        Ok(())
    }
}

/// What a connection does.
struct Task {
    request: Vec<u8>,
    /// Bytes of an answer; `None`: it has no end, and bytes are counted instead of answers.
    answer: Option<u64>,
    /// Whether the next request goes over the same connection.
    keep: bool,
}

struct Worker<'a> {
    target: &'a Target,
    task: &'a Task,
    window: &'a Window,
    poll: Poll,
    buffer: Vec<u8>,
    latencies: Histogram<u64>,
}

struct Slot {
    stream: TcpStream,
    connected: bool,
    /// Whether this place, or the one that a new connection took, has had an answer.
    served: bool,
    /// Bytes of the answer still to come.
    left: u64,
    /// When the request was sent, or when connecting began.
    begun: Instant,
}

impl<'a> Worker<'a> {
    fn new(target: &'a Target, task: &'a Task, window: &'a Window) -> Result<Self> {
        let latencies = Histogram::new_with_max(LONGEST, DIGITS).context("making a histogram")?;
        Ok(Self { target, task, window, poll: Poll::new()?, buffer: vec![0; CHUNK], latencies })
    }

    fn run(mut self, connections: usize) -> Result<Histogram<u64>> {
        let mut slots = (0..connections).map(|number| self.open(number)).collect::<Result<Vec<_>>>()?;
        loop {
            for (number, flags) in self.poll.wait()? {
                self.proceed(number, &mut slots[number], flags)
                    .with_context(|| format!("connection to {}", self.target.address))?;
            }
            if self.window.advance(0) == Phase::Over {
                return Ok(self.latencies);
            }
        }
    }

    fn open(&self, number: usize) -> Result<Slot> {
        let begun = Instant::now();
        let stream = self.target.dial()?;
        self.poll.add(&stream, number, EpollFlags::EPOLLOUT)?;
        Ok(Slot { stream, connected: false, served: false, left: 0, begun })
    }

    fn proceed(&mut self, number: usize, slot: &mut Slot, flags: EpollFlags) -> Result<()> {
        if !slot.connected {
            if !flags.intersects(EpollFlags::EPOLLOUT | EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
                return Ok(());
            }
            self.target.finish(&slot.stream)?;
            slot.connected = true;
            self.poll.modify(&slot.stream, number, EpollFlags::EPOLLIN)?;
            return self.ask(slot);
        }
        let read = match slot.stream.read(&mut self.buffer) {
            Ok(0) => bail!("closed by the server's side, {} bytes before the end of an answer", slot.left),
            Ok(read) => read as u64,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e).context("receiving"),
        };
        if !slot.served {
            slot.served = true;
            self.window.served();
        }
        if self.task.answer.is_none() {
            self.window.advance(read);
            return Ok(());
        }
        slot.left = slot.left.checked_sub(read).context("more came than was asked for")?;
        if slot.left > 0 {
            return Ok(());
        }
        let took = slot.begun.elapsed();
        if self.window.advance(1) == Phase::Measured {
            self.latencies.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        }
        if self.task.keep {
            slot.begun = Instant::now();
            return self.ask(slot);
        }
        *slot = Slot { served: true, ..self.open(number)? };
        Ok(())
    }

    fn ask(&self, slot: &mut Slot) -> Result<()> {
        let sent = slot.stream.write(&self.task.request).context("sending a request")?;
        ensure!(sent == self.task.request.len(), "the socket took only {sent} bytes of a request");
        slot.left = self.task.answer.unwrap_or(ENDLESS);
        Ok(())
    }
}
