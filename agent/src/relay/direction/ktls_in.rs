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
        pipe::RECORDS,
        socket::Side,
        splicer::{Filled, Splicer},
    },
    sys::tls::Incoming,
    tunnel::{
        ktls::{Broken, Event, KernelTls, from_kernel},
        records::MAX_PLAINTEXT,
    },
};

/// Receives spent on looking for an alert in a tunnel that no longer takes anything.
const LAST_READS: usize = 8;
/// The direction from the tunnel.
pub(in crate::relay) struct KtlsIn {
    phase: Phase,
    held: Held,
    splicer: Splicer,
    /// The socket has failed. The kernel tells so before it hands out what had arrived by then, which may explain it or be all there was to come.
    lost: Option<io::Error>,
}

impl KtlsIn {
    /// Starts with plaintext that came with the hand-over, and with the peer's end if that did too.
    pub(in crate::relay) fn new(plaintext: Vec<u8>, ended: bool) -> Self {
        let phase = if ended { Phase::Ending } else { Phase::Open };
        Self { phase, held: Held::from(plaintext), splicer: Splicer::default(), lost: None }
    }

    /// Bytes held back.
    pub(in crate::relay) fn held(&self) -> usize {
        self.held.len() + self.splicer.held()
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
        if !self.held.flush(application).map_err(Fault::Write)?
            || !self.splicer.drain(application, &mut scratch.pipes).map_err(Fault::Write)?
        {
            return Ok(Step::Blocked);
        }
        match self.phase {
            Phase::Open => {}
            Phase::Ending => return self.finish(application),
            Phase::Done => return Ok(Step::Done),
        }
        if self.splicer.is_due()
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
                self.splicer.received(length);
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
        // A connection holds no more than a buffer.
        let records = RECORDS.min(scratch.bytes.len() / MAX_PLAINTEXT);
        let Some(Filled { moved, stopped }) = self.splicer.fill(tunnel, &mut scratch.pipes, records, MAX_PLAINTEXT)
        else {
            return Ok(None);
        };
        let other = stopped.is_some();
        if let Some(error) = stopped.filter(|error| error.raw_os_error() != Some(libc::EINVAL)) {
            self.lost = Some(error);
        }
        if moved > 0 {
            tls.received_data();
        }
        self.splicer.drain(application, &mut scratch.pipes).map_err(Fault::Write)?;
        Ok(match (moved, other) {
            (0, true) => None,
            (0, false) => Some(Step::Blocked),
            _ => Some(Step::Moved(moved)),
        })
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
