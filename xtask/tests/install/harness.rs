//! Runs scenarios one after another on one cluster, and reports as `cargo test` does.

use std::{process::ExitCode, time::Instant};

use anyhow::{Context, Result};

use crate::world::World;

/// A part of the story.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// Others build on it.
    pub(crate) needed: bool,
    pub(crate) run: fn(&mut World) -> Result<()>,
}

/// What the command line asks for; options of libtest that mean nothing here are taken, and ignored.
struct Arguments {
    list: bool,
    ignored: bool,
    exact: bool,
    filters: Vec<String>,
}

/// Runs what the command line selects, until something fails.
pub(crate) fn main(scenarios: &[Scenario]) -> ExitCode {
    let arguments = Arguments::parse(std::env::args().skip(1));
    let selected = arguments.select(scenarios);
    if arguments.list {
        for scenario in selected {
            println!("{}: test", scenario.name);
        }
        return ExitCode::SUCCESS;
    }
    let start = Instant::now();
    println!("\nrunning {} tests", selected.len());
    let (mut passed, mut failed) = (0, 0);
    if !selected.is_empty() {
        match World::start() {
            Ok(mut world) => {
                println!("the cluster is up after {:.1} s", start.elapsed().as_secs_f64());
                for scenario in &selected {
                    if let Err(error) = one(scenario, &mut world) {
                        println!("test {} ... FAILED\n\n{error:#}\n\n{}", scenario.name, world.explain());
                        failed += 1;
                        break;
                    }
                    passed += 1;
                }
            }
            Err(error) => {
                println!("test start ... FAILED\n\n{error:#}\n");
                failed += 1;
            }
        }
    }
    let left = selected.len().saturating_sub(passed + failed);
    if left > 0 {
        println!("{left} tests were not run: they would start from where the failed one was to end");
    }
    println!(
        "\ntest result: {}. {passed} passed; {failed} failed; {left} ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
        if failed == 0 { "ok" } else { "FAILED" },
        scenarios.len() - selected.len(),
        start.elapsed().as_secs_f64()
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn one(scenario: &Scenario, world: &mut World) -> Result<()> {
    let start = Instant::now();
    (scenario.run)(world).with_context(|| format!("after {:.1} s", start.elapsed().as_secs_f64()))?;
    println!("test {} ... ok ({:.1} s)", scenario.name, start.elapsed().as_secs_f64());
    for note in world.notes.drain(..) {
        println!("     {note}");
    }
    Ok(())
}

impl Arguments {
    fn parse(arguments: impl Iterator<Item = String>) -> Self {
        let mut parsed = Self { list: false, ignored: false, exact: false, filters: Vec::new() };
        let mut arguments = arguments.peekable();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--list" => parsed.list = true,
                "--ignored" => parsed.ignored = true,
                "--exact" => parsed.exact = true,
                // With a value.
                "--test-threads" | "--format" | "--color" | "--skip" | "-Z" => drop(arguments.next()),
                option if option.starts_with('-') => {}
                filter => parsed.filters.push(filter.to_owned()),
            }
        }
        parsed
    }

    /// What was asked for, and what that builds on.
    fn select<'a>(&self, scenarios: &'a [Scenario]) -> Vec<&'a Scenario> {
        let matches = |scenario: &Scenario| {
            let fits =
                |filter: &String| if self.exact { scenario.name == filter } else { scenario.name.contains(filter) };
            // None is marked as to be ignored.
            !self.ignored && (self.filters.is_empty() || self.filters.iter().any(fits))
        };
        if !scenarios.iter().any(matches) {
            return Vec::new();
        }
        scenarios.iter().filter(|scenario| matches(scenario) || (scenario.needed && !self.list)).collect()
    }
}
