//! What a connection carries so that its end can be counted and logged.

use std::{sync::Arc, time::Duration};

use super::{
    Telemetry,
    access::{LogChoice, Record, TraceId},
    labels::{Labels, Reporter},
    traffic::Series,
};

/// An established connection's place in the metrics.
pub struct Account {
    telemetry: Arc<Telemetry>,
    labels: Arc<Labels>,
    series: Arc<Series>,
    log: LogChoice,
    trace: Option<TraceId>,
}

impl std::fmt::Debug for Account {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Account").field("labels", &self.labels).field("log", &self.log).finish_non_exhaustive()
    }
}

impl Account {
    /// Counts a connection as opened.
    pub fn open(telemetry: &Arc<Telemetry>, labels: Labels, log: LogChoice, trace: Option<TraceId>) -> Self {
        let (labels, series) = telemetry.traffic.open(labels);
        Self { telemetry: Arc::clone(telemetry), labels, series, log, trace }
    }

    /// What ties its lines in both agents together.
    pub fn trace(&self) -> Option<TraceId> {
        self.trace
    }

    /// Who is at its ends.
    pub fn labels(&self) -> &Labels {
        &self.labels
    }

    /// Counts what the pod on this node has sent and received since the last time.
    pub fn moved(&self, sent: u64, received: u64) {
        match self.labels.reporter {
            // Istio's "sent" is the server's in both views.
            Reporter::Source => self.series.moved(received, sent),
            Reporter::Destination => self.series.moved(sent, received),
        }
    }

    /// Counts and logs its end. Bytes have been counted before.
    pub fn close(&self, record: &Record<'_>) {
        let Telemetry { traffic, lifetimes, access, .. } = &*self.telemetry;
        traffic.close(&self.series, record.flag);
        let open = record.transfer.as_ref().map_or(Duration::ZERO, |t| t.duration);
        lifetimes.of(self.labels.reporter).observe(open.as_secs_f64());
        access.write(self.log, record);
    }
}
