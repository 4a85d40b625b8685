//! From the tunnel to the application, the kernel opening the records.
//!
//! Few bytes are received and sent; many are spliced, one record after the other into a pipe and all together out of it, so that they
//! are never copied here. Everything that is no data is received: splice does not say what it is.

use std::{io, os::fd::AsFd as _};

use rustls::AlertDescription;

use super::{Fault, Phase, Step};
use crate::{
    relay::{
        buffers::{Held, Scratch},
        pipe::{Pipe, RECORDS},
        socket::Side,
    },
    sys::tls::Incoming,
    tunnel::{
        ktls::{Broken, Event, KernelTls, from_kernel},
        records::MAX_PLAINTEXT,
    },
};

/// Receives spent on looking for an alert in a tunnel that no longer takes anything.
const LAST_READS: usize = 8;
/// A receive of this much starts splicing, bytes: more than two records were waiting.
const BULK: usize = 3 * MAX_PLAINTEXT;
/// So many rounds of less than a full record end it.
const PATIENCE: u8 = 4;

/// The direction from the tunnel.
pub(in crate::relay) struct KtlsIn {
    phase: Phase,
    held: Held,
    /// Has bytes while the application does not take them.
    pipe: Option<Pipe>,
    /// Rounds of splicing left without a full record; 0 is receiving.
    bulk: u8,
    /// The socket has failed. The kernel tells so before it hands out what had arrived by then, which may explain it or be all there was to come.
    lost: Option<io::Error>,
}

impl KtlsIn {
    /// Starts with plaintext that came with the hand-over, and with the peer's end if that did too.
    pub(in crate::relay) fn new(plaintext: Vec<u8>, ended: bool) -> Self {
        let phase = if ended { Phase::Ending } else { Phase::Open };
        Self { phase, held: Held::from(plaintext), pipe: None, bulk: 0, lost: None }
    }

    /// Bytes held back.
    pub(in crate::relay) fn held(&self) -> usize {
        self.held.len() + self.pipe.as_ref().map_or(0, |pipe| pipe.held)
    }

    /// Whether the peer's authenticated end was read.
    pub(in crate::relay) fn read_all(&self) -> bool {
        self.phase != Phase::Open
    }

    /// See the module.
    pub(in crate::relay) fn step(
        &mut self,
        tunnel: &mut Side,
        application: &mut Side,
        tls: &mut KernelTls,
        scratch: &mut Scratch,
    ) -> Result<Step, Fault> {
        if !self.held.flush(application).map_err(Fault::Write)? || !self.drain(application, scratch)? {
            return Ok(Step::Blocked);
        }
        match self.phase {
            Phase::Open => {}
            Phase::Ending => return self.finish(application),
            Phase::Done => return Ok(Step::Done),
        }
        if self.bulk > 0
            && let Some(step) = self.splice(tunnel, application, tls, scratch)?
        {
            return Ok(step);
        }
        self.receive(tunnel, application, tls, scratch)
    }

    /// Receives once and passes it on.
    fn receive(
        &mut self,
        tunnel: &mut Side,
        application: &mut Side,
        tls: &mut KernelTls,
        scratch: &mut Scratch,
    ) -> Result<Step, Fault> {
        let Some((event, length)) = self.next(tunnel, tls, &mut scratch.bytes)? else { return Ok(Step::Blocked) };
        match event {
            Event::Data => {
                if length >= BULK {
                    self.bulk = PATIENCE;
                }
                self.held = Held::after_writing(&scratch.bytes[..length], application).map_err(Fault::Write)?;
                Ok(Step::Moved(length))
            }
            Event::Control => Ok(Step::Moved(0)),
            Event::Alert(alert) => Err(Fault::Alert(alert)),
            Event::CloseNotify => {
                self.phase = Phase::Ending;
                self.finish(application)
            }
        }
    }

    /// Fills a pipe and empties it again. `None`: what comes next has to be received.
    fn splice(
        &mut self,
        tunnel: &mut Side,
        application: &mut Side,
        tls: &mut KernelTls,
        scratch: &mut Scratch,
    ) -> Result<Option<Step>, Fault> {
        let Some(mut pipe) = scratch.pipes.take() else { return Ok(None) };
        let mut other = false;
        // A connection holds no more than a buffer.
        let records = RECORDS.min(scratch.bytes.len() / MAX_PLAINTEXT);
        for _ in 0..records {
            match tunnel.splice_into(pipe.write_end(), MAX_PLAINTEXT) {
                Ok(0) => break,
                Ok(length) => pipe.held += length,
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    other = true;
                    break;
                }
                Err(error) => {
                    self.lost = Some(error);
                    other = true;
                    break;
                }
            }
        }
        let moved = pipe.held;
        self.bulk = if moved >= MAX_PLAINTEXT { PATIENCE } else { self.bulk - 1 };
        if moved > 0 {
            tls.received_data();
        }
        self.pipe = Some(pipe);
        self.drain(application, scratch)?;
        Ok(match (moved, other) {
            (0, true) => None,
            (0, false) => Some(Step::Blocked),
            _ => Some(Step::Moved(moved)),
        })
    }

    /// Empties the pipe; `true` when it is, and has been given back.
    fn drain(&mut self, application: &mut Side, scratch: &mut Scratch) -> Result<bool, Fault> {
        let Some(mut pipe) = self.pipe.take() else { return Ok(true) };
        while pipe.held > 0 {
            let taken = application.splice_from(pipe.read_end(), pipe.held).map_err(Fault::Write)?;
            if taken == 0 {
                self.pipe = Some(pipe);
                return Ok(false);
            }
            pipe.held -= taken;
        }
        scratch.pipes.put(pipe);
        Ok(true)
    }

    /// Looks for the alert with which the peer explained why it no longer takes anything. Data on the way is dropped: the connection
    /// is over.
    pub(in crate::relay) fn last_words(
        &mut self,
        tunnel: &mut Side,
        tls: &mut KernelTls,
        scratch: &mut Scratch,
    ) -> Option<AlertDescription> {
        tunnel.expect_data();
        for _ in 0..LAST_READS {
            match self.next(tunnel, tls, &mut scratch.bytes) {
                Ok(Some((Event::Alert(alert), _))) => return Some(alert),
                Ok(Some((Event::Data | Event::Control, _))) => {}
                _ => return None,
            }
        }
        None
    }

    /// Receives and judges records of one type. `None` when there are none.
    fn next(
        &mut self,
        tunnel: &mut Side,
        tls: &mut KernelTls,
        buffer: &mut [u8],
    ) -> Result<Option<(Event, usize)>, Fault> {
        loop {
            let incoming = match tunnel.receive(buffer).map_err(from_kernel) {
                Ok(incoming) => incoming,
                Err(Broken::Socket(error)) if self.lost.is_none() => {
                    self.lost = Some(error);
                    tunnel.expect_data();
                    continue;
                }
                Err(broken) => return Err(Fault::kernel(broken, Fault::Read)),
            };
            return match (incoming, self.lost.take()) {
                (Some(Incoming::Records { content_type, length }), lost) => {
                    self.lost = lost;
                    let event = tls.received(tunnel.as_fd(), content_type, &buffer[..length]);
                    event.map(|event| Some((event, length))).map_err(|broken| Fault::kernel(broken, Fault::Read))
                }
                (_, Some(error)) => Err(Fault::Read(error)),
                (Some(Incoming::Fin), None) => Err(Fault::Truncated),
                (None, None) => Ok(None),
            };
        }
    }

    fn finish(&mut self, application: &Side) -> Result<Step, Fault> {
        application.finish().map_err(Fault::Write)?;
        self.phase = Phase::Done;
        Ok(Step::Done)
    }
}
