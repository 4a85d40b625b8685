//! `cargo xtask torture`: connections through two agents that do what hurts, every byte of them checked.

mod memory;
mod report;
mod scenarios;
mod scene;

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use nix::unistd::geteuid;
use testbed::torture::{Scenario, random_seed};

use crate::{
    exec, leftovers, places, setup, signals,
    test::{self, Tally},
    ui::Ui,
    vm::{self, Series},
};
use scenarios::Run;

/// Seconds for each scenario with `--short`; some need a little more.
const SHORT: u64 = 4;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// From which everything is made that is drawn; another one each time by default.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Only this scenario; may be given several times.
    #[arg(long, value_enum, value_name = "NAME")]
    scenario: Vec<Scenario>,
    /// For how long each scenario makes connections, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    duration: u64,
    /// Within a minute and a half, as `cargo xtask test` does: less of everything, and no stall of half a minute.
    #[arg(long, conflicts_with = "duration")]
    short: bool,
    /// Only the connection with this number, of one scenario.
    #[arg(long, value_name = "N", requires = "scenario")]
    connection: Option<u64>,
    /// Without agents: shows that plain TCP passes, so that what fails is the agents' doing.
    #[arg(long, conflicts_with_all = ["vm", "agent"])]
    plain: bool,
    /// On this kernel, in a virtual machine, where the kernel has TLS.
    #[arg(long, value_enum, value_name = "KERNEL", conflicts_with = "agent")]
    vm: Option<Series>,
    /// Everything is installed and built, and the kernel has TLS: as in the virtual machine of `--vm`.
    #[arg(long, hide = true, requires = "agent")]
    prepared: bool,
    /// Use this agent instead of building one.
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
}

pub(crate) fn run(ui: &Ui, options: &Options) -> Result<()> {
    if let Some(series) = options.vm {
        return in_machine(ui, series, options);
    }
    signals::clean_up_when_interrupted()?;
    root()?;
    if !options.prepared {
        setup::ensure(ui)?;
        build(ui)?;
    }
    let agent = match &options.agent {
        Some(file) => file.canonicalize().with_context(|| format!("looking for the agent {}", file.display()))?,
        None => built_agent(),
    };
    leftovers::sweep(ui);
    let run = Run {
        seed: options.seed.unwrap_or_else(random_seed),
        time: Duration::from_secs(if options.short { SHORT } else { options.duration }),
        short: options.short,
        connection: options.connection,
        agent: (!options.plain).then_some(agent),
        machine: options.prepared,
    };
    let totals = all(ui, &run, &options.scenario);
    test::closing_lines(ui, &totals);
    Ok(())
}

/// What `cargo xtask test` runs: everything is built.
pub(crate) fn short(ui: &Ui) -> Result<Tally> {
    root()?;
    let run = Run {
        seed: random_seed(),
        time: Duration::from_secs(SHORT),
        short: true,
        connection: None,
        agent: Some(built_agent()),
        machine: false,
    };
    Ok(all(ui, &run, &[]))
}

fn all(ui: &Ui, run: &Run, wanted: &[Scenario]) -> Tally {
    ui.say(&format!("torture with seed {}", run.seed));
    let mut totals = Tally::default();
    for scenario in Scenario::value_variants() {
        let usual = !run.short || *scenario != Scenario::LongStall;
        if wanted.contains(scenario) || wanted.is_empty() && usual {
            match run.scenario(ui, *scenario) {
                Ok(true) => totals.passed += 1,
                // Left out, and why was said.
                Ok(false) => {}
                Err(error) => {
                    let error = error.context(format!("torture, scenario {}", report::name(*scenario)));
                    let again = format!("    again: {}", report::again(run, *scenario, None));
                    totals.fail(&format!("{error:#}\n{again}"));
                    ui.failure(&error);
                    ui.say(&again);
                }
            }
        }
    }
    totals
}

fn root() -> Result<()> {
    ensure!(
        geteuid().is_root(),
        "the torture makes network namespaces and loads BPF programs: run it as root (sudo -E cargo xtask torture)"
    );
    Ok(())
}

/// As the tests have it: with debug assertions and checks for overflow.
fn build(ui: &Ui) -> Result<()> {
    ui.step("building the agent and the ends of connections", |step| {
        let programs = ["build", "--locked", "--package", "underpass", "--package", "testbed", "--bins"];
        exec::quietly(&mut exec::cargo(&programs), step)
    })
}

fn built_agent() -> PathBuf {
    places::target().join("debug/underpass")
}

/// The same program in a virtual machine.
fn in_machine(ui: &Ui, series: Series, options: &Options) -> Result<()> {
    setup::ensure(ui)?;
    // Drawn here, so that it is known whatever becomes of the machine.
    let seed = options.seed.unwrap_or_else(random_seed).to_string();
    ui.say(&format!("seed {seed}"));
    let duration = options.duration.to_string();
    let mut arguments = vec!["torture", "--prepared", "--seed", &seed];
    if options.short {
        arguments.push("--short");
    } else {
        arguments.extend(["--duration", &duration]);
    }
    let names: Vec<_> = options.scenario.iter().map(|scenario| report::name(*scenario)).collect();
    for name in &names {
        arguments.extend(["--scenario", name]);
    }
    let connection = options.connection.map(|number| number.to_string());
    if let Some(number) = &connection {
        arguments.extend(["--connection", number]);
    }
    arguments.push("--agent");
    vm::run_this(ui, series, &arguments, |line, aside| if aside { ui.say(line) } else { println!("{line}") })
}
