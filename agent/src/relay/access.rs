//! The access log: one line for each connection that ended.

use std::{fmt, sync::atomic::Ordering::Relaxed};

use super::{Connection, slot::End};

/// Writes the line. `tracing`'s writer decides where it goes and must not block.
pub(super) fn log(connection: &Connection, end: &End) {
    let what = &connection.what;
    tracing::info!(
        target: "access",
        id = connection.id.0,
        direction = ?what.direction,
        workload = %what.workload,
        source = %what.source,
        source_identity = %OrDash(what.source_identity.as_ref()),
        original_destination = %what.original_destination,
        destination_identity = %OrDash(what.destination_identity.as_ref()),
        upstream = %what.upstream,
        service = %OrDash(what.service.as_ref()),
        data_path = ?what.data_path,
        sent = connection.sent.load(Relaxed),
        received = connection.received.load(Relaxed),
        duration_ms = connection.since.elapsed().unwrap_or_default().as_millis() as u64,
        reason = end.reason.as_str(),
        refusal = %OrDash(end.refusal),
        detail = %OrDash(end.detail.as_deref()),
        "closed"
    );
}

/// A value, or `-` as access logs have it.
struct OrDash<T>(Option<T>);

impl<T: fmt::Display> fmt::Display for OrDash<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("-"),
        }
    }
}
