//! How long things take.

use prometheus_client::metrics::histogram::Histogram;

use super::Reporter;

/// Upper ends of the buckets for handshakes, seconds. A resumed one on one machine takes half a millisecond, the deadline is ten seconds.
const HANDSHAKE: [f64; 13] = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
/// Upper ends of the buckets for the lives of connections, seconds: from one request to a day.
const LIFETIME: [f64; 12] = [0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 86_400.0];

/// A distribution of durations for each side.
#[derive(Debug)]
pub struct Timing {
    source: Histogram,
    destination: Histogram,
}

impl Timing {
    /// Of TLS handshakes: the client's and the server's.
    pub(super) fn handshakes() -> Self {
        Self::new(&HANDSHAKE)
    }

    /// Of established connections, outbound and inbound.
    pub(super) fn lifetimes() -> Self {
        Self::new(&LIFETIME)
    }

    /// As the client, or as the server.
    pub fn of(&self, reporter: Reporter) -> &Histogram {
        match reporter {
            Reporter::Source => &self.source,
            Reporter::Destination => &self.destination,
        }
    }

    fn new(ends: &[f64]) -> Self {
        let histogram = || Histogram::new(ends.iter().copied());
        Self { source: histogram(), destination: histogram() }
    }
}
