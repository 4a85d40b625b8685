//! `cargo xtask test`: every test, a short run of every fuzz target and of every torture, tests on Kubernetes and on other kernels; one
//! closing line.

mod tally;

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::geteuid;
use serde::Deserialize;
use testbed::{AppliedCleanup, Testbed};

use crate::{
    cluster, exec,
    fuzz::{self, Depth},
    leftovers, places, setup, torture,
    ui::Ui,
    vm::{self, NEED_INTERFACES, NEED_KTLS},
};
pub(crate) use tally::Tally;
use tally::{Reading, Runner};

/// What of a fuzz target is instrumented, and how long it runs, in general and with `--full`.
const FUZZ: [(Depth, Duration); 2] =
    [(Depth::Workspace, Duration::from_secs(10)), (Depth::Everything, Duration::from_mins(1))];
/// Tests of `cargo test` that run at a time: most of them fill a network of their own.
const THREADS: &str = "2";
/// The agent's tests that need a Kubernetes control plane, whose programs have to be built first: `cargo xtask cluster test`.
const KUBERNETES: &str = "kubernetes";
/// Target of the scenarios that install on a whole cluster; it has a harness of its own.
const INSTALL: &str = "install";

#[derive(clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of the command line")]
pub(crate) struct Options {
    /// Run the long tests too (those marked ignored), and fuzz longer.
    #[arg(long)]
    full: bool,
    /// Do not fuzz.
    #[arg(long)]
    no_fuzz: bool,
    /// Do not run tests that need a Kubernetes control plane, whose programs take some ten minutes to build, once.
    #[arg(long)]
    no_cluster: bool,
    /// Do not run tests on other kernels in virtual machines.
    #[arg(long)]
    no_vm: bool,
    /// Only tests whose name contains this; nothing is fuzzed or tortured then, and no control plane or virtual machine
    /// started.
    filter: Option<String>,
}

pub(crate) fn run(ui: &Ui, options: &Options) -> Result<()> {
    ensure!(
        geteuid().is_root(),
        "the tests make network namespaces and load BPF programs: run them as root (sudo -E cargo xtask test)"
    );
    setup::ensure(ui)?;
    cluster::ensure_for_chart(ui)?;
    leftovers::sweep(ui);
    build(ui)?;

    let mut total = Tally::default();
    let filter = options.filter.as_deref();
    if places::program("cargo-nextest").is_some() {
        let others = format!("not (binary(={KUBERNETES}) | binary(={INSTALL}))");
        stage(ui, &mut total, nextest(ui, options.full, filter, &others));
        if filter.is_none() {
            // nextest leaves the examples in the documentation out.
            stage(ui, &mut total, cargo_test(ui, options.full, None, &["--doc"]));
        }
    } else {
        without_nextest(ui, options, &mut total)?;
    }
    if filter.is_none() {
        beyond_this_host(ui, options, &mut total);
    }
    close(ui, total, filter)
}

/// What is no test of cargo's, or needs more than this machine's kernel.
fn beyond_this_host(ui: &Ui, options: &Options, total: &mut Tally) {
    if !options.no_fuzz {
        let (depth, time) = FUZZ[usize::from(options.full)];
        stage(ui, total, fuzz::run_all(ui, None, depth, time));
    }
    stage(ui, total, torture::short(ui));
    if options.no_cluster {
        ui.say("No tests run on Kubernetes (--no-cluster).");
    } else {
        stage(ui, total, cluster::run_all(ui, None, options.full));
        if options.full {
            stage(ui, total, cluster::install(ui, None));
        }
    }
    if options.no_vm {
        ui.say("No tests run on other kernels (--no-vm).");
    } else {
        stage(ui, total, vm::run_all(ui, &vm::Options::all_kernels(options.full)));
    }
}

/// Takes in how a part of the tests went. That it could not run is a failure like others: those are told in the end all the same.
fn stage(ui: &Ui, total: &mut Tally, result: Result<Tally>) {
    match result {
        Ok(more) => *total += more,
        Err(error) => {
            ui.failure(&error);
            total.fail(&format!("{error:#}"));
        }
    }
}

/// Builds tests, and the programs that they start, with what both need of features: one after the other, cargo would build most twice.
pub(crate) const BUILD: &[&str] = &["build", "--locked", "--bins", "--tests"];

/// Looks for what tests left behind, which is a failure, and ends with the closing lines.
pub(crate) fn close(ui: &Ui, mut total: Tally, filter: Option<&str>) -> Result<()> {
    let left = Testbed::sweep().unwrap_or_else(|error| {
        total.fail(&format!("{error:#}"));
        AppliedCleanup::default()
    });
    if !left.removed.is_empty() {
        let paths: Vec<_> = left.removed.iter().map(|path| format!("\n    {}", path.display())).collect();
        total.fail(&format!("tests left behind:{}", paths.concat()));
    }
    ensure!(total.passed + total.failed > 0, "no test's name contains {:?}", filter.unwrap_or_default());
    closing_lines(ui, &total);
    Ok(())
}

/// Tells once more what failed, and how many tests did and did not. The program ends with them if any failed.
pub(crate) fn closing_lines(ui: &Ui, total: &Tally) {
    if total.failed > 0 {
        ui.say("\nWhat failed, once more:");
        for account in total.accounts() {
            ui.say(account);
        }
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    if total.failed > 0 {
        // The closing lines are the message.
        std::process::exit(1);
    }
}

/// Builds the tests and the programs that they start.
pub(crate) fn build(ui: &Ui) -> Result<()> {
    ui.step("building the programs and the tests", |step| exec::quietly(&mut exec::cargo(BUILD), step))
}

/// Runs the tests that need a Kubernetes control plane, whose programs are there.
pub(crate) fn kubernetes(ui: &Ui, filter: Option<&str>, full: bool) -> Result<Tally> {
    if places::program("cargo-nextest").is_some() {
        nextest(ui, full, filter, &format!("binary(={KUBERNETES})"))
    } else {
        cargo_test(ui, full, filter, &["--test", KUBERNETES])
    }
}

/// Runs the scenarios that install on a whole cluster, whose programs are there.
pub(crate) fn install(ui: &Ui, filter: Option<&str>) -> Result<Tally> {
    cargo_test(ui, false, filter, &["--test", INSTALL])
}

/// Every test but those on Kubernetes.
fn without_nextest(ui: &Ui, options: &Options, total: &mut Tally) -> Result<()> {
    // cargo can leave nothing out, so all others are named.
    let mut arguments = vec!["--lib".to_owned(), "--bins".to_owned()];
    for target in test_targets()?.into_iter().filter(|target| target != KUBERNETES && target != INSTALL) {
        arguments.extend(["--test".to_owned(), target]);
    }
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    for arguments in [&arguments[..], &["--doc"]] {
        stage(ui, total, cargo_test(ui, options.full, options.filter.as_deref(), arguments));
    }
    Ok(())
}

/// Names of the integration tests of the packages that are built by default.
fn test_targets() -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Metadata {
        packages: Vec<Package>,
        workspace_default_members: Vec<String>,
    }
    #[derive(Deserialize)]
    struct Package {
        id: String,
        targets: Vec<Target>,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
        kind: Vec<String>,
    }
    let text = exec::output(&mut cargo(&["metadata", "--locked", "--no-deps", "--format-version=1"]))?;
    let all: Metadata = serde_json::from_str(&text).context("reading cargo's metadata")?;
    let members = all.packages.into_iter().filter(|package| all.workspace_default_members.contains(&package.id));
    let targets = members.flat_map(|package| package.targets);
    let mut names: Vec<_> =
        targets.filter(|target| target.kind.iter().any(|kind| kind == "test")).map(|target| target.name).collect();
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

/// Runs the tests that a filterset of nextest selects.
fn nextest(ui: &Ui, full: bool, filter: Option<&str>, wanted: &str) -> Result<Tally> {
    let mut command =
        cargo(&["nextest", "run", "--locked", "--no-fail-fast", "--no-tests=pass", "--hide-progress-bar"]);
    let mut filterset = vec![wanted.to_owned()];
    if full {
        command.args(["--run-ignored", "all"]).env("UNDERPASS_FULL", "1");
        filterset.extend(NEED_INTERFACES.map(|part| format!("not test(/{part}/)")));
        if !has_ktls() {
            filterset.push(format!("not test(/{NEED_KTLS}/)"));
        }
    }
    command.args(["--filterset", &filterset.join(" & ")]).args(filter);
    count(ui, &mut command, Runner::Nextest)
}

fn cargo_test(ui: &Ui, full: bool, filter: Option<&str>, arguments: &[&str]) -> Result<Tally> {
    let mut command = cargo(&["test", "--locked", "--no-fail-fast"]);
    command.args(arguments).args(["--", "--test-threads", THREADS]);
    if full {
        command.arg("--include-ignored").env("UNDERPASS_FULL", "1");
        command.args(NEED_INTERFACES.iter().flat_map(|part| ["--skip", part]));
        if !has_ktls() {
            command.args(["--skip", NEED_KTLS]);
        }
    }
    command.args(filter);
    count(ui, &mut command, Runner::Cargo)
}

/// Whether this kernel has TLS; its counters come with it. Tests that need it run in virtual machines in any case.
fn has_ktls() -> bool {
    Path::new("/proc/net/tls_stat").exists()
}

/// Runs tests in front of the user and adds their summaries up.
fn count(ui: &Ui, command: &mut Command, runner: Runner) -> Result<Tally> {
    let mut reading = Reading::of(runner);
    let result = exec::each_line(command, |line| {
        ui.say(line);
        reading.take(&console::strip_ansi_codes(line));
    });
    let total = reading.end();
    match result {
        // A runner that fails without counting a failure could not build or run the tests.
        Err(error) if total.failed == 0 => bail!("{error:#}; no test is known to have failed"),
        _ => Ok(total),
    }
}

/// cargo, with what the tests have to know.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let programs = places::target().join("debug");
    let mut command = exec::cargo(arguments);
    command.env("UNDERPASS_BIN", programs.join("underpass")).env("TESTBED_APP", programs.join("testbed-app"));
    command
}
