//! Tells a slow reader from a vanished node.
//!
//! `TCP_USER_TIMEOUT` ends a connection whose peer keeps its window closed for that long, even while the peer's kernel
//! answers every probe (`tcp_probe_timer` in Linux; measured on 6.18: a timeout of 3 s ended a connection to a paused
//! reader after 3.5 s). An application may well pause for longer. So sockets with undelivered bytes are looked at now and
//! then: while the window is closed and the peer's kernel answers, the timeout is moved ahead; once it does not, the
//! connection is over. While data is on its way, the timeout does what it is for.

use std::{
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use nix::sys::socket::{setsockopt, sockopt::TcpUserTimeout};

use super::socket::Side;
use crate::sys::tcp;

/// How often: ten times within the user timeout of a tunnel.
pub(super) const INTERVAL: Duration = Duration::from_millis(2500);
/// By how many intervals the timeout is kept ahead. Two of them may pass without a look (a busy thread) before a live connection is
/// lost, and because the kernel spaces its probes so as not to outlast the timeout, three probes fit the timeout of
/// a tunnel, so that a lost one does no harm.
const AHEAD: u32 = 3;

/// What is known of one socket with undelivered bytes.
pub(super) struct Watch {
    /// When the window was last not known to be closed.
    open: Instant,
    /// The timeout in place is ours.
    moved: bool,
}

impl Watch {
    /// Starts watching.
    pub(super) fn new(now: Instant) -> Self {
        Self { open: now, moved: false }
    }

    /// Looks at the socket; `false` when its peer is gone.
    pub(super) fn look(&mut self, side: &mut Side, now: Instant, interval: Duration) -> bool {
        if !side.is_timed() {
            return true;
        }
        // A failed socket shows it elsewhere.
        let Ok(info) = tcp::state(side.as_fd()) else { return true };
        if info.notsent_bytes == 0 && info.unacked == 0 {
            side.delivered();
            if self.moved {
                self.moved = !set(side, side.user_timeout());
            }
            self.open = now;
            return true;
        }
        // Too small for the next segment, or, with segments on their way, taken back by a kernel short of memory, which then
        // drops and acknowledges their repetitions.
        let closed = info.unacked == 0 || info.snd_wnd == 0;
        if !closed && !self.moved {
            self.open = now;
            return true;
        }
        if info.last_ack_recv >= side.user_timeout() {
            return false;
        }
        // The kernel counts from its first probe of the closed window, and goes on counting while a probe takes some bytes along. So a timeout that
        // was moved stays so until everything has arrived; meanwhile it is the line above that notices a vanished peer.
        let timeout = now.duration_since(self.open) + interval * AHEAD;
        let timeout = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        self.moved |= set(side, timeout.max(side.user_timeout()));
        true
    }
}

fn set(side: &Side, milliseconds: u32) -> bool {
    setsockopt(side.socket(), TcpUserTimeout, &milliseconds).is_ok()
}
