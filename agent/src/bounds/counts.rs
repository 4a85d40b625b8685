//! How often bounds took effect, for metrics: one process has one set of pools.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Which bound it was; the name is the metrics' label `pool`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Bound {
    /// Handshakes that pods' peers began.
    Tunnel,
    /// Handshakes that pods' own connections began.
    Dial,
    /// Live connections of a pod.
    Connections,
    /// The admin socket and port.
    Admin,
    /// The ports for probes and metrics.
    Probes,
    /// Connections to `underpass ca`.
    Authority,
    /// Requests to `underpass ca`.
    Requests,
    /// Requests of the CNI plugin.
    Cni,
}

const BOUNDS: usize = Bound::Cni as usize + 1;

static EVICTIONS: [AtomicU64; BOUNDS] = [const { AtomicU64::new(0) }; BOUNDS];
static REFUSALS: [AtomicU64; BOUNDS] = [const { AtomicU64::new(0) }; BOUNDS];

impl Bound {
    /// Those of an agent.
    pub const AGENT: [Self; 6] = [Self::Tunnel, Self::Dial, Self::Connections, Self::Admin, Self::Probes, Self::Cni];
    /// Those of `underpass ca`.
    pub const CA: [Self; 3] = [Self::Authority, Self::Requests, Self::Probes];

    /// The label's value.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Dial => "dial",
            Self::Connections => "connections",
            Self::Admin => "admin",
            Self::Probes => "probes",
            Self::Authority => "authority",
            Self::Requests => "requests",
            Self::Cni => "cni",
        }
    }

    pub(super) fn evicted(self) {
        EVICTIONS[self as usize].fetch_add(1, Relaxed);
    }

    /// Counts a newcomer that found no room.
    pub fn refused(self) {
        REFUSALS[self as usize].fetch_add(1, Relaxed);
    }
}

/// Members that lost their places to newcomers.
pub fn evictions(of: Bound) -> u64 {
    EVICTIONS[of as usize].load(Relaxed)
}

/// Newcomers that found no room.
pub fn refusals(of: Bound) -> u64 {
    REFUSALS[of as usize].load(Relaxed)
}
