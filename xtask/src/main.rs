//! The developers' commands: `cargo xtask --help`.

#![forbid(unsafe_code)]

mod bench;
mod check;
mod cluster;
mod demo;
mod exec;
mod fuzz;
mod image;
mod leftovers;
mod places;
mod setup;
mod signals;
mod test;
mod torture;
mod ui;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use ui::Ui;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Underpass' developer commands")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what building and testing need; says what and why. Does nothing when all is there.
    Setup(setup::Options),
    /// Show mutual TLS between two nodes full of unmodified programs (root).
    Demo(demo::Options),
    /// Run every test, then every fuzz target for a short time, then tests on other kernels (root).
    Test(test::Options),
    /// Run the tests that talk to the kernel on other kernels, in virtual machines.
    Vm(vm::Options),
    /// A real Kubernetes: its programs, the tests on its control plane, a cluster of two nodes to play with (root).
    Cluster(cluster::Options),
    /// Measure what Underpass costs, beside other systems, in one run (root).
    Bench(bench::Options),
    /// Try to make the agents lose, repeat or reorder bytes, or end connections otherwise than plain TCP does (root).
    Torture(torture::Options),
    /// The agent as a container image in a file, for `ctr images import`.
    Image(image::Options),
    /// Formatting, lints, documentation links, licences and advisories.
    Check,
    /// Run the fuzz targets.
    Fuzz(fuzz::Options),
}

fn main() -> ExitCode {
    let ui = Ui::new();
    let result = match Cli::parse().command {
        Command::Setup(options) => setup::run(&ui, &options),
        Command::Demo(options) => demo::run(&ui, &options),
        Command::Test(options) => test::run(&ui, &options),
        Command::Vm(options) => vm::run(&ui, &options),
        Command::Cluster(options) => cluster::run(&ui, &options),
        Command::Bench(options) => bench::run(&ui, &options),
        Command::Torture(options) => torture::run(&ui, &options),
        Command::Image(options) => image::run(&ui, &options),
        Command::Check => check::run(&ui),
        Command::Fuzz(options) => fuzz::run(&ui, &options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ui.failure(&error);
            ExitCode::FAILURE
        }
    }
}
