//! What telemetry hears of a connection's end.

use std::{fmt::Display, sync::atomic::Ordering::Relaxed};

use super::{CloseReason, Connection, slot::End};
use crate::telemetry::{Record, ResponseFlag, Transfer};

/// Counts and logs the end of a connection, whose bytes are in the sums already. Never blocks.
pub(super) fn ended(connection: &Connection, end: &End) {
    let Some(account) = &connection.account else { return };
    let what = &connection.what;
    let flag = match (end.refusal, end.reason) {
        (Some(refusal), _) => refusal.into(),
        (None, CloseReason::Policy) => ResponseFlag::Deny,
        (None, _) => ResponseFlag::None,
    };
    account.close(&Record {
        id: Some(connection.id.0),
        trace: account.trace(),
        labels: account.labels(),
        source: Some(what.source),
        destination: Some(what.upstream),
        dialled: (what.original_destination != what.upstream).then_some(what.original_destination),
        service: what.service.as_deref(),
        transfer: Some(Transfer {
            sent: connection.sent.load(Relaxed),
            received: connection.received.load(Relaxed),
            duration: connection.since.elapsed().unwrap_or_default(),
            data_path: what.data_path.as_str(),
            cipher: what.cipher,
            resumed: what.resumed,
        }),
        reason: end.reason.as_str(),
        flag,
        detail: end.detail.as_ref().map(|detail| detail as &dyn Display),
        in_order: end.reason == CloseReason::Finished,
    });
}
