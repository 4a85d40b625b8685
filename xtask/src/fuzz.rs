//! `cargo xtask fuzz`: libFuzzer with the address sanitizer, on the stable compiler.

use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    exec, places, setup,
    test::{self, Tally},
    ui::{Step, Ui},
};

/// Package with the targets.
const PACKAGE: &str = "underpass-fuzz";
/// How long a target runs by default.
const DEFAULT_SECONDS: u64 = 60;
/// What cargo-fuzz would pass: coverage for libFuzzer, and the sanitizer. Options that a stable compiler keeps for nightly.
const FLAGS: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Zsanitizer=address",
    "-Cdebug-assertions",
];
/// A small test. Asking for one makes the features of dependencies those that they have when tests are built.
const SAME_FEATURES: &str = "load";
/// Compiles a crate of this workspace with what is in `UNDERPASS_FUZZ_FLAGS`.
const WRAPPER: &str = "agent/fuzz/rustc-instrumented";

/// What libFuzzer sees, and the sanitizer watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// This workspace's crates, and what they instantiate of generic code. Everything else is what tests have been built with.
    Workspace,
    /// All crates, which takes some ten minutes to compile.
    Everything,
}

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only targets whose name contains this.
    filter: Option<String>,
    /// Seconds per target.
    #[arg(long, default_value_t = DEFAULT_SECONDS)]
    seconds: u64,
}

pub(crate) fn run(ui: &Ui, options: &Options) -> Result<()> {
    setup::ensure(ui)?;
    let seconds = Duration::from_secs(options.seconds);
    let outcome = run_all(ui, options.filter.as_deref(), Depth::Everything, seconds)?;
    let wanted = options.filter.as_deref().unwrap_or("");
    ensure!(outcome.passed + outcome.failed > 0, "no fuzz target's name contains {wanted:?}");
    test::closing_lines(ui, &outcome);
    Ok(())
}

/// Builds the targets and runs each for `time`.
pub(crate) fn run_all(ui: &Ui, filter: Option<&str>, depth: Depth, time: Duration) -> Result<Tally> {
    let mut outcome = Tally::default();
    let mut targets = targets()?;
    targets.retain(|target| filter.is_none_or(|text| target.contains(text)));
    if targets.is_empty() {
        return Ok(outcome);
    }
    let programs = ui.step("building the fuzz targets", |step| build(&targets, depth, step))?;
    let what = format!("fuzzing {} targets for {} s each", targets.len(), time.as_secs());
    let results = ui.step(&what, |step| {
        let run = |target: &str| one(&programs.join(target), target, time, step);
        Ok(side_by_side(&targets, run, |done| step.progress(done, targets.len(), "targets have been fuzzed")))
    })?;
    for result in results {
        match result {
            Ok(()) => outcome.passed += 1,
            Err(error) => {
                ui.failure(&error);
                outcome.fail(&format!("{error:#}"));
            }
        }
    }
    Ok(outcome)
}

/// Where corpora, artifacts and what is compiled with all of it instrumented are.
fn directory() -> PathBuf {
    places::target().join("fuzz")
}

/// Builds targets; where they are then.
fn build(targets: &[String], depth: Depth, step: &Step) -> Result<PathBuf> {
    let mut cargo = exec::cargo(&["build", "--locked"]);
    let programs = match depth {
        Depth::Workspace => {
            cargo.args(["--workspace", "--exclude", "underpass-ebpf", "--test", SAME_FEATURES]);
            cargo.env("RUSTC_WORKSPACE_WRAPPER", places::repository().join(WRAPPER));
            cargo.env("UNDERPASS_FUZZ_FLAGS", FLAGS.join(" "));
            places::target().join("debug")
        }
        Depth::Everything => {
            let host = host()?;
            cargo.args(["--release", "--package", PACKAGE]).arg("--target-dir").arg(directory());
            // With --target they do not reach build scripts and macros.
            cargo.args(["--target", &host]).env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"));
            cargo.env("RUSTC_BOOTSTRAP", "1").env_remove("RUSTFLAGS");
            // Most of the time of a short run is compiling.
            cargo.env("CARGO_PROFILE_RELEASE_LTO", "off").env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
            directory().join(host).join("release")
        }
    };
    cargo.args(targets.iter().flat_map(|target| ["--bin", target]));
    exec::quietly(&mut cargo, step)?;
    Ok(programs)
}

/// Runs every target, one per processor at a time; their results in the order of the targets.
fn side_by_side(
    targets: &[String],
    run: impl Fn(&str) -> Result<()> + Sync,
    done: impl Fn(usize) + Sync,
) -> Vec<Result<()>> {
    let (next, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        let mut results = Vec::new();
        loop {
            let number = next.fetch_add(1, Relaxed);
            let Some(target) = targets.get(number) else { return results };
            results.push((number, run(target)));
            done(ended.fetch_add(1, Relaxed) + 1);
        }
    };
    let workers = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let mut results: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("no worker panics")).collect()
    });
    results.sort_by_key(|(number, _)| *number);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Runs one target. The corpus grows below the target directory; seeds from the repository are read only.
fn one(binary: &Path, name: &str, time: Duration, step: &Step) -> Result<()> {
    let corpus = made(directory().join("corpus").join(name))?;
    let artifacts = made(directory().join("artifacts").join(name))?;
    let seeds = places::repository().join("agent/fuzz/seeds").join(name);
    let mut fuzzer = Command::new(binary);
    fuzzer.arg(&corpus).args(seeds.is_dir().then_some(&seeds));
    fuzzer.arg(format!("-max_total_time={}", time.as_secs())).args([
        "-rss_limit_mb=4096",
        "-timeout=10",
        "-print_final_stats=1",
    ]);
    fuzzer.arg(format!("-artifact_prefix={}/", artifacts.display()));
    // What the target links never frees at exit is not what is looked for.
    fuzzer.env("ASAN_OPTIONS", "detect_leaks=0");
    let result = exec::quietly(&mut fuzzer, step);
    result.with_context(|| {
        format!(
            "fuzz target {name} failed; the input is in {}: run it with {} FILE",
            artifacts.display(),
            binary.display()
        )
    })
}

fn made(path: PathBuf) -> Result<PathBuf> {
    fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
    Ok(path)
}

/// Names of the targets: the package's programs.
fn targets() -> Result<Vec<String>> {
    let text = exec::output(&mut exec::cargo(&["metadata", "--no-deps", "--format-version=1"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&text).context("reading cargo's metadata")?;
    let packages = metadata["packages"].as_array().context("cargo's metadata has no packages")?;
    let Some(package) = packages.iter().find(|package| package["name"] == PACKAGE) else {
        bail!("there is no package {PACKAGE}")
    };
    let targets = package["targets"].as_array().context("a package has targets")?;
    let programs =
        targets.iter().filter(|target| target["kind"].as_array().is_some_and(|k| k.iter().any(|k| k == "bin")));
    Ok(programs.filter_map(|target| target["name"].as_str()).map(str::to_owned).collect())
}

fn host() -> Result<String> {
    let text = exec::output(Command::new("rustc").arg("-vV"))?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc does not say its host")?.to_owned())
}
