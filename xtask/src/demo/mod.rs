//! `cargo xtask demo`: the same running programs without and with Underpass, side by side.

mod report;
mod scene;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nix::unistd::geteuid;
use testbed::Testbed;

use crate::{
    exec, leftovers, places, setup, signals,
    ui::Ui,
    vm::{self, Series},
};
use report::Report;
use scene::Scene;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// End with one line of JSON on standard output instead of a table.
    #[arg(long)]
    json: bool,
    /// Seconds of each throughput measurement.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// Show it on this kernel, in a virtual machine, where the kernel has TLS. Ends with the line of JSON, too.
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
    match options.vm {
        Some(series) => in_machine(ui, series, options),
        None => here(ui, options),
    }
}

/// The same program in a virtual machine.
fn in_machine(ui: &Ui, series: Series, options: &Options) -> Result<()> {
    setup::ensure(ui)?;
    let seconds = options.seconds.to_string();
    let arguments = ["demo", "--prepared", "--seconds", &seconds, "--agent"];
    vm::run_this(ui, series, &arguments, |line, aside| {
        if aside {
            ui.say(line);
        } else if !options.json || line.starts_with('{') {
            println!("{line}");
        }
    })
}

fn here(ui: &Ui, options: &Options) -> Result<()> {
    let result = perform(ui, options);
    let ok = result.as_ref().is_ok_and(Report::ok);
    if options.prepared
        && let Ok(report) = &result
    {
        print!("{}", report.table());
    }
    if options.json || options.prepared {
        let line = match &result {
            Ok(report) => report.json(),
            Err(error) => serde_json::json!({ "ok": false, "error": format!("{error:#}") }),
        };
        println!("{line}");
    } else if let Ok(report) = &result {
        print!("{}", report.table());
    }
    let report = result?;
    ensure!(ok, "not shown: {}", report.failed().join("; "));
    Ok(())
}

fn perform(ui: &Ui, options: &Options) -> Result<Report> {
    ensure!(
        geteuid().is_root(),
        "the demo makes network namespaces and loads BPF programs: run it as root (sudo -E cargo xtask demo)"
    );
    signals::clean_up_when_interrupted()?;
    if !options.prepared {
        setup::ensure(ui)?;
    }
    let agent = match &options.agent {
        Some(file) => file.canonicalize().with_context(|| format!("looking for the agent {}", file.display()))?,
        None => build(ui)?,
    };
    leftovers::sweep(ui);

    let mut scene = ui.step("two nodes, five pods: nginx, redis, iperf3, curl", |_| Scene::set())?;
    let without = ui.step("without Underpass", |step| scene.observe(step, options.seconds))?;
    let agents = ui.step("enrolling the running pods", |_| scene.start_agents(&agent))?;
    let with = ui.step("with Underpass", |step| scene.observe(step, options.seconds))?;
    let tunnel = ui.step("who talks to whom", |_| scene.look_at_tunnel(&agents))?;
    let unchanged = scene.programs_unchanged();
    let left = ui.step("taking everything down", |_| {
        drop(agents);
        let id = scene.end();
        Testbed::leftovers(&id)
    })?;
    Ok(Report { without, with, tunnel, programs_unchanged: unchanged, left, expect_ktls: options.prepared })
}

/// Builds the agent as it would be shipped.
fn build(ui: &Ui) -> Result<PathBuf> {
    ui.step("building the agent (release)", |step| {
        let agent = ["build", "--release", "--locked", "--package", "underpass", "--bin", "underpass"];
        exec::quietly(&mut exec::cargo(&agent), step)
    })?;
    Ok(places::target().join("release/underpass"))
}
