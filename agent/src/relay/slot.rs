//! One connection on its relay thread: its turns and its end.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use rustls::AlertDescription;

use super::{
    CloseReason, Connection, Direction,
    buffers::Scratch,
    direction::{Fault, KtlsIn, KtlsOut, Plain, Step, TlsIn, TlsOut},
    socket::Side,
};
use crate::{
    sys::tcp,
    telemetry::RefusalReason,
    tunnel::{
        ktls::KernelTls,
        records::{RecordError, Records},
    },
};

/// Application bytes after which a connection lets the others have a turn.
pub(super) const TURN_BYTES: usize = 512 * 1024;
/// Steps after which it does so in any case: many small messages are work too.
pub(super) const TURN_STEPS: usize = 32;

/// Who moves and protects the bytes.
pub(super) enum Path {
    /// Plain TCP on both sides.
    Plain {
        /// From the application.
        outward: Plain,
        /// To the application.
        inward: Plain,
    },
    /// TLS records made and opened here.
    Tls {
        /// The keys, of both directions.
        records: Box<Records>,
        /// From the application.
        outward: TlsOut,
        /// To the application.
        inward: TlsIn,
    },
    /// TLS records made and opened by the kernel.
    Ktls {
        /// What is left to do here.
        tls: Box<KernelTls>,
        /// From the application.
        outward: KtlsOut,
        /// To the application.
        inward: KtlsIn,
    },
}

/// Longest wait for what is on its way before a reset: time for some retransmissions.
const PARTING: Duration = Duration::from_secs(5);

/// How a turn ended.
#[derive(Debug)]
pub(super) enum Turn {
    /// Nothing to do until the next event.
    Idle,
    /// Nothing to do until the next event, or until a moment has passed.
    Settling,
    /// There is more to do; others first.
    More,
    /// The connection is over.
    Over(End),
}

/// Why a connection is over.
#[derive(Debug)]
pub(super) struct End {
    /// For the table and the log.
    pub(super) reason: CloseReason,
    /// How it is counted, when it is a refusal.
    pub(super) refusal: Option<RefusalReason>,
    /// For people.
    pub(super) detail: Option<String>,
}

impl From<CloseReason> for End {
    fn from(reason: CloseReason) -> Self {
        Self { reason, refusal: None, detail: None }
    }
}

impl End {
    /// The agent itself failed.
    pub(super) fn internal(refusal: Option<RefusalReason>, detail: String) -> Self {
        Self { reason: CloseReason::Internal, refusal, detail: Some(detail) }
    }

    /// A side vanished without a word.
    pub(super) fn timed_out(reason: CloseReason) -> Self {
        Self { reason, refusal: None, detail: Some("the peer's kernel no longer answers".to_owned()) }
    }
}

/// One connection. Between turns it owns its sockets, its keys, and bytes only while a side does not take them.
pub(super) struct Slot {
    /// The application's socket.
    pub(super) application: Side,
    /// The tunnel's socket, or the plain destination's.
    pub(super) upstream: Side,
    /// Whether it waits for a turn.
    pub(super) queued: bool,
    /// Whether its sockets are looked at for stalls.
    pub(super) watched: bool,
    /// Its entry in the table.
    pub(super) connection: Arc<Connection>,
    /// Over but for the reset, and until when that may wait.
    parting: Option<Box<(End, Instant)>>,
    path: Path,
    guard: Box<dyn Send>,
}

impl Slot {
    /// Puts a connection together; nothing happens to it yet.
    pub(super) fn new(
        application: OwnedFd,
        upstream: OwnedFd,
        path: Path,
        connection: Arc<Connection>,
        guard: Box<dyn Send>,
    ) -> Self {
        Self {
            application: Side::new(application, true),
            upstream: Side::new(upstream, false),
            queued: false,
            watched: false,
            connection,
            parting: None,
            path,
            guard,
        }
    }

    /// Sets what the relay wants of the sockets.
    pub(super) fn prepare(&mut self) -> io::Result<()> {
        self.application.prepare()?;
        self.upstream.prepare()?;
        if !self.is_tunnel() {
            // Should the agent die, the destination must not take what it has for all there is.
            self.upstream.reset_on_close()?;
        }
        Ok(())
    }

    fn is_tunnel(&self) -> bool {
        !matches!(self.path, Path::Plain { .. })
    }

    /// Bytes held back, both directions together.
    pub(super) fn held(&self) -> usize {
        match &self.path {
            Path::Plain { outward, inward } => outward.held() + inward.held(),
            Path::Tls { outward, inward, .. } => outward.held() + inward.held(),
            Path::Ktls { outward, inward, .. } => outward.held() + inward.held(),
        }
    }

    /// Whether it only waits for its end.
    pub(super) fn is_parting(&self) -> bool {
        self.parting.is_some()
    }

    /// It is over, for `end` unless that was said before: what it is to be closed with, or `None` when its reset would be lost now.
    ///
    /// A reset behind segments that the application's kernel had no room for is answered with a challenge (RFC 5961, section 3.2). Only the
    /// socket can answer that: for an address that is not its own, as the client's is not, the kernel sends no reset once the socket is gone,
    /// and the application would wait for ever. So the reset waits until what was sent has arrived.
    pub(super) fn leave(&mut self, end: Option<End>, now: Instant) -> Option<End> {
        let (end, until) = match self.parting.take() {
            Some(parting) => *parting,
            None => (end?, now + PARTING),
        };
        let in_flight = || tcp::state(self.application.as_fd()).is_ok_and(|info| info.unacked > 0);
        let lost =
            end.reason != CloseReason::Finished && self.connection.what.direction == Direction::Inbound && in_flight();
        if !lost || now >= until {
            return Some(end);
        }
        self.parting = Some(Box::new((end, until)));
        None
    }

    /// Moves what can be moved, within the limits of a turn.
    pub(super) fn turn(&mut self, scratch: &mut Scratch) -> Turn {
        let turn = self.run(scratch);
        self.connection.held.store(self.held() as u64, Relaxed);
        turn
    }

    fn run(&mut self, scratch: &mut Scratch) -> Turn {
        let mut budget = TURN_BYTES;
        for _ in 0..TURN_STEPS {
            // Inward first: an alert explains the failure of a write.
            let inward = match self.inward(scratch) {
                Ok(step) => step,
                Err(fault) => return Turn::Over(self.inward_failed(&fault)),
            };
            let outward = match self.outward(scratch) {
                Ok(step) => step,
                Err(fault) => return Turn::Over(self.outward_failed(&fault, scratch)),
            };
            let mut moved = 0;
            if let Step::Moved(bytes) = inward {
                moved += bytes;
                count(&self.connection.received, bytes);
            }
            if let Step::Moved(bytes) = outward {
                moved += bytes;
                count(&self.connection.sent, bytes);
            }
            match (inward, outward) {
                (Step::Done, Step::Done) => return Turn::Over(CloseReason::Finished.into()),
                (Step::Done | Step::Blocked, Step::Done | Step::Blocked) => {
                    return self.failed_unread().map_or(Turn::Idle, Turn::Over);
                }
                (Step::Done | Step::Blocked, Step::Settling) => {
                    return self.failed_unread().map_or(Turn::Settling, Turn::Over);
                }
                _ => {}
            }
            budget = budget.saturating_sub(moved);
            if budget == 0 {
                break;
            }
        }
        Turn::More
    }

    fn inward(&mut self, scratch: &mut Scratch) -> Result<Step, Fault> {
        let (application, upstream) = (&mut self.application, &mut self.upstream);
        match &mut self.path {
            Path::Plain { inward, .. } => inward.step(upstream, application, scratch),
            Path::Tls { records, inward, .. } => inward.step(upstream, application, records, scratch),
            Path::Ktls { tls, inward, .. } => inward.step(upstream, application, tls, scratch),
        }
    }

    fn outward(&mut self, scratch: &mut Scratch) -> Result<Step, Fault> {
        let (application, upstream) = (&mut self.application, &mut self.upstream);
        match &mut self.path {
            Path::Plain { outward, .. } => outward.step(application, upstream, scratch),
            Path::Tls { records, outward, .. } => outward.step(application, upstream, records, scratch),
            Path::Ktls { tls, outward, .. } => outward.step(application, upstream, tls, scratch),
        }
    }

    /// A socket's failure shows when it is read, behind the data that came before. One whose end was already read is read no more, so it is
    /// noticed here: it was closed or lost while its other direction was still in use.
    fn failed_unread(&self) -> Option<End> {
        let (outward_read, inward_read) = match &self.path {
            Path::Plain { outward, inward } => (outward.read_all(), inward.read_all()),
            Path::Tls { outward, inward, .. } => (outward.read_all(), inward.read_all()),
            Path::Ktls { outward, inward, .. } => (outward.read_all(), inward.read_all()),
        };
        if self.application.failed() && outward_read {
            Some(CloseReason::ApplicationGone.into())
        } else if self.upstream.failed() && inward_read {
            Some(CloseReason::UpstreamReset.into())
        } else {
            None
        }
    }

    fn inward_failed(&mut self, fault: &Fault) -> End {
        let detail = Some(fault.to_string());
        match fault {
            Fault::Read(_) => End { reason: CloseReason::UpstreamReset, refusal: None, detail },
            Fault::Write(_) => End { reason: CloseReason::ApplicationGone, refusal: None, detail },
            Fault::Truncated => End { reason: CloseReason::Truncated, refusal: Some(RefusalReason::Truncated), detail },
            Fault::Alert(alert) => denied(*alert),
            Fault::Record(error) => self.bad_record(*error),
        }
    }

    fn outward_failed(&mut self, fault: &Fault, scratch: &mut Scratch) -> End {
        let detail = Some(fault.to_string());
        match fault {
            Fault::Read(_) => End { reason: CloseReason::ApplicationReset, refusal: None, detail },
            Fault::Record(error) => self.bad_record(*error),
            // Only `inward` has the others.
            Fault::Write(_) | Fault::Truncated | Fault::Alert(_) => {
                let alert = match &mut self.path {
                    Path::Tls { records, inward, .. } if !inward.read_all() => {
                        inward.last_words(&mut self.upstream, records, scratch)
                    }
                    Path::Ktls { tls, inward, .. } if !inward.read_all() => {
                        inward.last_words(&mut self.upstream, tls, scratch)
                    }
                    _ => None,
                };
                alert.map_or(End { reason: CloseReason::UpstreamReset, refusal: None, detail }, denied)
            }
        }
    }

    /// Tells the peer what was wrong with its record, if it can still be told.
    fn bad_record(&mut self, error: RecordError) -> End {
        let alert = match error {
            RecordError::Header => AlertDescription::DecodeError,
            RecordError::Decrypt => AlertDescription::BadRecordMac,
            RecordError::Unexpected => AlertDescription::UnexpectedMessage,
            RecordError::Exhausted => AlertDescription::InternalError,
        };
        // The connection is over whether this arrives or not.
        match &mut self.path {
            Path::Tls { records, outward, .. } if outward.is_clear() => {
                if let Ok(record) = records.seal_alert(alert) {
                    let _ = self.upstream.write(&[io::IoSlice::new(&record)]);
                }
            }
            Path::Ktls { tls, outward, .. } if outward.is_clear() => {
                // A bad record left an error on the socket, which would fail the write.
                let _ = self.upstream.socket().take_error();
                let _ = self.upstream.attempt(|socket| tls.send_alert(socket, alert));
            }
            _ => {}
        }
        if error == RecordError::Exhausted {
            return End {
                reason: CloseReason::KeyLimit,
                refusal: Some(RefusalReason::KeyLimit),
                detail: Some(error.to_string()),
            };
        }
        End { reason: CloseReason::BadRecord, refusal: Some(RefusalReason::BadRecord), detail: Some(error.to_string()) }
    }

    /// Closes both sockets: clean ends leave what is queued to the kernel to deliver, all others are resets. What is left is the guard.
    pub(super) fn close(mut self, reason: CloseReason) -> Box<dyn Send> {
        // What is not sent yet may be on its way a moment later.
        let outstanding =
            || tcp::state(self.application.as_fd()).is_ok_and(|info| info.unacked > 0 || info.notsent_bytes > 0);
        if reason != CloseReason::Finished && outstanding() {
            self.connection.cut_short.store(true, Relaxed);
        }
        for side in [&mut self.application, &mut self.upstream] {
            let set = if reason == CloseReason::Finished { side.deliver_on_close() } else { side.reset_on_close() };
            if let Err(error) = set {
                tracing::warn!(id = self.connection.id.0, %error, "setting SO_LINGER before closing a connection");
            }
        }
        self.guard
    }
}

/// The only writer is the connection's thread, so a load and a store will do.
fn count(counter: &std::sync::atomic::AtomicU64, bytes: usize) {
    if bytes > 0 {
        counter.store(counter.load(Relaxed) + bytes as u64, Relaxed);
    }
}

/// The peer gave up the connection with an alert.
fn denied(alert: AlertDescription) -> End {
    let refusal = match alert {
        AlertDescription::InternalError => RefusalReason::PeerUpstreamUnreachable,
        _ => RefusalReason::DeniedByPeer,
    };
    let detail = Some(Fault::Alert(alert).to_string());
    End { reason: CloseReason::Denied, refusal: Some(refusal), detail }
}
