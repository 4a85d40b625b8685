//! Benchmarks in a virtual machine: this program runs itself there and gets the results as one line.

use anyhow::{Context, Result};

use super::{Options, row::Row};
use crate::{
    ui::Ui,
    vm::{self, Processors, Series},
};

/// Cases that instructions are counted for: the others have several connections whose order is the scheduler's, or wait.
pub(super) const COUNTED: [&str; 3] = ["bulk1", "rr1kx1", "crr1"];

/// Runs the same benchmarks on a kernel.
pub(super) fn perform(ui: &Ui, series: Series, options: &Options) -> Result<Vec<Row>> {
    let mut result = None;
    let processors = if options.icount { Processors::Counting } else { Processors::Parallel };
    vm::run_bench(ui, series, processors, &arguments(options), |line, aside| {
        if !aside && line.starts_with('[') {
            result = Some(serde_json::from_str(line).context("reading the results from the virtual machine"));
        } else {
            ui.say(line);
        }
    })?;
    result.context("the virtual machine printed no results")?
}

/// What this program is told there; the agent's path follows.
fn arguments(options: &Options) -> Vec<String> {
    let mut all = vec!["bench".to_owned(), "--prepared".to_owned()];
    all.extend(options.quick.then(|| "--quick".to_owned()));
    all.extend(options.icount.then(|| "--counting".to_owned()));
    let mut option = |name: &str, value: String| all.extend([format!("--{name}"), value]);
    for case in &options.case {
        option("case", case.0.name.to_owned());
    }
    for system in &options.system {
        option("system", system.clone());
    }
    if let Some(rounds) = options.rounds {
        option("rounds", rounds.to_string());
    }
    if let Some(seconds) = options.seconds {
        option("seconds", seconds.to_string());
    }
    all.push("--agent".to_owned());
    all
}
