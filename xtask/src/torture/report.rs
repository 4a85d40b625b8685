//! What people are told.

use std::{fmt::Write as _, time::Duration};

use clap::ValueEnum;
use testbed::torture::{Plan, Report, Scenario};

use super::scenarios::Run;

/// The name on the command line.
pub(super) fn name(scenario: Scenario) -> String {
    scenario.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// The command that does the same again.
pub(super) fn again(run: &Run, scenario: Scenario, connection: Option<u64>) -> String {
    let mut command = format!("cargo xtask torture --seed {} --scenario {}", run.seed, name(scenario));
    if run.short {
        command.push_str(" --short");
    } else {
        let _ = write!(command, " --duration {}", run.time.as_secs());
    }
    if run.agent.is_none() {
        command.push_str(" --plain");
    }
    if run.machine {
        command.push_str(" --vm KERNEL");
    }
    if let Some(number) = connection {
        let _ = write!(command, " --connection {number}");
    }
    command
}

/// The line of a scenario. Connections are counted at the client, bytes and ends at both ends.
pub(super) fn line(scenario: Scenario, reports: &[Report; 2], remarks: &[String], took: Duration) -> String {
    let [client, server] = reports;
    let mut both = client.clone();
    both.merge(server.clone());
    let ends: Vec<_> = both.ends.iter().map(|(name, count)| format!("{count} {name}")).collect();
    let mut line = format!(
        "{:10} {} connections, {} sent and {} received, ends: {}; {} failures, {:.1} s",
        name(scenario),
        client.connections.max(server.connections),
        size(both.sent),
        size(both.received),
        ends.join(", "),
        both.failed,
        took.as_secs_f64()
    );
    for remark in remarks {
        let _ = write!(line, "; {remark}");
    }
    line
}

fn size(bytes: u64) -> String {
    format!("{}.{} MB", bytes / 1_000_000, bytes / 100_000 % 10)
}

/// Every failure with what is needed to see it again.
pub(super) fn failures(run: &Run, scenario: Scenario, reports: &[Report; 2]) -> String {
    let mut text = String::new();
    for failure in reports.iter().flat_map(|report| &report.failures) {
        let side = format!("{:?}", failure.side).to_lowercase();
        let number = failure.number.map_or_else(|| "of unknown number".to_owned(), |number| number.to_string());
        let _ = write!(
            text,
            "\n  seed {} scenario {} connection {number}, at the {side}: {}",
            run.seed,
            name(scenario),
            failure.what
        );
        // The plans of killed and of idle connections mean something in company only.
        if let Some(number) = failure.number.filter(|_| !matches!(scenario, Scenario::Kill | Scenario::Idle)) {
            let [client, server] = Plan::new(scenario, run.seed, number).sides;
            let _ = write!(text, "\n    client: {client:?}\n    server: {server:?}");
            let _ = write!(text, "\n    again: {}", again(run, scenario, Some(number)));
        }
    }
    text
}
