//! `cargo xtask bench`: what Underpass costs, beside what others cost, in one run.
//!
//! Every system has two nodes of its own ([`lane`]). Each round measures every case on every system before the next round begins, so that what
//! else happens on the machine hits all of them; ratios are made within a round.

#![expect(clippy::cast_precision_loss, reason = "counts of a few seconds are far below 2^52")]

mod case;
mod certificates;
mod charts;
mod docs;
mod idle;
mod lane;
mod machine;
mod measure;
mod proxies;
mod row;
mod system;
mod table;
mod wireguard;

use std::{
    fs,
    path::{Path, PathBuf},
    thread::available_parallelism,
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::geteuid,
};

use crate::{
    exec, leftovers, places, setup, signals,
    ui::{Step, Ui},
    vm::Series,
};
use case::{CASES, Case, Chosen, Load};
use docs::Kind as RunKind;
use lane::{Lane, Tools};
use measure::{Length, Sample};
pub(crate) use proxies::NGINX_STREAM;
use row::Row;
use system::{Abilities, Peer, System};

#[derive(clap::Args)]
#[expect(clippy::struct_excessive_bools, clippy::doc_markdown, reason = "flags of a command line, and their help")]
pub(crate) struct Options {
    /// Shorter and fewer measurements: minutes instead of a quarter of an hour, and more noise.
    #[arg(long)]
    quick: bool,
    /// Measure on this kernel, in a virtual machine, where the kernel has TLS and WireGuard. Times of emulated processors: only ratios mean anything.
    #[arg(long, value_enum, value_name = "KERNEL")]
    vm: Option<Series>,
    /// Count instructions of one emulated processor instead of time: they hardly vary. Only `bulk1`, `rr1kx1` and `crr1`.
    #[arg(long, requires = "vm")]
    icount: bool,
    /// Only this case; may be given several times.
    #[arg(long, value_name = "CASE")]
    case: Vec<Chosen>,
    /// Only this system; may be given several times. Plain TCP is always measured.
    #[arg(long, value_name = "SYSTEM")]
    system: Vec<String>,
    /// Another pair of proxies: COMMAND is run by sh on both sides, see docs/performance.md. May be given several times.
    #[arg(long, value_name = "NAME=COMMAND", conflicts_with = "vm")]
    peer: Vec<Peer>,
    /// Measure another agent, too, as `underpass-user-against` and `underpass-ktls-against`.
    #[arg(long, value_name = "FILE", conflicts_with = "vm")]
    against: Option<PathBuf>,
    /// Rounds [default: 5, with --quick 3, with --icount 2].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: Option<u16>,
    /// Seconds of each measurement [default: 2, with --quick 0.5, in a virtual machine 1].
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    seconds: Option<f64>,
    /// Write an array of all results to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write charts (SVG) into this directory.
    #[arg(long, value_name = "DIRECTORY")]
    charts: Option<PathBuf>,
    /// Put tables into docs/performance.md, and charts and results into docs/bench/.
    #[arg(long)]
    docs: bool,
    /// Use this agent instead of building one.
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// As in the virtual machine of `--vm`: all is installed and built. Ends with the results on one line.
    #[arg(long, hide = true, requires = "agent")]
    prepared: bool,
    /// The clock counts instructions.
    #[arg(long, hide = true, requires = "prepared")]
    counting: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "write a number of seconds, like 0.5".to_owned())?;
    if (0.05..=60.0).contains(&seconds) { Ok(seconds) } else { Err("must be from 0.05 to 60".into()) }
}

pub(crate) fn run(ui: &Ui, options: &Options) -> Result<()> {
    if options.prepared {
        println!("{}", serde_json::to_string(&perform(ui, options)?)?);
        return Ok(());
    }
    setup::ensure(ui)?;
    setup::ensure_for_bench(ui)?;
    let rows = match options.vm {
        Some(series) => machine::perform(ui, series, options)?,
        None => perform(ui, options)?,
    };
    print!("{}", table::text(&rows));
    report(ui, options, &rows)
}

/// Writes what was asked for.
fn report(ui: &Ui, options: &Options, rows: &[Row]) -> Result<()> {
    let kind = RunKind { vm: options.vm, icount: options.icount };
    let write = |path: &Path, text: String| {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
        }
        fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
        ui.say(&format!("Written: {}", path.display()));
        Ok::<_, anyhow::Error>(())
    };
    let json = serde_json::to_string_pretty(rows)? + "\n";
    let in_docs = options.docs.then(|| places::repository().join("docs/bench"));
    if let Some(file) = &options.json {
        write(file, json.clone())?;
    }
    for directory in options.charts.iter().chain(&in_docs) {
        for (name, svg) in charts::draw(kind, rows)? {
            write(&directory.join(name), svg)?;
        }
    }
    if let Some(directory) = in_docs {
        write(&directory.join(format!("{kind}.json")), json)?;
        let page = places::repository().join("docs/performance.md");
        let text = fs::read_to_string(&page).with_context(|| format!("reading {}", page.display()))?;
        write(&page, docs::insert(&text, kind, &table::markdown(rows))?)?;
    }
    Ok(())
}

/// Measures on this machine.
fn perform(ui: &Ui, options: &Options) -> Result<Vec<Row>> {
    ensure!(
        geteuid().is_root(),
        "benchmarks make network namespaces and load BPF programs: run them as root (sudo -E cargo xtask bench)"
    );
    signals::clean_up_when_interrupted()?;
    let (_, descriptors) = getrlimit(Resource::RLIMIT_NOFILE).context("reading the limit of open files")?;
    // Whatever is started inherits it.
    setrlimit(Resource::RLIMIT_NOFILE, descriptors, descriptors).context("raising the limit of open files")?;
    let tools = tools(ui, options, descriptors)?;
    leftovers::sweep(ui);
    let systems = systems(options)?;
    let cases = cases(options)?;
    let lanes = ui.step("two nodes for each system", |step| start(step, &systems, &cases, &tools))?;
    let mut rows = ui.step("measuring", |step| measure_all(step, &lanes, &cases, options, &tools))?;
    if let Some(case) = cases.iter().find(|case| case.load == Load::Idle) {
        rows.extend(ui.step("idle connections", |step| idle::measure(case, &lanes, &tools, options.quick, step))?);
    }
    for lane in &lanes {
        lane.verify().with_context(|| format!("looking at {}", lane.system.name))?;
    }
    ui.step("taking everything down", |_| {
        drop(lanes);
        Ok(())
    })?;
    Ok(rows)
}

fn tools(ui: &Ui, options: &Options, descriptors: u64) -> Result<Tools> {
    let find =
        |file: &PathBuf| file.canonicalize().with_context(|| format!("looking for the agent {}", file.display()));
    let against = options.against.as_ref().map(find).transpose()?;
    let processors = available_parallelism().context("counting processors")?.get();
    let tools = |agent, load| Tools { load, agent, against, processors, descriptors };
    if options.prepared {
        let agent = find(options.agent.as_ref().context("--prepared comes with --agent")?)?;
        return Ok(tools(agent.clone(), agent.with_file_name("testbed-load")));
    }
    ui.step("building the agent and the load generator (release)", |step| {
        let load = ["build", "--release", "--locked", "--package", "testbed", "--bin", "testbed-load"];
        let mut cargo = exec::cargo(&load);
        if options.agent.is_none() {
            cargo.args(["--package", "underpass", "--bin", "underpass"]);
        }
        exec::quietly(&mut cargo, step)
    })?;
    let release = places::target().join("release");
    let agent = options.agent.as_ref().map_or_else(|| Ok(release.join("underpass")), find)?;
    Ok(tools(agent, release.join("testbed-load")))
}

/// Plain TCP and what was asked for, as far as this kernel has it.
fn systems(options: &Options) -> Result<Vec<System>> {
    let all = System::all(Abilities::of_kernel(), &options.peer, options.against.is_some());
    let names: Vec<_> = all.iter().map(|system| system.name.clone()).collect();
    for wanted in &options.system {
        ensure!(
            names.contains(wanted),
            "there is no system {wanted:?} here, write one of {}; kernel TLS and WireGuard may need a virtual machine: --vm 6.12",
            names.join(", ")
        );
    }
    let wanted =
        |system: &System| options.system.is_empty() || system.name == "plain" || options.system.contains(&system.name);
    Ok(all.into_iter().filter(wanted).collect())
}

fn cases(options: &Options) -> Result<Vec<&'static Case>> {
    let mut cases: Vec<_> = options.case.iter().map(|chosen| chosen.0).collect();
    if cases.is_empty() {
        cases.extend(CASES.iter().filter(|case| !options.counting || machine::COUNTED.contains(&case.name)));
    }
    if options.counting {
        let other = cases.iter().find(|case| !machine::COUNTED.contains(&case.name));
        ensure!(
            other.is_none(),
            "instructions are counted for {} only, not for {}: leave --icount or the case out",
            machine::COUNTED.join(", "),
            other.map_or("", |case| case.name)
        );
    }
    // Ratios need what they are ratios to.
    for case in cases.clone() {
        let baseline = Case::named(case.baseline).context("every baseline is a case")?;
        if !cases.contains(&baseline) {
            cases.push(baseline);
        }
    }
    Ok(cases)
}

fn start(step: &Step, systems: &[System], cases: &[&Case], tools: &Tools) -> Result<Vec<Lane>> {
    let mut lanes = Vec::new();
    for cold in [false, true] {
        let needed = |system: &&System| cases.iter().any(|case| case.cold == cold && system.has(case));
        for system in systems.iter().filter(needed) {
            step.now(&system.name);
            lanes.push(Lane::start(system, cold, tools)?);
        }
    }
    Ok(lanes)
}

/// Every case on every lane that it is for, round by round.
fn measure_all(
    step: &Step,
    lanes: &[Lane],
    cases: &[&'static Case],
    options: &Options,
    tools: &Tools,
) -> Result<Vec<Row>> {
    let usual = match (options.counting, options.quick) {
        // One would do: the second shows that it is the same.
        (true, _) => 2,
        (false, true) => 3,
        (false, false) => 5,
    };
    let rounds = options.rounds.map_or(usual, usize::from);
    // What is emulated needs longer for the same.
    let usual = match (options.quick, options.prepared) {
        (true, false) => 0.5,
        (true, true) => 1.0,
        (false, _) => 2.0,
    };
    let measured = options.seconds.unwrap_or(usual);
    let length =
        if options.counting { Length::Amount } else { Length::Time { measured, warm_up: (measured / 4.0).max(0.15) } };
    let plan: Vec<(&Case, &Lane)> = cases
        .iter()
        .filter(|case| case.load != Load::Idle)
        .flat_map(|case| lanes.iter().filter(|lane| lane.is_for(case)).map(|lane| (*case, lane)))
        .collect();
    let mut all: Vec<Vec<Sample>> = vec![Vec::with_capacity(rounds); plan.len()];
    for round in 0..rounds {
        for (index, (case, lane)) in plan.iter().enumerate() {
            let name = format!("round {} of {rounds}: {}, {}", round + 1, case.name, lane.system.name);
            step.progress(round * plan.len() + index, rounds * plan.len(), &name);
            let measure = || measure::measure(lane, case, length, tools.processors);
            // On a machine that does something else, half a second may pass without an answer. Twice in a row is a fault.
            let sample = measure().or_else(|error| {
                step.note(&format!("    measured again: {name}: {error:#}"));
                measure()
            });
            all[index].push(sample.context(name)?);
        }
    }
    let plain =
        |case: &Case| plan.iter().position(|(other, lane)| other.name == case.baseline && lane.system.name == "plain");
    let row = |(index, (case, lane)): (usize, &(&Case, &Lane))| {
        let plain = plain(case).map(|index| &all[index]);
        let rounds: Vec<_> = all[index]
            .iter()
            .enumerate()
            .map(|(round, sample)| (sample.clone(), plain.map(|plain| plain[round].clone())))
            .collect();
        let unit = if options.counting { case.cost() } else { case.rate() };
        Row::of_rounds(case, &lane.system.name, unit, &rounds)
    };
    Ok(plan.iter().enumerate().filter_map(row).collect())
}
