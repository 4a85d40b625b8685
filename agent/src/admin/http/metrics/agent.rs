//! What the agent does with connections.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use prometheus_client::encoding::DescriptorEncoder;

use super::{
    super::View,
    encode::{NONE, counter, gauge, histogram},
};
use crate::{
    bounds::{Bound, evictions, refusals},
    relay::{CloseReason, Connection, DataPath, Direction},
    telemetry::{KtlsFallback, RefusalReason, Reporter, logging},
};

pub(super) fn encode(to: &mut DescriptorEncoder<'_>, view: &View, live: &[Arc<Connection>]) -> fmt::Result {
    connections(to, view, live)?;
    ends(to, view)?;
    relay(to, view)?;
    counter(
        to,
        "underpass_log_lines_dropped",
        "Log lines that were dropped because their reader was too slow",
        [([("log", "agent")], logging::dropped_lines()), ([("log", "access")], view.telemetry.access.dropped())],
    )
}

fn connections(to: &mut DescriptorEncoder<'_>, view: &View, live: &[Arc<Connection>]) -> fmt::Result {
    let counters = &view.telemetry.counters;
    let kinds = [
        ("outbound", "mutual_tls", &counters.tunnels_out),
        ("outbound", "none", &counters.passthrough),
        ("inbound", "mutual_tls", &counters.tunnels_in),
        ("inbound", "none", &counters.plaintext_in),
    ];
    counter(
        to,
        "underpass_connections_opened",
        "Connections established, by direction and whether both ends proved who they are",
        kinds.map(|(direction, security, n)| ([("direction", direction), ("security", security)], n.load(Relaxed))),
    )?;
    let mut open: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for direction in [Direction::Outbound, Direction::Inbound] {
        open.extend(DataPath::ALL.map(|path| ((name(direction), path.as_str()), 0)));
    }
    let mut held = 0;
    for connection in live {
        let what = &connection.what;
        *open.entry((name(what.direction), what.data_path.as_str())).or_default() += 1;
        held += connection.held.load(Relaxed);
    }
    gauge(
        to,
        "underpass_connections_open",
        "Live connections, by who moves and protects the bytes",
        open.into_iter().map(|((direction, path), n)| ([("direction", direction), ("data_path", path)], n)),
    )?;
    gauge(
        to,
        "underpass_buffered_bytes",
        "Bytes that the agent holds because the side they are for does not take them",
        [(NONE, held)],
    )?;
    let totals = view.table.totals();
    let moved = DataPath::ALL.into_iter().flat_map(|path| {
        let (sent, received) = totals.moved(path);
        let sample = |way, bytes| ([("data_path", path.as_str()), ("to", way)], bytes);
        [sample("upstream", sent), sample("application", received)]
    });
    counter(to, "underpass_bytes", "Application bytes moved, by who moves and protects them", moved)?;
    counter(
        to,
        "underpass_ktls_tunnels",
        "Tunnels whose records the kernel protects",
        [(NONE, counters.ktls.load(Relaxed))],
    )?;
    let fallbacks = KtlsFallback::ALL.map(|why| ([("reason", why.as_str())], counters.fallbacks(why)));
    counter(to, "underpass_ktls_fallbacks", "Tunnels whose records the agent protects, and why", fallbacks)?;
    counter(
        to,
        "underpass_sessions_resumed",
        "Handshakes that resumed a session",
        [(NONE, counters.resumed.load(Relaxed))],
    )?;
    counter(to, "underpass_retries", "Second endpoints tried", [(NONE, counters.retries.load(Relaxed))])
}

fn ends(to: &mut DescriptorEncoder<'_>, view: &View) -> fmt::Result {
    let telemetry = &view.telemetry;
    let totals = view.table.totals();
    let closed = CloseReason::ALL.map(|reason| ([("reason", reason.as_str())], totals.ended(reason)));
    counter(to, "underpass_connections_closed", "Established connections that ended, and why", closed)?;
    let refused = RefusalReason::ALL.map(|reason| ([("reason", reason.as_str())], telemetry.counters.refused(reason)));
    counter(to, "underpass_refusals", "Connections refused or cut, and why", refused)?;
    bounds(to)?;
    let sides =
        |client: &'static str, server: &'static str| [(Reporter::Source, client), (Reporter::Destination, server)];
    histogram(
        to,
        "underpass_handshake_duration_seconds",
        "TLS handshakes that succeeded",
        sides("client", "server").map(|(side, role)| ([("role", role)], telemetry.handshakes.of(side))),
    )?;
    histogram(
        to,
        "underpass_connection_duration_seconds",
        "Lives of established connections that ended",
        sides("outbound", "inbound").map(|(side, way)| ([("direction", way)], telemetry.lifetimes.of(side))),
    )
}

fn bounds(to: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let by_pool = |count: fn(Bound) -> u64| Bound::AGENT.map(|bound| ([("pool", bound.as_str())], count(bound)));
    counter(
        to,
        "underpass_pool_evictions",
        "Peers that had said nothing and lost their place to a newcomer",
        by_pool(evictions),
    )?;
    counter(to, "underpass_pool_refusals", "Newcomers that found no place", by_pool(refusals))
}

fn relay(to: &mut DescriptorEncoder<'_>, view: &View) -> fmt::Result {
    let threads: Vec<_> = (0_u64..).zip(view.node.relay()).collect();
    gauge(
        to,
        "underpass_relay_thread_connections",
        "Connections of a relay thread",
        threads.iter().map(|(n, t)| ([("thread", n.to_string())], t.connections)),
    )?;
    gauge(
        to,
        "underpass_relay_thread_stuck_seconds",
        "How long a relay thread has been at one round of work; 0 when it gets on",
        threads.iter().map(|(n, t)| ([("thread", n.to_string())], t.stuck.as_secs_f64())),
    )?;
    gauge(
        to,
        "underpass_relay_thread_up",
        "Whether a relay thread serves connections",
        threads.iter().map(|(n, t)| ([("thread", n.to_string())], u64::from(!t.ended))),
    )
}

fn name(direction: Direction) -> &'static str {
    match direction {
        Direction::Outbound => "outbound",
        Direction::Inbound => "inbound",
    }
}
