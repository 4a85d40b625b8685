//! The same tests on one kernel after the other.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        mpsc::{Sender, channel},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;
use vm_guest::{Program, Report, Test};

use super::{
    Options,
    image::{self, Profile},
    kernels::Kernel,
    machine::{Event, Machine, Processors},
    outcome::Outcome,
    qemu::Qemu,
    suites,
};
use crate::{test::Tally, ui::Ui};

/// A machine that says nothing for so long hangs: tests have a limit of their own, which the machine enforces.
const SILENCE: Duration = Duration::from_mins(12);
/// How long a machine may run, in general, and with `--full` or for benchmarks.
const LIMIT: [Duration; 2] = [Duration::from_mins(40), Duration::from_hours(4)];

/// In a log, one of so many tests that passed is named.
const PASSES: usize = 25;

/// Everything that does not depend on the kernel.
pub(super) struct Run<'a> {
    ui: &'a Ui,
    options: &'a Options,
    qemu: &'a Qemu,
    tests: &'a [Test],
    /// Files of this run, removed with it.
    directory: TempDir,
    /// The part of the initramfs that all kernels have.
    system: PathBuf,
    interrupt: Interrupt,
}

impl<'a> Run<'a> {
    pub(super) fn prepare(
        ui: &'a Ui,
        options: &'a Options,
        qemu: &'a Qemu,
        programs: &[PathBuf],
        tests: &'a [Test],
    ) -> Result<Self> {
        let interrupt = Interrupt::prepare()?;
        let directory = tempfile::Builder::new().prefix("underpass-vm-").tempdir().context("creating a directory")?;
        let system = directory.path().join("system.cpio");
        ui.step("making the virtual machines' file system", |_| {
            image::make(Profile::Debug, programs, tests)?.write(&system)
        })?;
        Ok(Self { ui, options, qemu, tests, directory, system, interrupt })
    }

    /// Runs the tests on one kernel and tells how they went.
    pub(super) fn on(&self, kernel: &Kernel) -> Result<Tally> {
        let tests = suites::for_kernel(self.tests, kernel.series, self.options.is_particular());
        let left_out = self.tests.len() - tests.len();
        let (plan, initramfs) = (self.directory.path().join("plan.cpio"), self.directory.path().join("initramfs"));
        image::plan(Profile::Debug, tests.clone(), None, self.options.full)?.write(&plan)?;
        concatenate(&[&kernel.modules, &self.system, &plan], &initramfs)?;
        let (sender, events) = channel();
        self.interrupt.send_to(sender.clone());
        let without =
            if left_out == 0 { String::new() } else { format!(", {left_out} left out: they need tcx, or run on 6.12") };
        self.ui.say(&format!("Starting Linux {} for {} tests{without}", kernel.version, tests.len()));
        let machine = Machine::start(
            self.qemu,
            kernel,
            Processors::Parallel,
            &initramfs,
            self.directory.path(),
            (sender, events),
        )?;
        let mut outcome = Outcome::new(kernel.series.to_string(), tests);
        let result = machine.follow(SILENCE, LIMIT[usize::from(self.options.full)], |report| {
            if let Report::Ready { kernel, uptime, lsm } = &report {
                let boot = machine.age().as_secs_f64();
                self.ui.say(&format!(
                    "Linux {kernel} is ready after {boot:.1} s (by its own clock {uptime:.1} s); security modules: {lsm}"
                ));
            }
            if let Some(line) = outcome.take(report) {
                // Most of a log would be tests that passed.
                let routine = self.ui.is_log() && line.trim_start().starts_with("PASS");
                if !routine || outcome.passed().is_multiple_of(PASSES) {
                    self.ui.say(&line);
                }
            }
        });
        // QEMU has got the signal too, and its end is no failure then.
        ensure!(!self.interrupt.happened(), "interrupted");
        let ended = machine.age().as_secs_f64();
        let mut total = outcome.tally();
        if let Err(error) = result {
            let running = match outcome.running() {
                none if none.is_empty() => String::new(),
                some => format!(" while running {}", some.join(" and ")),
            };
            let error = error.context(format!("Linux {}{running}", kernel.version));
            total.tell(&format!("{error:#}"));
            self.ui.failure(&error);
        } else if self.options.verbose {
            self.ui.say(&machine.console()?);
        }
        self.ui.say(&outcome.summary(ended));
        Ok(total)
    }
}

/// Runs this program itself with other arguments on one kernel. What it prints is given to `with`, with whether it was on standard error.
pub(super) fn program(
    ui: &Ui,
    qemu: &Qemu,
    kernel: &Kernel,
    profile: Profile,
    processors: Processors,
    program: Program,
    mut with: impl FnMut(&str, bool),
) -> Result<()> {
    let interrupt = Interrupt::prepare()?;
    let directory = tempfile::Builder::new().prefix("underpass-vm-").tempdir().context("creating a directory")?;
    let file = |name: &str| directory.path().join(name);
    let (system, plan, initramfs) = (file("system.cpio"), file("plan.cpio"), file("initramfs"));
    ui.step("making the virtual machine's file system", |_| {
        image::make(profile, std::slice::from_ref(&program.path), &[])?.write(&system)?;
        image::plan(profile, Vec::new(), Some(program), false)?.write(&plan)?;
        concatenate(&[&kernel.modules, &system, &plan], &initramfs)
    })?;
    let (sender, events) = channel();
    interrupt.send_to(sender.clone());
    ui.say(&format!("Starting Linux {}", kernel.version));
    let machine = Machine::start(qemu, kernel, processors, &initramfs, directory.path(), (sender, events))?;
    let mut outcome = None;
    let limit = LIMIT[usize::from(profile == Profile::Release)];
    let result = machine.follow(SILENCE, limit, |report| match report {
        Report::Said { line, aside } => with(&line, aside),
        Report::Finished { failure } => outcome = Some(failure),
        _ => {}
    });
    ensure!(!interrupt.happened(), "interrupted");
    result?;
    match outcome.context("the machine ended before its program did")? {
        None => Ok(()),
        Some(failure) => bail!("in the virtual machine: {failure}"),
    }
}

fn concatenate(parts: &[&Path], into: &Path) -> Result<()> {
    let mut out = File::create(into).with_context(|| format!("creating {}", into.display()))?;
    for part in parts {
        let mut part = File::open(part).with_context(|| format!("opening {}", part.display()))?;
        io::copy(&mut part, &mut out).with_context(|| format!("writing {}", into.display()))?;
    }
    Ok(())
}

/// SIGINT, SIGTERM and SIGHUP: the machine is ended, and then this program in the usual way, which removes its files.
struct Interrupt {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    happened: bool,
    /// Where the running machine is told.
    machine: Option<Sender<Event>>,
}

impl Interrupt {
    fn prepare() -> Result<Self> {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let ours = Arc::clone(&shared);
        ctrlc::set_handler(move || {
            let mut shared = ours.lock().expect("nothing panics while holding it");
            shared.happened = true;
            if let Some(machine) = &shared.machine {
                // Between two machines nobody listens; then the flag is looked at.
                let _ = machine.send(Event::Interrupted);
            }
        })
        .context("handling SIGINT, SIGTERM and SIGHUP")?;
        Ok(Self { shared })
    }

    fn send_to(&self, machine: Sender<Event>) {
        self.shared.lock().expect("nothing panics while holding it").machine = Some(machine);
    }

    fn happened(&self) -> bool {
        self.shared.lock().expect("nothing panics while holding it").happened
    }
}
