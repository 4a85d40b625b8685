//! One measurement of one case on one lane.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use testbed::{Process, pace};

use super::{
    case::{Case, Load},
    lane::Lane,
};

/// What a measurement may take beside the time measured.
const PATIENCE: Duration = Duration::from_mins(1);

/// How long is measured.
#[derive(Debug, Clone, Copy)]
pub(super) enum Length {
    /// Seconds, and of those before that do not count.
    Time { measured: f64, warm_up: f64 },
    /// The case's amount, because the clock counts instructions.
    Amount,
}

/// What one measurement says. Costs are for one [`Per`](super::case::Per) of the case.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sample {
    pub(super) value: f64,
    /// Processor seconds.
    pub(super) machine: f64,
    pub(super) applications: f64,
    pub(super) proxies: f64,
    pub(super) switches: f64,
    /// Microseconds: p50, p99, p99.9.
    pub(super) latencies: Option<[f64; 3]>,
}

/// What the load generator reports.
#[derive(Debug, Deserialize)]
struct Report {
    seconds: f64,
    count: u64,
    machine_cpu_s: f64,
    machine_idle_s: f64,
    context_switches: u64,
    cpu_s: BTreeMap<String, f64>,
    latency_us: Option<Latency>,
}

#[derive(Debug, Deserialize)]
struct Latency {
    p50: f64,
    p99: f64,
    p999: f64,
}

pub(super) fn measure(lane: &Lane, case: &Case, length: Length, processors: usize) -> Result<Sample> {
    let (command, connections) = match case.load {
        Load::Bulk(connections) => ("bulk", connections),
        Load::Exchange { connections, .. } => ("rr", connections),
        Load::Connect(connections) => ("crr", connections),
        Load::Idle => bail!("{} is not measured by a rate", case.name),
    };
    let mut load = lane.load(command, case.way);
    load.args(["--connections", &connections.to_string(), "--threads", &processors.to_string()]);
    if let Load::Exchange { size, .. } = case.load {
        load.args(["--size", &size.to_string()]);
    }
    let expected = match length {
        Length::Time { measured, warm_up } => {
            load.args(["--time", &measured.to_string(), "--warm-up", &warm_up.to_string()]);
            measured + warm_up
        }
        Length::Amount => {
            load.args(["--amount", &case.amount().to_string()]);
            0.0
        }
    };
    for (name, directory) in lane.groups() {
        load.arg("--cpu").arg(format!("{name}={}", directory.display()));
    }
    let within = Duration::from_secs_f64(expected) + pace::patience(PATIENCE);
    let output = Process::spawn(&mut load)?.output(within)?.success()?;
    let report: Report =
        serde_json::from_str(&output).with_context(|| format!("the load generator printed {output}"))?;
    report.sample(case, length)
}

impl Report {
    fn sample(&self, case: &Case, length: Length) -> Result<Sample> {
        if self.count == 0 {
            bail!("nothing came through in {:.1} s", self.seconds);
        }
        let count = self.count as f64;
        let value = match (length, case.load) {
            // One processor, and its clock counts instructions by the nanosecond. A machine without work jumps to the next timer.
            (Length::Amount, _) => (self.seconds - self.machine_idle_s) * 1e9 / count,
            (_, Load::Bulk(_)) => count * 8.0 / 1e9 / self.seconds,
            _ => count / self.seconds,
        };
        let cost = |spent: f64| spent * case.per().count() / count;
        let group = |name: &str| cost(self.cpu_s.get(name).copied().unwrap_or_default());
        Ok(Sample {
            value,
            machine: cost(self.machine_cpu_s),
            applications: group("applications"),
            proxies: group("proxies"),
            switches: cost(self.context_switches as f64),
            latencies: self.latency_us.as_ref().map(|latency| [latency.p50, latency.p99, latency.p999]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Case, Length, Report};

    const REPORT: &str = r#"{"seconds":2.0,"count":5000000000,"machine_cpu_s":4.0,"machine_idle_s":0.5,"context_switches":1000,
        "cpu_s":{"applications":1.0,"proxies":2.5}}"#;

    #[test]
    fn bulk_in_time_and_in_instructions() {
        let report: Report = serde_json::from_str(REPORT).unwrap();
        let case = Case::named("bulk1").unwrap();
        let sample = report.sample(case, Length::Time { measured: 2.0, warm_up: 0.3 }).unwrap();
        assert_eq!((sample.value, sample.machine, sample.applications, sample.proxies), (20.0, 0.8, 0.2, 0.5));
        assert_eq!((sample.switches, sample.latencies), (200.0, None));
        let sample = report.sample(case, Length::Amount).unwrap();
        assert!((sample.value - 0.3).abs() < 1e-9, "{sample:?}");
    }

    #[test]
    fn requests_cost_by_ten_thousand() {
        let text = REPORT
            .replace("5000000000", "20000")
            .replace("\"cpu_s\"", "\"latency_us\":{\"p50\":1.5,\"p99\":2.5,\"p999\":3.5},\"cpu_s\"");
        let report: Report = serde_json::from_str(&text).unwrap();
        let sample =
            report.sample(Case::named("rr64x1").unwrap(), Length::Time { measured: 2.0, warm_up: 0.0 }).unwrap();
        assert_eq!((sample.value, sample.machine, sample.switches), (10_000.0, 2.0, 500.0));
        assert_eq!(sample.latencies, Some([1.5, 2.5, 3.5]));
    }
}
