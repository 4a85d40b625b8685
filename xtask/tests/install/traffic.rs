//! Connections all the time, and what somebody between the pods sees of them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use testbed::{Capture, Process, Sniffer, SnifferOptions};

use crate::cluster::{Cluster, Node};

/// What every connection of [`Traffic`] says in plaintext.
const MARKER: &str = "steady";
/// Connections per second: little enough that an agent built for debugging has time on a machine that is busy.
pub(crate) const RATE: u32 = 20;
/// How long the first connection may take, and the last ones.
const FIRST: Duration = Duration::from_secs(30);
const END: Duration = Duration::from_secs(70);

/// A client in a pod that opens new connections all the time: a line there and back each.
pub(crate) struct Traffic {
    process: Process,
}

/// How its connections went.
#[derive(Debug, Deserialize)]
pub(crate) struct Report {
    pub(crate) ok: u64,
    pub(crate) failed: u64,
    pub(crate) errors: serde_json::Value,
    pub(crate) slowest_ms: f64,
}

impl Traffic {
    /// Starts it in a pod of a namespace, `rate` connections per second; returns when the first has worked.
    pub(crate) fn start(cluster: &Cluster, pod: &str, target: &str, rate: u32) -> Result<Self> {
        let traffic = Self::try_start(cluster, pod, target, rate)?;
        traffic.process.wait_json("first", FIRST)?;
        Ok(traffic)
    }

    /// The same, without waiting.
    pub(crate) fn try_start(cluster: &Cluster, pod: &str, target: &str, rate: u32) -> Result<Self> {
        let (namespace, pod) = pod.split_once('/').context("a pod is called NAMESPACE/NAME here")?;
        let namespace = format!("--namespace={namespace}");
        let rate = rate.to_string();
        // Longer than anything of Underpass lasts: what fails has failed, and was not just slow.
        let client = ["testbed-app", "steady", target, "--rate", &rate, "--timeout", "40"];
        let exec = ["exec", "--stdin", &namespace, pod, "--"];
        Ok(Self { process: cluster.kubectl_spawn(&[&exec[..], &client[..]].concat())? })
    }

    /// Ends it.
    pub(crate) fn stop(self) -> Result<Report> {
        let output = self.process.output(END)?;
        let report = output.last_json()?;
        serde_json::from_value(report).with_context(|| format!("the client printed: {}", output.stdout))
    }
}

impl Report {
    /// An error when a connection failed, or when there was none.
    pub(crate) fn all_worked(self) -> Result<Self> {
        ensure!(self.failed == 0 && self.ok > 0, "{self:?}");
        Ok(self)
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { ok, failed, errors, slowest_ms } = self;
        write!(f, "{ok} connections, {failed} failed {errors}, the slowest took {slowest_ms:.0} ms")
    }
}

/// Listens on every interface of a node but `lo`: the wire and the node's ends of its pods' wires.
pub(crate) fn sniff(node: &Node) -> Result<Sniffer> {
    Sniffer::start(&node.network(), &SnifferOptions::markers([MARKER]))
}

/// Traffic was seen, and could be read.
pub(crate) fn ensure_plaintext(sniffer: Sniffer) -> Result<Capture> {
    let capture = whole(sniffer)?;
    ensure!(capture.marker_hits > 0, "the sniffer sees nothing: {capture:?}");
    Ok(capture)
}

/// Traffic was seen, and could not be read.
pub(crate) fn ensure_encrypted(sniffer: Sniffer) -> Result<Capture> {
    let capture = whole(sniffer)?;
    ensure!(capture.marker_hits == 0, "plaintext was seen: {capture:?}");
    ensure!(capture.tls_application_records > 0, "nothing was seen: {capture:?}");
    Ok(capture)
}

fn whole(sniffer: Sniffer) -> Result<Capture> {
    let capture = sniffer.stop()?;
    ensure!(capture.dropped_by_kernel == 0, "the sniffer was too slow: {capture:?}");
    Ok(capture)
}
