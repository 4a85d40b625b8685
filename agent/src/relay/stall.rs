//! Tells a slow reader from a vanished node.
//!
//! `TCP_USER_TIMEOUT` ends a connection whose peer keeps its window closed for that long, even while the peer's kernel
//! answers every probe (`tcp_write_timer`, `tcp_probe_timer` in Linux; measured on 6.18: a 3 s timeout ended a connection to a
//! paused reader after 3.5 s). An application may well pause for longer. So while a socket takes nothing, its timeout is
//! moved ahead for as long as the peer's kernel acknowledges; once it does not, the connection is over.

use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, setsockopt, sockopt::TcpUserTimeout};

use super::socket::Side;

nix::sockopt_impl!(
    /// State of a TCP socket.
    TcpInfo,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    libc::tcp_info
);

/// How often sockets that take nothing are looked at: five times within the user timeout of a tunnel.
pub(super) const INTERVAL: Duration = Duration::from_secs(5);
/// By how many intervals the timeout is kept ahead. The kernel spaces its probes so as to end with the timeout, so this also bounds
/// the silence of a live peer.
const AHEAD: u32 = 4;

/// What is known of one socket that may have stalled.
pub(super) struct Watch {
    written: u64,
    since: Instant,
    /// The socket's own timeout in milliseconds, while ours replaces it.
    replaced: Option<u32>,
}

impl Watch {
    /// Starts watching.
    pub(super) fn new(side: &Side, now: Instant) -> Self {
        Self { written: side.written(), since: now, replaced: None }
    }

    /// Looks at the socket; `false` when its peer is gone.
    pub(super) fn check(&mut self, side: &Side, now: Instant, interval: Duration) -> bool {
        if side.written() != self.written || !side.is_full() {
            self.restore(side);
            self.written = side.written();
            self.since = now;
            return true;
        }
        let stalled = now.duration_since(self.since);
        if stalled < interval {
            return true;
        }
        // A socket without the option, or one that fails: there is nothing to move, and the failure shows elsewhere.
        let Ok(own) = self.replaced.map_or_else(|| getsockopt(side.socket(), TcpUserTimeout), Ok) else { return true };
        let Ok(info) = getsockopt(side.socket(), TcpInfo) else { return true };
        if own == 0 {
            return true;
        }
        if info.tcpi_unacked > 0 {
            // Data is on its way: the window is open, and the timeout does what it is for.
            self.restore(side);
            return true;
        }
        if info.tcpi_last_ack_recv >= own {
            return false;
        }
        // The kernel counts from its first probe, at most one interval before `since`.
        let ahead = stalled + interval * (AHEAD + 1);
        if set(side, u32::try_from(ahead.as_millis()).unwrap_or(u32::MAX).max(own)) {
            self.replaced = Some(own);
        }
        true
    }

    /// Puts the socket's own timeout back.
    fn restore(&mut self, side: &Side) {
        if let Some(own) = self.replaced.take() {
            set(side, own);
        }
    }
}

fn set(side: &Side, milliseconds: u32) -> bool {
    setsockopt(side.socket(), TcpUserTimeout, &milliseconds).is_ok()
}
