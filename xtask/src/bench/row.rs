//! What is told of a case on a system: medians over rounds.

use serde::{Deserialize, Serialize};

use super::{
    case::{Case, Per},
    measure::Sample,
};

/// An object of the JSON report. Numbers that make no sense for a case are `null`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) case: String,
    pub(super) system: String,
    /// Median over the rounds.
    pub(super) value: f64,
    pub(super) unit: String,
    pub(super) min: f64,
    pub(super) max: f64,
    pub(super) rounds: usize,
    /// Median over the rounds of the ratio to plain TCP in the same round.
    pub(super) ratio_to_plain: Option<f64>,
    /// Processor seconds of the whole machine for `cpu_per`, of the programs that were measured, and of those that are not the applications.
    pub(super) cpu_s: Option<f64>,
    pub(super) programs_cpu_s: Option<f64>,
    pub(super) proxies_cpu_s: Option<f64>,
    pub(super) cpu_per: Option<Per>,
    /// Of the whole machine, for `cpu_per`.
    pub(super) context_switches: Option<f64>,
    /// Microseconds, medians over the rounds.
    pub(super) p50_us: Option<f64>,
    pub(super) p99_us: Option<f64>,
    pub(super) p999_us: Option<f64>,
}

impl Row {
    /// Out of the rounds: for each a sample, and the one of plain TCP if there was any.
    pub(super) fn of_rounds(
        case: &Case,
        system: &str,
        unit: &str,
        rounds: &[(Sample, Option<Sample>)],
    ) -> Option<Self> {
        let of = |number: &dyn Fn(&Sample) -> f64| median(rounds.iter().map(|(sample, _)| number(sample)).collect());
        let values = || rounds.iter().map(|(sample, _)| sample.value);
        let ratios = rounds.iter().filter_map(|(sample, plain)| Some(sample.value / plain.as_ref()?.value)).collect();
        let latency = |index: usize| {
            median(rounds.iter().filter_map(|(sample, _)| sample.latencies.map(|latencies| latencies[index])).collect())
        };
        Some(Self {
            case: case.name.to_owned(),
            system: system.to_owned(),
            value: of(&|sample| sample.value)?,
            unit: unit.to_owned(),
            min: values().fold(f64::INFINITY, f64::min),
            max: values().fold(f64::NEG_INFINITY, f64::max),
            rounds: rounds.len(),
            ratio_to_plain: median(ratios),
            cpu_s: of(&|sample| sample.machine),
            programs_cpu_s: of(&|sample| sample.applications + sample.proxies),
            proxies_cpu_s: of(&|sample| sample.proxies),
            cpu_per: Some(case.per()),
            context_switches: of(&|sample| sample.switches),
            p50_us: latency(0),
            p99_us: latency(1),
            p999_us: latency(2),
        })
    }

    /// A number that was read once.
    pub(super) fn single(case: &str, system: &str, value: f64, unit: &str, ratio_to_plain: Option<f64>) -> Self {
        Self {
            case: case.to_owned(),
            system: system.to_owned(),
            value,
            unit: unit.to_owned(),
            min: value,
            max: value,
            rounds: 1,
            ratio_to_plain,
            cpu_s: None,
            programs_cpu_s: None,
            proxies_cpu_s: None,
            cpu_per: None,
            context_switches: None,
            p50_us: None,
            p99_us: None,
            p999_us: None,
        }
    }
}

/// The middle one, or the mean of the two in the middle; `None` of nothing.
fn median(mut all: Vec<f64>) -> Option<f64> {
    all.sort_by(f64::total_cmp);
    let middle = all.len() / 2;
    match all.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(all[middle]),
        _ => Some(f64::midpoint(all[middle - 1], all[middle])),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::case::Case, Row, Sample, median};

    fn sample(value: f64) -> Sample {
        let latencies = Some([value, value * 2.0, value * 3.0]);
        Sample { value, machine: 2.0, applications: 0.5, proxies: 1.0, switches: 7.0, latencies }
    }

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn ratios_are_those_within_a_round() {
        let rounds = [(1.0, 10.0), (4.0, 8.0), (3.0, 5.0)].map(|(value, plain)| (sample(value), Some(sample(plain))));
        let row = Row::of_rounds(Case::named("rr64x1").unwrap(), "nginx", "requests/s", &rounds).unwrap();
        assert_eq!((row.value, row.min, row.max, row.rounds), (3.0, 1.0, 4.0, 3));
        assert_eq!(row.ratio_to_plain, Some(0.5), "not 3/8");
        assert_eq!((row.p50_us, row.p999_us, row.programs_cpu_s), (Some(3.0), Some(9.0), Some(1.5)));
        assert!(Row::of_rounds(Case::named("rr64x1").unwrap(), "nginx", "requests/s", &[]).is_none());
    }

    #[test]
    fn the_json_that_scripts_read() {
        let rounds = [(sample(2.0), Some(sample(4.0)))];
        let row = Row::of_rounds(Case::named("bulk1").unwrap(), "plain", "Gbit/s", &rounds).unwrap();
        let json = serde_json::to_value(&row).unwrap();
        let expected = serde_json::json!({
            "case": "bulk1", "system": "plain", "value": 2.0, "unit": "Gbit/s", "min": 2.0, "max": 2.0, "rounds": 1,
            "ratio_to_plain": 0.5, "cpu_s": 2.0, "programs_cpu_s": 1.5, "proxies_cpu_s": 1.0, "cpu_per": "GB",
            "context_switches": 7.0, "p50_us": 2.0, "p99_us": 4.0, "p999_us": 6.0,
        });
        assert_eq!(json, expected);
        assert_eq!(serde_json::from_value::<Row>(json).unwrap(), row);
    }
}
