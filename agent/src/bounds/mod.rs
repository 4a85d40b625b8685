//! What is shared is bounded, and nobody can hold what is shared.
//!
//! Three pools, one rule: a pool has a total and a share for each source, and whoever has proved
//! nothing yields first.
//!
//! | Pool | Who is in it | When it is full |
//! |---|---|---|
//! | [`Pool`] | peers that have not proved who they are | the newcomer gets the place of somebody silent who has not got on for long: of a source above its share, else of anybody |
//! | [`Lanes`] | connections on their way to a destination | a destination takes as many at once as it serves soon; the others for that destination wait, and nobody else does |
//! | [`Room`] | established connections, which are never ended for others | one holder leaves places free for the others |
//!
//! A source is an address ([`source`]), an identity, or a destination. What a pool has to do is
//! done by index into slots that exist, under one short lock.

mod book;
mod counts;
mod lanes;
mod pool;
mod room;
#[cfg(test)]
mod tests;

use std::{
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

pub use counts::{Bound, evictions, refusals};
pub use lanes::{Lane, Lanes, Turn};
pub use pool::{Entry, Evicted, Full, Pool, Voucher};
pub use room::{Place, Room};

/// A peer that has not got on for this long may lose its place to a newcomer. Longer than a round
/// trip anywhere on Earth.
pub const GRACE: Duration = Duration::from_millis(500);

/// Bounds of a [`Pool`].
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// Members at once.
    pub total: usize,
    /// Members of one source that are not the first to yield.
    pub share: usize,
    /// Never more of one source than its share, also while there is room.
    pub strict: bool,
    /// How long a member has to get on before it can lose its place; the members of a source above
    /// its share have a tenth of that.
    pub grace: Duration,
    /// What evictions and refusals are counted under.
    pub bound: Bound,
}

/// Whom an address belongs to, as far as an address can tell: the address itself for IPv4, its /64
/// for IPv6, because whoever has one address of a /64 usually has all of them (RFC 6177, RFC 7934).
pub fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}
