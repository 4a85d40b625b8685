//! `cargo xtask test`: every test, a short run of every fuzz target and of every torture, and tests on other kernels; one closing line.

mod tally;

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Result, bail, ensure};
use nix::unistd::geteuid;
use testbed::Testbed;

use crate::{
    exec, fuzz, places, setup, torture,
    ui::Ui,
    vm::{self, NEED_KTLS},
};
use tally::Tally;

/// How long each fuzz target runs, in general and with `--full`.
const FUZZ: [Duration; 2] = [Duration::from_secs(10), Duration::from_mins(1)];
/// Tests of `cargo test` that run at a time: most of them fill a network of their own.
const THREADS: &str = "2";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Run the long tests too (those marked ignored), and fuzz longer.
    #[arg(long)]
    full: bool,
    /// Do not fuzz.
    #[arg(long)]
    no_fuzz: bool,
    /// Do not run tests on other kernels in virtual machines.
    #[arg(long)]
    no_vm: bool,
    /// Only tests whose name contains this; nothing is fuzzed or tortured then, and no virtual machine started.
    filter: Option<String>,
}

pub(crate) fn run(ui: &Ui, options: &Options) -> Result<()> {
    ensure!(
        geteuid().is_root(),
        "the tests make network namespaces and load BPF programs: run them as root (sudo -E cargo xtask test)"
    );
    setup::ensure(ui)?;
    Testbed::sweep()?;
    ui.step("building the programs under test", |step| {
        exec::quietly(
            &mut cargo(&["build", "--locked", "--package", "underpass", "--package", "testbed", "--bins"]),
            step,
        )
    })?;
    ui.step("building the tests", |step| exec::quietly(&mut cargo(&["test", "--locked", "--no-run"]), step))?;

    let mut total = Tally::default();
    if places::program("cargo-nextest").is_some() {
        total += nextest(ui, options)?;
        if options.filter.is_none() {
            // nextest leaves the examples in the documentation out.
            total += cargo_test(ui, options, &["--doc"])?;
        }
    } else {
        total += cargo_test(ui, options, &[])?;
    }
    if options.filter.is_none() && !options.no_fuzz {
        let outcome = fuzz::run_all(ui, None, FUZZ[usize::from(options.full)])?;
        total.passed += outcome.passed;
        total.failed += outcome.failed.len();
    }
    if options.filter.is_none() {
        let outcome = torture::short(ui)?;
        total.passed += outcome.passed;
        total.failed += outcome.failed;
    }
    if options.filter.is_none() {
        if options.no_vm {
            ui.say("No tests run on other kernels (--no-vm).");
        } else {
            let outcome = vm::run_all(ui, &vm::Options::all_kernels(options.full))?;
            total.passed += outcome.passed;
            total.failed += outcome.failed;
        }
    }
    let left = Testbed::sweep()?.removed;
    for path in &left {
        ui.say(&format!("a test left {} behind", path.display()));
    }
    total.failed += usize::from(!left.is_empty());

    ensure!(
        total.passed + total.failed > 0,
        "no test's name contains {:?}",
        options.filter.as_deref().unwrap_or_default()
    );
    println!("{} passed, {} failed", total.passed, total.failed);
    if total.failed > 0 {
        // The closing line is the message.
        std::process::exit(1);
    }
    Ok(())
}

fn nextest(ui: &Ui, options: &Options) -> Result<Tally> {
    let mut command =
        cargo(&["nextest", "run", "--locked", "--no-fail-fast", "--no-tests=pass", "--hide-progress-bar"]);
    if options.full {
        command.args(["--run-ignored", "all"]).env("UNDERPASS_FULL", "1");
        if !has_ktls() {
            command.args(["--filterset", &format!("not test(/{NEED_KTLS}/)")]);
        }
    }
    command.args(&options.filter);
    count(ui, &mut command, tally::nextest)
}

fn cargo_test(ui: &Ui, options: &Options, arguments: &[&str]) -> Result<Tally> {
    let mut command = cargo(&["test", "--locked", "--no-fail-fast"]);
    command.args(arguments).args(["--", "--test-threads", THREADS]);
    if options.full {
        command.arg("--include-ignored").env("UNDERPASS_FULL", "1");
        if !has_ktls() {
            command.args(["--skip", NEED_KTLS]);
        }
    }
    command.args(&options.filter);
    count(ui, &mut command, tally::cargo_test)
}

/// Whether this kernel has TLS; its counters come with it. Tests that need it run in virtual machines in any case.
fn has_ktls() -> bool {
    Path::new("/proc/net/tls_stat").exists()
}

/// Runs tests in front of the user and adds their summaries up.
fn count(ui: &Ui, command: &mut Command, read: fn(&str) -> Option<Tally>) -> Result<Tally> {
    let mut total = Tally::default();
    let result = exec::each_line(command, |line| {
        ui.say(line);
        if let Some(more) = read(&console::strip_ansi_codes(line)) {
            total += more;
        }
    });
    match result {
        // A runner that fails without counting a failure could not build or run the tests.
        Err(error) if total.failed == 0 => bail!("{error:#}; no test is known to have failed"),
        _ => Ok(total),
    }
}

/// cargo, with what the tests have to know.
fn cargo(arguments: &[&str]) -> Command {
    let programs = places::target().join("debug");
    let mut command = Command::new("cargo");
    command.args(arguments).current_dir(places::repository());
    command.env("UNDERPASS_BIN", programs.join("underpass")).env("TESTBED_APP", programs.join("testbed-app"));
    command
}
