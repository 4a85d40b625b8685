//! `cargo xtask vm`: the tests on kernels that this machine does not run.
//!
//! Debian's kernels start in QEMU with an initramfs made of this machine's programs and the tests built here. QEMU translates
//! every instruction, so this needs no virtualisation and works where CI works; programs are five to ten times slower there.

mod archive;
mod contents;
mod image;
mod kernels;
mod machine;
mod modules;
mod outcome;
mod qemu;
mod run;
mod store;
mod suites;

use std::env;

use anyhow::{Context, Result, ensure};

use vm_guest::Program;

use crate::{
    exec, places, setup,
    test::{self, Tally},
    ui::{Step, Ui},
};
pub(crate) use contents::libraries;
use image::Profile;
use kernels::Kernel;
pub(crate) use kernels::Series;
pub(crate) use machine::Processors;
use qemu::Qemu;
use run::Run;
use store::Store;
pub(crate) use suites::{NEED_INTERFACES, NEED_KTLS};

/// Seconds that a program other than a test may take.
const PROGRAM_LIMIT: u64 = 1500;
/// The same for benchmarks.
const BENCH_LIMIT: u64 = 7000;

#[derive(clap::Args, Default)]
pub(crate) struct Options {
    /// Only this kernel; may be given several times. All of them by default.
    #[arg(long, value_enum)]
    kernel: Vec<Series>,
    /// Run every test, also the long ones (those marked ignored) and those that depend little on the kernel. Without it, and
    /// without a filter or --kernel, some tests run on 6.12 only.
    #[arg(long)]
    full: bool,
    /// Look for newer kernels; otherwise those fetched before are used.
    #[arg(long)]
    update: bool,
    /// Show each kernel's console, also when all went well.
    #[arg(long)]
    verbose: bool,
    /// Only tests whose name contains this, as it is printed: `e2e traffic::redis_pipelines`.
    #[arg(last = true)]
    filter: Option<String>,
}

impl Options {
    /// Particular tests or kernels were asked for, or everything.
    fn is_particular(&self) -> bool {
        self.full || self.filter.is_some() || !self.kernel.is_empty()
    }

    /// What `cargo xtask test` runs.
    pub(crate) fn all_kernels(full: bool) -> Self {
        Self { full, ..Self::default() }
    }
}

pub(crate) fn run(ui: &Ui, options: &Options) -> Result<()> {
    setup::ensure(ui)?;
    test::closing_lines(ui, &run_all(ui, options)?);
    Ok(())
}

/// Builds, fetches and runs. That no test is selected is an error.
pub(crate) fn run_all(ui: &Ui, options: &Options) -> Result<Tally> {
    supported()?;
    let programs = ui.step("building the tests for virtual machines", |step| {
        // As `cargo xtask test` builds them: another selection has other features, and builds everything again.
        exec::quietly(&mut exec::cargo(test::BUILD), step)?;
        suites::build(&mut exec::cargo(&["test", "--locked"]), step)
    })?;
    let tests = suites::tests(&programs, options.filter.as_deref(), options.full)?;
    ensure!(!tests.is_empty(), "no test's name contains {:?}", options.filter.as_deref().unwrap_or_default());
    let series = if options.kernel.is_empty() { &Series::ALL[..] } else { &options.kernel };
    let (qemu, kernels) = fetch(ui, series, options.update)?;

    let paths: Vec<_> = programs.into_iter().map(|program| program.path).collect();
    let run = Run::prepare(ui, options, &qemu, &paths, &tests)?;
    let mut total = Tally::default();
    for kernel in &kernels {
        total += run.on(kernel)?;
    }
    Ok(total)
}

/// Runs this program with other arguments, of which the last one is the agent's path, on a kernel. What it prints is given to `with`, with whether
/// it was on standard error.
pub(crate) fn run_this(ui: &Ui, series: Series, arguments: &[&str], with: impl FnMut(&str, bool)) -> Result<()> {
    let arguments: Vec<_> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    run_as(ui, series, (Profile::Debug, Processors::Parallel, PROGRAM_LIMIT), &arguments, with)
}

/// The same for benchmarks: with programs as they are shipped.
pub(crate) fn run_bench(
    ui: &Ui,
    series: Series,
    processors: Processors,
    arguments: &[String],
    with: impl FnMut(&str, bool),
) -> Result<()> {
    run_as(ui, series, (Profile::Release, processors, BENCH_LIMIT), arguments, with)
}

fn run_as(
    ui: &Ui,
    series: Series,
    (profile, processors, limit): (Profile, Processors, u64),
    arguments: &[String],
    with: impl FnMut(&str, bool),
) -> Result<()> {
    supported()?;
    ui.step("building what runs in the virtual machine", |step| build_programs(profile, step))?;
    let (qemu, kernels) = fetch(ui, &[series], false)?;
    let kernel = kernels.first().context("one was asked for")?;
    let path = env::current_exe().context("finding this program")?;
    let agent = image::agent(profile).display().to_string();
    let arguments = arguments.iter().cloned().chain([agent]).collect();
    run::program(ui, &qemu, kernel, profile, processors, Program { path, arguments, limit }, with)
}

fn supported() -> Result<()> {
    ensure!(
        env::consts::ARCH == "x86_64",
        "virtual machines run this machine's programs on x86-64 kernels; this is {}: leave them out (cargo xtask test --no-vm)",
        env::consts::ARCH
    );
    Ok(())
}

fn build_programs(profile: Profile, step: &Step) -> Result<()> {
    let packages = ["underpass", "testbed", image::GUEST].into_iter().flat_map(|name| ["--package", name]);
    exec::quietly(exec::cargo(&["build", "--locked"]).args(profile.argument()).args(packages).arg("--bins"), step)
}

/// What is needed from the network, if it is not there.
fn fetch(ui: &Ui, series: &[Series], update: bool) -> Result<(Qemu, Vec<Kernel>)> {
    let cache = places::cache()?;
    let _lock = setup::lock(ui, &cache)?;
    let store = Store::new(cache.join("vm"));
    let kernels = series.iter().map(|series| kernels::get(ui, &store, *series, update)).collect::<Result<_>>();
    Ok((Qemu::get(ui, &store)?, kernels.context("fetching kernels for virtual machines")?))
}
