//! What is done in each scenario.

use std::{
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::{
    resource::{Resource, getrlimit},
    signal::Signal,
};
use testbed::{
    Impairment, Process,
    pace::scaled,
    torture::{Plan, Report, Scenario, mix},
};

use super::{
    memory::Pressure,
    report,
    scene::{PORT, Scene, Setup, millis},
};
use crate::ui::Ui;

/// Every kind of trouble, none of it so much that nothing gets through.
const BAD_WIRE: Impairment = Impairment { loss: 1.0, duplicate: 0.5, reorder: 5.0, delay: 3, jitter: 2 };
/// The kernel's least, in every socket of both pods: the applications' and the agents'.
const TINY: &[(&str, &str)] = &[("net.ipv4.tcp_rmem", "4096 4096 4096"), ("net.ipv4.tcp_wmem", "4096 4096 4096")];
/// The least that an agent takes.
const RECORDS_PER_KEY: &str = "16";
/// Idle connections, and busy ones beside them. With `--short`, a fifth.
const CROWD: [u64; 2] = [10_000, 1_000];
/// Descriptors that an agent needs for something else than connections.
const OTHER_DESCRIPTORS: u64 = 1000;
/// How long nothing may happen on a connection whose agents have too little memory.
const STARVED: Duration = Duration::from_secs(150);
/// Connections of an application that is killed.
const DYING: u64 = 4;
/// Most bytes that it moves until then.
const LAST_BYTES: u64 = 8 << 20;

/// What all scenarios of a run have in common.
pub(super) struct Run {
    pub(super) seed: u64,
    /// For how long each scenario makes connections.
    pub(super) time: Duration,
    pub(super) short: bool,
    /// Only this connection.
    pub(super) connection: Option<u64>,
    /// The agent; without one, plain TCP is tried.
    pub(super) agent: Option<PathBuf>,
    /// The machine belongs to this run, and its kernel has TLS.
    pub(super) machine: bool,
}

/// The reports of both ends, and what people should know.
type Seen = ([Report; 2], Vec<String>);

impl Run {
    /// Runs one scenario; `Ok(false)` when this machine cannot.
    pub(super) fn scenario(&self, ui: &Ui, scenario: Scenario) -> Result<bool> {
        if scenario == Scenario::Memory && self.agent.is_some() && !Pressure::possible(self.machine) {
            ui.say(
                "memory     left out: this kernel can limit TCP's memory for the whole machine only (run it with --vm)",
            );
            return Ok(false);
        }
        let start = Instant::now();
        ui.step(&format!("torture: {}", report::name(scenario)), |_| {
            let (mut scene, mut remarks) = self.scene(scenario)?;
            let (reports, more) = match scenario {
                Scenario::Kill => self.kill(&scene),
                Scenario::Idle => self.crowd(&scene),
                _ => self.usual(&scene, scenario),
            }?;
            remarks.extend(more);
            remarks.extend(scene.remarks());
            println!("{}", report::line(scenario, &reports, &remarks, start.elapsed()));
            let failures = report::failures(self, scenario, &reports);
            ensure!(failures.is_empty(), "{failures}\n{}", scene.logs());
            ensure!(reports.iter().all(|report| report.connections > 0), "there were no connections: {reports:?}");
            scene.settle().with_context(|| scene.logs())?;
            self.check_data_path(&mut scene, scenario)?;
            Ok(true)
        })
    }

    fn scene(&self, scenario: Scenario) -> Result<(Scene, Vec<String>)> {
        // The busy ones among the idle have small buffers.
        let small_packets = scenario.has_small_buffers() || scenario == Scenario::Idle;
        let mut setup = Setup { small_packets, ..Setup::default() };
        match scenario {
            Scenario::Tiny => setup.sysctls = TINY,
            Scenario::Wire => setup.impairment = Some(BAD_WIRE),
            Scenario::Memory => setup.memory = self.agent.is_some(),
            Scenario::Rekey => setup.arguments = vec!["--records-per-key".into(), RECORDS_PER_KEY.into()],
            _ => {}
        }
        let start = |setup: &Setup| Scene::start(self.agent.as_deref(), setup, self.seed, self.machine);
        let scene = start(&setup)?;
        if scenario == Scenario::Rekey && scene.kernel_tls()? == Some(false) {
            drop(scene);
            setup.arguments.extend(["--ktls".into(), "off".into()]);
            return Ok((start(&setup)?, vec!["with --ktls off: this kernel cannot replace keys".into()]));
        }
        Ok((scene, Vec::new()))
    }

    /// Where the kernel has TLS it was used, or else this says nothing about it.
    fn check_data_path(&self, scene: &mut Scene, scenario: Scenario) -> Result<()> {
        if self.machine && scene.kernel_tls()?.is_some() {
            let (kernel, user) = scene.tunnels()?;
            ensure!(
                kernel > user,
                "{}: the kernel protected {kernel} tunnels, the agents {user}",
                report::name(scenario)
            );
        }
        Ok(())
    }

    /// Connections one after the other, some at a time, until the time is up.
    fn usual(&self, scene: &Scene, scenario: Scenario) -> Result<Seen> {
        let mut words = self.words(scenario);
        let mut time = self.time;
        let concurrency = match scenario {
            // Small buffers are slow, not busy.
            Scenario::Stalled | Scenario::Endings => 100,
            Scenario::LongStall => 16,
            Scenario::Tiny | Scenario::Wire => 64,
            _ => 32,
        };
        words.extend(["--concurrency".into(), scaled(concurrency).max(8).to_string()]);
        let mut remarks = Vec::new();
        match (self.connection, scenario) {
            (Some(number), _) => words.extend(["--first".into(), number.to_string(), "--count".into(), "1".into()]),
            (None, Scenario::Endings) => {
                words.extend(["--count".into(), Plan::endings().to_string()]);
                time += Duration::from_mins(1);
                remarks.push(format!("all {} orders", Plan::endings()));
            }
            // Each takes more than half a minute, so there is one round.
            (None, Scenario::LongStall) => words.extend(["--count".into(), concurrency.to_string()]),
            (None, _) => words.extend(["--millis".into(), millis(self.time)]),
        }
        // A segment for which there is no memory is lost, and repeated after twice as long each time.
        let mut limit = Vec::new();
        if scenario == Scenario::Memory {
            limit = vec!["--limit".to_owned(), STARVED.as_secs().to_string()];
            words.extend(limit.clone());
        }
        let server = scene.serve(PORT, &limit)?;
        let client = scene.report(scene.drive(PORT, &words)?, time)?;
        Ok(([client, scene.report(server, time)?], remarks))
    }

    /// Busy connections among many that idle, and then go on.
    fn crowd(&self, scene: &Scene) -> Result<Seen> {
        let wanted = CROWD.map(|count| scaled(if self.short { count / 5 } else { count }));
        let (_, limit) = getrlimit(Resource::RLIMIT_NOFILE).context("reading the limit of open files")?;
        // Two sockets for each, in each agent.
        let most = limit.saturating_sub(OTHER_DESCRIPTORS) / 2;
        let [idle, busy] = wanted.map(|count| count.min(most * count / (wanted[0] + wanted[1])));
        let mut words = self.words(Scenario::Mixed);
        words.extend(["--idle".into(), idle.to_string(), "--count".into(), busy.to_string()]);
        words.extend(["--concurrency".into(), busy.to_string()]);
        let time = Duration::from_secs(400);
        let server = scene.serve(PORT, &[])?;
        let client = scene.report(scene.drive(PORT, &words)?, time)?;
        let mut remarks = vec![format!("{idle} idle beside {busy} busy")];
        if [idle, busy] != CROWD {
            let why = if [idle, busy] == wanted {
                "as this run wants it".to_owned()
            } else {
                format!("the descriptor limit is {limit}")
            };
            remarks.push(format!("not {} beside {}: {why}", CROWD[0], CROWD[1]));
        }
        Ok(([client, scene.report(server, time)?], remarks))
    }

    /// Applications that die in the middle, the client's and the server's by turns; the other one judges.
    fn kill(&self, scene: &Scene) -> Result<Seen> {
        let shared = ["--progress".to_owned(), scene.file("sent")];
        let server = scene.serve(PORT, &shared)?;
        let mut survivors = Report::default();
        let (start, mut rounds) = (Instant::now(), 0);
        let time = Duration::from_millis(millis(self.time).parse().unwrap_or(u64::MAX));
        while start.elapsed() < time || rounds < 2 {
            let first = rounds * DYING;
            // As many of each order of magnitude.
            let drawn = mix(&[self.seed, rounds]);
            let bytes = (1 + drawn % LAST_BYTES) >> ((drawn >> 32) % 24);
            let dying: Vec<String> =
                shared.iter().cloned().chain(["--die-after".into(), bytes.max(1).to_string()]).collect();
            let mut words = self.words(Scenario::Kill);
            words.extend(["--first".into(), first.to_string(), "--count".into(), DYING.to_string()]);
            if rounds % 2 == 0 {
                words.extend(dying);
                killed(scene, &scene.drive(PORT, &words)?)?;
            } else {
                let victim = scene.serve(PORT + 1, &dying)?;
                words.extend(shared.clone());
                survivors.merge(scene.report(scene.drive(PORT + 1, &words)?, Duration::ZERO)?);
                killed(scene, &victim)?;
            }
            rounds += 1;
        }
        let remarks = vec![format!("{rounds} applications killed")];
        Ok(([survivors, scene.report(server, Duration::ZERO)?], remarks))
    }

    fn words(&self, scenario: Scenario) -> Vec<String> {
        ["--scenario".into(), report::name(scenario), "--seed".into(), self.seed.to_string()].into()
    }
}

/// Waits until an application has killed itself.
fn killed(scene: &Scene, process: &Process) -> Result<()> {
    let status = process.wait(Duration::from_mins(1)).with_context(|| scene.logs())?;
    if status.signal() != Some(Signal::SIGKILL as i32) {
        bail!("an application that was to be killed ended with {status}:\n{}", process.text(testbed::Stream::Stdout));
    }
    Ok(())
}
