//! `cargo xtask vm`: the tests on kernels that this machine does not run.
//!
//! Debian's kernels start in QEMU with an initramfs made of this machine's programs and the tests built here. QEMU translates
//! every instruction, so this needs no virtualisation and works where CI works; it is 10 to 20 times slower.

mod archive;
mod contents;
mod kernels;
mod machine;
mod modules;
mod outcome;
mod qemu;
mod store;
mod suites;

use std::{
    collections::BTreeMap,
    env,
    fs::File,
    io,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        mpsc::{Sender, channel},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use testbed::pace;
use vm_guest::{Plan, Report, Test};

use crate::{exec, places, setup, ui::Ui};
use archive::Archive;
use kernels::{Kernel, Series};
use machine::{Event, Machine};
use outcome::Outcome;
use qemu::Qemu;
use store::Store;

/// How much slower than here tests may be in a machine. Their time limits are multiplied by it.
const SLOWNESS: &str = "8";
/// Tests that run at a time: the machine has two processors.
const JOBS: usize = 2;
/// A machine that says nothing for so long hangs: tests have a limit of their own, which the machine enforces.
const SILENCE: Duration = Duration::from_mins(12);
/// How long a machine may run, in general and with `--full`.
const LIMIT: [Duration; 2] = [Duration::from_mins(40), Duration::from_hours(4)];

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only this kernel; may be given several times. All of them by default.
    #[arg(long, value_enum)]
    kernel: Vec<Series>,
    /// Run the long tests too (those marked ignored).
    #[arg(long)]
    full: bool,
    /// Look for newer kernels; otherwise those fetched before are used.
    #[arg(long)]
    update: bool,
    /// Show each kernel's console, also when all went well.
    #[arg(long)]
    verbose: bool,
    /// Only tests whose name contains this.
    #[arg(last = true)]
    filter: Option<String>,
}

/// How many tests passed and failed on all kernels.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Totals {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
}

pub(crate) fn run(ui: &Ui, options: &Options) -> Result<()> {
    setup::ensure(ui)?;
    let totals = run_all(ui, options)?;
    ensure!(
        totals.passed + totals.failed > 0,
        "no test's name contains {:?}",
        options.filter.as_deref().unwrap_or_default()
    );
    println!("{} passed, {} failed", totals.passed, totals.failed);
    if totals.failed > 0 {
        // The closing line is the message.
        std::process::exit(1);
    }
    Ok(())
}

/// Builds, fetches and runs. Nothing to run is no error here.
pub(crate) fn run_all(ui: &Ui, options: &Options) -> Result<Totals> {
    ensure!(
        env::consts::ARCH == "x86_64",
        "test machines run this machine's programs on x86-64 kernels; this is {}",
        env::consts::ARCH
    );
    let programs = ui.step("building the tests for machines", |step| {
        exec::quietly(
            &mut cargo(&[
                "build",
                "--locked",
                "--package",
                "underpass",
                "--package",
                "testbed",
                "--package",
                "vm-guest",
                "--bins",
            ]),
            step,
        )?;
        suites::build(&mut cargo(&[]), step)
    })?;
    let tests = suites::tests(&programs, options.filter.as_deref(), options.full)?;
    if tests.is_empty() {
        return Ok(Totals::default());
    }
    let series = if options.kernel.is_empty() { &Series::ALL[..] } else { &options.kernel };
    let (qemu, kernels) = fetch(ui, series, options.update)?;

    let directory = tempfile::Builder::new().prefix("underpass-vm-").tempdir().context("creating a directory")?;
    let system = directory.path().join("system.cpio");
    ui.step("making the machines' file system", |_| {
        let mut paths = own_programs().to_vec();
        paths.extend(programs.into_iter().map(|program| program.path));
        file_system(&paths, &tests, options.full)?.write(&system)
    })?;
    let interrupt = Interrupt::prepare()?;
    let mut totals = Totals::default();
    for kernel in &kernels {
        let outcome = one(ui, options, &qemu, kernel, &system, directory.path(), &tests, &interrupt)?;
        totals.passed += outcome.passed();
        totals.failed += outcome.failed();
    }
    Ok(totals)
}

/// What is needed from the network, if it is not there.
fn fetch(ui: &Ui, series: &[Series], update: bool) -> Result<(Qemu, Vec<Kernel>)> {
    let cache = places::cache()?;
    let _lock = setup::lock(ui, &cache)?;
    let store = Store::new(cache.join("vm"));
    let kernels = series.iter().map(|series| kernels::get(ui, &store, *series, update)).collect::<Result<_>>()?;
    Ok((Qemu::get(ui, &store)?, kernels))
}

/// Runs all tests on one kernel and tells how they went.
#[expect(clippy::too_many_arguments, reason = "a run is made of these")]
fn one<'a>(
    ui: &Ui,
    options: &Options,
    qemu: &Qemu,
    kernel: &Kernel,
    system: &Path,
    directory: &Path,
    tests: &'a [Test],
    interrupt: &Interrupt,
) -> Result<Outcome<'a>> {
    let initramfs = directory.join("initramfs");
    concatenate(&[&kernel.modules, system], &initramfs)?;
    let (sender, events) = channel();
    interrupt.send_to(sender.clone());
    ui.say(&format!("Starting Linux {} for {} tests", kernel.version, tests.len()));
    let machine = Machine::start(qemu, kernel, &initramfs, directory, (sender, events))?;
    let mut outcome = Outcome::new(kernel.series.to_string(), tests);
    let result = machine.follow(SILENCE, LIMIT[usize::from(options.full)], |report| {
        if let Report::Ready { kernel, uptime, lsm } = &report {
            let boot = machine.age().as_secs_f64();
            ui.say(&format!(
                "Linux {kernel} is ready after {boot:.1} s (by its clock {uptime:.1} s); security modules: {lsm}"
            ));
        }
        if let Some(line) = outcome.take(report) {
            ui.say(&line);
        }
    });
    if let Err(error) = result {
        let running = outcome.running();
        let running = if running.is_empty() { String::new() } else { format!(" while running {}", running.join(", ")) };
        ui.failure(&error.context(format!("Linux {}{running}", kernel.version)));
    } else if options.verbose {
        ui.say(&machine.console()?);
    }
    ui.say(&outcome.summary(machine.age().as_secs_f64()));
    ensure!(!interrupt.happened(), "interrupted");
    Ok(outcome)
}

/// Everything in the machines but the kernel's modules.
fn file_system(programs: &[PathBuf], tests: &[Test], full: bool) -> Result<Archive> {
    let mut archive = Archive::new();
    contents::fill(&mut archive, programs)?;
    // At the same places as here: tests know some of them from their build.
    for (path, stripped) in suites::strip(programs, &places::target().join("vm"))? {
        archive.copy(&path, &stripped);
        if path.file_name().is_some_and(|name| name == GUEST) {
            archive.copy("/init", &stripped);
        }
    }
    for test in tests {
        archive.directory(&test.directory, 0o755);
    }
    let plan = Plan { jobs: JOBS, environment: environment(full), tests: tests.to_vec() };
    archive.text(vm_guest::PLAN, serde_json::to_vec(&plan).context("writing the plan as JSON")?);
    Ok(archive)
}

/// The first process.
const GUEST: &str = "vm-guest";

/// The programs under test, the testbed's, and the first process.
fn own_programs() -> [PathBuf; 3] {
    ["underpass", "testbed-app", GUEST].map(|name| places::target().join("debug").join(name))
}

fn environment(full: bool) -> BTreeMap<String, String> {
    let [underpass, app, _] = own_programs().map(|path| path.display().to_string());
    let mut all: BTreeMap<String, String> = [
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        ("HOME", "/root"),
        ("RUST_BACKTRACE", "0"),
        ("UNDERPASS_BIN", underpass.as_str()),
        ("TESTBED_APP", app.as_str()),
        (pace::SLOWNESS, SLOWNESS),
        // Where the kernel can protect records, tests of the relay leave it to the kernel.
        ("UNDERPASS_TEST_KTLS", "1"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    if full {
        all.insert("UNDERPASS_FULL".into(), "1".into());
    }
    all
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.args(arguments).current_dir(places::repository());
    command
}

fn concatenate(parts: &[&Path], into: &Path) -> Result<()> {
    let mut out = File::create(into).with_context(|| format!("creating {}", into.display()))?;
    for part in parts {
        let mut part = File::open(part).with_context(|| format!("opening {}", part.display()))?;
        io::copy(&mut part, &mut out).with_context(|| format!("writing {}", into.display()))?;
    }
    Ok(())
}

/// SIGINT and SIGTERM, for the machine that runs.
struct Interrupt {
    shared: std::sync::Arc<Mutex<(bool, Option<Sender<Event>>)>>,
}

impl Interrupt {
    /// From now on they end the machine, and then this program in the usual way, which removes its files.
    fn prepare() -> Result<Self> {
        let shared = std::sync::Arc::new(Mutex::new((false, None::<Sender<Event>>)));
        let ours = std::sync::Arc::clone(&shared);
        ctrlc::set_handler(move || {
            let mut shared = ours.lock().expect("nothing panics while holding it");
            shared.0 = true;
            if let Some(sender) = &shared.1 {
                // Between two machines nobody listens; the flag is looked at then.
                let _ = sender.send(Event::Interrupted);
            }
        })
        .context("handling SIGINT and SIGTERM")?;
        Ok(Self { shared })
    }

    fn send_to(&self, sender: Sender<Event>) {
        self.shared.lock().expect("nothing panics while holding it").1 = Some(sender);
    }

    fn happened(&self) -> bool {
        self.shared.lock().expect("nothing panics while holding it").0
    }
}
