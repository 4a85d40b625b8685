//! One end of one connection.

use std::{future::pending, io, sync::Mutex, time::Duration};

use anyhow::{Context as _, Result};
use rand::{Rng, SeedableRng, rngs::StdRng};
use socket2::SockRef;
use testbed::torture::{Act, Buffers, Outcome, Plan, ReadEnd, Side, SidePlan, Source, Trigger, Verifier, Writes};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::{OwnedSemaphorePermit, watch},
    time::{sleep, timeout},
};

use super::context::Context;
use crate::{name_of, sockets::reset_on_close};

/// What has happened so far.
#[derive(Default)]
struct Seen {
    sent: u64,
    received: u64,
    half_closed: bool,
    read_end: Option<ReadEnd>,
    write_error: Option<String>,
    wrong: Option<String>,
}

/// Why an end does no more.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Over {
    /// Everything was sent, and the other's end has come.
    Complete,
    /// The last act of its plan.
    Left,
    /// An error, or a wrong byte.
    Broken,
    /// Nothing happened for too long.
    Stuck,
}

/// One end, with what its two directions share.
struct Peer<'a> {
    plan: &'a Plan,
    side: Side,
    own: &'a SidePlan,
    context: &'a Context,
    seen: watch::Sender<Seen>,
    /// Given back when an idle connection idles.
    place: Mutex<Option<OwnedSemaphorePermit>>,
}

/// Sets the sizes of a socket's buffers.
pub(super) fn set_buffers(socket: &SockRef<'_>, buffers: Buffers) -> io::Result<()> {
    buffers.send.map_or(Ok(()), |size| socket.set_send_buffer_size(size))?;
    buffers.receive.map_or(Ok(()), |size| socket.set_recv_buffer_size(size))
}

/// Does what the plan says and tells what was seen. `place` is given back when the connection idles, or at the end.
pub(super) async fn run(
    mut stream: TcpStream,
    plan: &Plan,
    side: Side,
    context: &Context,
    place: Option<OwnedSemaphorePermit>,
) -> Result<Outcome> {
    let own = plan.side(side);
    let peer = Peer { plan, side, own, context, seen: watch::Sender::default(), place: Mutex::new(place) };
    let limit = context.limit + plan.pauses();
    let (mut read, mut write) = stream.split();
    let over = tokio::select! {
        biased;
        () = peer.last() => Over::Left,
        () = peer.broken() => Over::Broken,
        result = async { tokio::try_join!(peer.read(&mut read), peer.write(&mut write)) } => {
            result?;
            Over::Complete
        }
        () = peer.time_up(limit) => Over::Stuck,
    };
    let seen = peer.seen.borrow();
    // One that is stuck must not look complete to the other end.
    if over == Over::Stuck || matches!(own.last, Some((Act::Reset, _))) {
        reset_on_close(&stream)?;
    }
    let read_end = match (over, &seen.read_end) {
        (Over::Stuck, _) => ReadEnd::Open,
        (Over::Left, None) => ReadEnd::Stopped,
        (_, end) => end.clone().unwrap_or_default(),
    };
    Ok(Outcome {
        sent: seen.sent,
        received: seen.received,
        read_end,
        write_error: seen.write_error.clone(),
        wrong: seen.wrong.clone(),
    })
}

impl Peer<'_> {
    async fn until(&self, happened: impl Fn(&Seen) -> bool) {
        // Never an error: the sender is here.
        let _ = self.seen.subscribe().wait_for(happened).await;
    }

    async fn wait(&self, trigger: Trigger) {
        match trigger {
            Trigger::Sent => self.until(|seen| seen.sent == self.own.total).await,
            Trigger::Received(bytes) => self.until(|seen| seen.received >= bytes).await,
            Trigger::PeerEnd => self.until(|seen| seen.read_end == Some(ReadEnd::End)).await,
            Trigger::Released => {
                // An answer tells that the connection stands.
                self.until(|seen| seen.received > 0).await;
                self.place.lock().expect("nothing panics while holding it").take();
                self.context.resting.send_modify(|resting| *resting += 1);
                let _ = self.context.released.subscribe().wait_for(|released| *released).await;
            }
        }
    }

    /// When it is time for the last act, if there is one.
    async fn last(&self) {
        let Some((act, trigger)) = self.own.last else { return pending().await };
        if self.own.half_close.is_some() {
            self.until(|seen| seen.half_closed).await;
        }
        if act == Act::Close {
            self.wait(Trigger::Sent).await;
        }
        self.wait(trigger).await;
    }

    /// When nothing more can come.
    async fn broken(&self) {
        self.until(|seen| seen.wrong.is_some() || matches!(seen.read_end, Some(ReadEnd::Error(_)))).await;
    }

    /// When nothing has happened for `limit`: slow is not stuck.
    async fn time_up(&self, limit: Duration) {
        // An idle connection's time begins when it may go on.
        if self.plan.sides.iter().any(|side| matches!(side.hold, Some((_, Trigger::Released)))) {
            let _ = self.context.released.subscribe().wait_for(|released| *released).await;
        }
        let mut seen = self.seen.subscribe();
        while timeout(limit, seen.changed()).await.is_ok() {}
    }

    async fn read(&self, from: &mut ReadHalf<'_>) -> Result<()> {
        let mut verifier = Verifier::new(self.plan.seed, self.plan.number, self.side.other());
        let mut pauses = self.own.reads.pauses.iter().peekable();
        let mut buffer = vec![0; self.own.reads.most];
        loop {
            while let Some((_, pause)) = pauses.next_if(|(at, _)| *at <= verifier.verified()) {
                sleep(*pause).await;
            }
            let count = match from.read(&mut buffer).await {
                Ok(0) => {
                    self.seen.send_modify(|seen| {
                        // A reset that writing has met is an end for reading: the kernel tells it once.
                        let other = self.plan.side(self.side.other());
                        let clean = other.ends() && seen.received == other.total;
                        let error = seen.write_error.clone().filter(|_| !clean);
                        seen.read_end = Some(error.map_or(ReadEnd::End, ReadEnd::Error));
                    });
                    return Ok(());
                }
                Ok(count) => count,
                Err(error) => {
                    let name = name_of(&error.into());
                    self.seen.send_modify(|seen| seen.read_end = Some(ReadEnd::Error(name)));
                    return Ok(());
                }
            };
            let checked = verifier.check(&buffer[..count]);
            self.seen.send_modify(|seen| {
                seen.received = verifier.verified();
                seen.wrong = checked.err().map(|mismatch| mismatch.to_string());
            });
            self.context.moved(count)?;
        }
    }

    async fn write(&self, to: &mut WriteHalf<'_>) -> Result<()> {
        if let Err(error) = self.send(to).await? {
            let name = name_of(&error.into());
            self.seen.send_modify(|seen| seen.write_error = Some(name));
            return Ok(());
        }
        if let Some(trigger) = self.own.half_close {
            self.wait(trigger).await;
            // That the connection is lost is for the reader to tell.
            let _ = to.shutdown().await;
            self.seen.send_modify(|seen| seen.half_closed = true);
        }
        // The last act ends both directions.
        if self.own.last.is_some() { pending().await } else { Ok(()) }
    }

    /// Sends everything; the inner error is the socket's.
    async fn send(&self, to: &mut WriteHalf<'_>) -> Result<io::Result<()>> {
        let (plan, side) = (self.plan, self.side);
        let mut source = Source::new(plan.seed, plan.number, side);
        let mut sizes = StdRng::seed_from_u64(plan.seed ^ plan.number.rotate_left(32) ^ side as u64);
        let mut hold = self.own.hold;
        let (Writes::Exactly(most) | Writes::UpTo(most)) = self.own.writes;
        let mut buffer = vec![0; most.min(usize::try_from(self.own.total).unwrap_or(usize::MAX))];
        let mut sent = 0;
        while sent < self.own.total {
            if let Some((_, trigger)) = hold.take_if(|(at, _)| *at <= sent) {
                self.wait(trigger).await;
            }
            let size = match self.own.writes {
                Writes::Exactly(size) => size,
                Writes::UpTo(most) => sizes.random_range(1..=most),
            };
            let until = hold.map_or(self.own.total, |(at, _)| at);
            let part = &mut buffer[..(size as u64).min(until - sent) as usize];
            source.fill(part);
            let mut rest = &*part;
            while !rest.is_empty() {
                let count = match to.write(rest).await {
                    Ok(count) => count,
                    Err(error) => return Ok(Err(error)),
                };
                rest = &rest[count..];
                sent += count as u64;
                self.seen.send_modify(|seen| seen.sent = sent);
                self.context.sent(plan.number, side, sent, count)?;
            }
        }
        Ok(Ok(()))
    }
}

/// Runs `work` within the limit of a connection.
pub(super) async fn within<T>(context: &Context, work: impl Future<Output = io::Result<T>>) -> Result<T> {
    Ok(timeout(context.limit, work).await.context("it takes too long")??)
}
