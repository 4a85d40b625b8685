//! How much anybody may ask.

use std::{net::IpAddr, num::NonZeroU32, sync::Arc};

use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota, RateLimiter};

use crate::bounds::{Bound, Place, Room, source};

/// One source's requests at once are at most so many times those that there is still room for.
const STEPS: usize = 1;
/// Most sources that are kept apart; while there are more, new ones are refused.
const MAX_ADDRESSES: usize = 65_536;
/// Refusals that have a line in the log, per second; the others are counted.
const LOGGED: NonZeroU32 = NonZeroU32::new(20).unwrap();
/// A burst is this many seconds of a rate: an agent that starts asks for all of its pods' certificates.
const BURST: NonZeroU32 = NonZeroU32::new(20).unwrap();

/// Limits that an operator sets.
#[derive(Debug, Clone, Copy)]
pub struct Rates {
    /// Certificates per second for one node. Twenty seconds' worth at once.
    pub per_node: NonZeroU32,
    /// Requests per second from one address, before anything is known about who sends them. Twenty seconds' worth at once.
    pub per_address: NonZeroU32,
    /// Requests at once, of agents; and as many of whoever has not shown an agent's token yet.
    pub in_flight: usize,
    /// Connections at once.
    pub connections: usize,
}

/// Counts requests.
pub(super) struct Limits {
    nodes: DefaultKeyedRateLimiter<String>,
    addresses: DefaultKeyedRateLimiter<IpAddr>,
    logged: DefaultDirectRateLimiter,
    /// Requests whose token is being looked at, by who sent them.
    strangers: Arc<Room<IpAddr>>,
    /// Requests of agents, by node.
    agents: Arc<Room<String>>,
}

impl Limits {
    pub(super) fn new(rates: &Rates) -> Self {
        let quota = |rate: NonZeroU32| Quota::per_second(rate).allow_burst(rate.saturating_mul(BURST));
        Self {
            nodes: RateLimiter::keyed(quota(rates.per_node)),
            addresses: RateLimiter::keyed(quota(rates.per_address)),
            logged: RateLimiter::direct(Quota::per_second(LOGGED)),
            strangers: Room::new(rates.in_flight, STEPS, Bound::Requests),
            agents: Room::new(rates.in_flight, STEPS, Bound::Requests),
        }
    }

    /// A place for a request of which only the sender's address is known.
    pub(super) fn stranger(&self, address: IpAddr) -> Option<Place<IpAddr>> {
        self.strangers.try_enter(source(address))
    }

    /// A place for a request of this node's agent.
    pub(super) fn agent(&self, node: &str) -> Option<Place<String>> {
        self.agents.try_enter(node.to_owned())
    }

    /// May this node have another certificate now? Nodes are known to the API server, so there are not too many.
    pub(super) fn node(&self, node: &str) -> bool {
        self.nodes.check_key(&node.to_owned()).is_ok()
    }

    /// May this address, or somebody beside it, ask again now?
    pub(super) fn address(&self, address: IpAddr) -> bool {
        if self.addresses.len() >= MAX_ADDRESSES {
            self.addresses.retain_recent();
            if self.addresses.len() >= MAX_ADDRESSES {
                return false;
            }
        }
        self.addresses.check_key(&source(address)).is_ok()
    }

    /// Is there room for a line about a refusal?
    pub(super) fn log(&self) -> bool {
        self.logged.check().is_ok()
    }

    /// Forgets who has not asked lately.
    pub(super) fn tidy(&self) {
        self.nodes.retain_recent();
        self.nodes.shrink_to_fit();
        self.addresses.retain_recent();
        self.addresses.shrink_to_fit();
    }
}
