//! What operators see: counters, Istio's metrics, the access log and the agent's own log.
//!
//! Here is what is counted and written, with the bounds; how it is exposed is in [`crate::admin`].

mod access;
mod account;
mod counters;
mod labels;
mod line;
pub mod logging;
#[cfg(test)]
mod tests;
mod timing;
mod traffic;

use std::{fmt::Display, net::SocketAddr, sync::Arc};

pub use access::{AccessLog, LogChoice, Record, TraceId, Transfer};
pub use account::Account;
pub use counters::{Counters, CountersSnapshot, KtlsFallback, RefusalReason};
pub use labels::{Exposed, Labels, Party, Reporter, ResponseFlag, ServiceName};
pub use timing::Timing;
pub use traffic::{Series, Traffic};

/// Everything that is counted, for all pods.
#[derive(Debug)]
pub struct Telemetry {
    /// Counters without labels.
    pub counters: Arc<Counters>,
    /// Istio's TCP metrics.
    pub traffic: Traffic,
    /// TLS handshakes that succeeded.
    pub handshakes: Timing,
    /// Established connections that ended.
    pub lifetimes: Timing,
    /// The access log.
    pub access: AccessLog,
}

impl Telemetry {
    /// With at most `series` samples of Istio's metrics, see [`Traffic::new`].
    pub fn new(series: usize, access: AccessLog) -> Arc<Self> {
        Arc::new(Self {
            counters: Arc::default(),
            traffic: Traffic::new(series),
            handshakes: Timing::handshakes(),
            lifetimes: Timing::lifetimes(),
            access,
        })
    }

    /// Counts and logs a connection that was not established.
    pub fn fail(&self, labels: Labels, log: LogChoice, failure: &Failure<'_>) {
        self.counters.refuse(failure.reason);
        let flag = failure.reason.into();
        let labels = self.traffic.fail(labels, flag);
        self.access.write(
            log,
            &Record {
                id: None,
                trace: failure.trace,
                labels: &labels,
                source: failure.source,
                destination: failure.destination,
                dialled: None,
                service: failure.service,
                transfer: None,
                reason: failure.reason.as_str(),
                flag,
                detail: Some(failure.detail),
                in_order: false,
            },
        );
    }
}

/// Why a connection was not established, and what was known of it by then.
pub struct Failure<'a> {
    /// Why.
    pub reason: RefusalReason,
    /// For people.
    pub detail: &'a dyn Display,
    /// What ties the lines of both agents together, when the peer said.
    pub trace: Option<TraceId>,
    /// Client's address.
    pub source: Option<SocketAddr>,
    /// Where it was to go.
    pub destination: Option<SocketAddr>,
    /// The service that the client named.
    pub service: Option<&'a str>,
}
