//! Which tests run in the machine: those that talk to the kernel.

use std::{collections::BTreeSet, path::PathBuf, process::Command};

use anyhow::{Result, bail};
use serde::Deserialize;
use vm_guest::Test;

use super::kernels::Series;
use crate::{exec, places, ui::Step};

/// cargo's name of a package, and its directory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Package(&'static str, &'static str);

const AGENT: Package = Package("underpass", "agent");
const BPF: Package = Package("bpf-tests", "bpf-tests");
const TESTBED: Package = Package("testbed", "xtask/testbed");

/// A test program.
struct Suite {
    /// What people call it.
    name: &'static str,
    package: Package,
    /// cargo's name of the target, and its kind.
    target: &'static str,
    kind: &'static str,
    /// As in `.config/nextest.toml`, tests on real networks have a second try; here the agent's unit tests too, which race with programs
    /// that are as slow as themselves.
    retries: u32,
    /// What is run without `--full`.
    usual: Usual,
}

/// Some tests of a program.
enum Usual {
    All,
    /// Those whose name begins with one of the first and with none of the second.
    Parts(&'static [&'static str], &'static [&'static str]),
    /// None: they say little about kernels.
    Nothing,
}

impl Usual {
    fn has(&self, name: &str) -> bool {
        let begins = |parts: &[&str]| parts.iter().any(|part| name.starts_with(part));
        match self {
            Self::All => true,
            Self::Parts(wanted, unwanted) => begins(wanted) && !begins(unwanted),
            Self::Nothing => false,
        }
    }
}

/// Modules of the agent that call the kernel for what kernels differ in, without minutes of load.
const KERNEL: Usual = Usual::Parts(
    &["admin::", "capture::", "cli::", "proxy::", "relay::", "sys::", "tunnel::tests::ktls::"],
    &["relay::tests::load::", "relay::tests::measure::", "relay::tests::bulk::a_slow_reader_bounds_memory"],
);

/// Tests of the agent that ask for tcx by name, which Linux has since 6.6. Elsewhere clsact takes its place, and has tests of its own.
const TCX: &[&str] = &[
    "capture::tests::cleanup::everything_goes_tcx",
    "capture::tests::enrol::an_interface_that_comes_later_is_guarded",
    "capture::tests::kept::an_earlier_agents_pod_that_nobody_knows_is_kept",
    "capture::tests::node_guard::a_moved_interface_stays_guarded_by_another_version",
    "capture::tests::node_guard::an_index_that_is_used_again_is_another_interface",
    "capture::tests::node_guard::links_stay_on_an_interface_that_leaves_the_namespace",
    "capture::tests::restart::a_pods_links_are_adopted",
    "capture::tests::restart::nothing_gets_out_while_agents_restart",
    "capture::tests::restart::pins_of_interfaces_that_went_away_unseen_are_removed",
    "capture::tests::restart::tcx_and_clsact_replace_each_other",
];

/// End-to-end tests but those of what operators see and of what the agent alone decides.
const END_TO_END: Usual =
    Usual::Parts(&[""], &["certificates::", "connections::", "limits::", "operators::", "telemetry::"]);

/// What differs little between kernels and takes long: when everything runs, one kernel is enough for it.
const ON_ONE_KERNEL: &[(&str, &[&str])] = &[
    ("cli", &[""]),
    ("e2e", &["absence::", "policy::", "probes::", "refusals::", "revocation::", "upgrade::no_new_connection_is_lost"]),
    ("underpass", &["admin::", "cli::"]),
];

const SUITES: &[Suite] = &[
    Suite { name: "bpf-load", package: BPF, target: "load", kind: "test", retries: 1, usual: Usual::All },
    Suite { name: "bpf-capture", package: BPF, target: "capture", kind: "test", retries: 1, usual: Usual::All },
    Suite { name: "bpf-guard", package: BPF, target: "guard", kind: "test", retries: 1, usual: Usual::All },
    Suite { name: "bpf-node-guard", package: BPF, target: "node_guard", kind: "test", retries: 1, usual: Usual::All },
    Suite { name: "bpf-inbound", package: BPF, target: "inbound", kind: "test", retries: 1, usual: Usual::All },
    Suite { name: "bpf-interfaces", package: BPF, target: "interfaces", kind: "test", retries: 1, usual: Usual::All },
    Suite { name: "bpf-probes", package: BPF, target: "probes", kind: "test", retries: 1, usual: Usual::All },
    Suite { name: "bpf-resets", package: BPF, target: "resets", kind: "test", retries: 1, usual: Usual::All },
    Suite { name: "cli", package: AGENT, target: "cli", kind: "test", retries: 1, usual: Usual::All },
    Suite { name: "e2e", package: AGENT, target: "e2e", kind: "test", retries: 1, usual: END_TO_END },
    Suite { name: "underpass", package: AGENT, target: "underpass", kind: "lib", retries: 1, usual: KERNEL },
    Suite { name: "testbed", package: TESTBED, target: "testbed", kind: "test", retries: 1, usual: Usual::Nothing },
    Suite { name: "testbed-app", package: TESTBED, target: "app", kind: "test", retries: 1, usual: Usual::Nothing },
    Suite { name: "testbed-agent", package: TESTBED, target: "agent", kind: "test", retries: 1, usual: Usual::Nothing },
];
/// Part of the names of tests that are ignored elsewhere because they need kernel TLS.
pub(crate) const NEED_KTLS: &str = "::ktls::";
/// Parts of the names of tests that run in the machines only: they need interfaces that other
/// kernels may not have.
pub(crate) const NEED_INTERFACES: [&str; 2] = [NETKIT, "vlan_devices::"];
/// Of these, the ones that need Linux 6.7.
const NETKIT: &str = "::netkit::";
/// Seconds that one try of a test may take; five times 60 on the host.
const LIMIT: u64 = 300;

/// A line of cargo's JSON about something built.
#[derive(Deserialize)]
struct Built {
    reason: String,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// A test program that has been built.
pub(super) struct Program {
    suite: &'static Suite,
    pub(super) path: PathBuf,
    /// Directory of its package.
    directory: PathBuf,
}

/// Builds the test programs.
pub(super) fn build(cargo: &mut Command, step: &Step) -> Result<Vec<Program>> {
    let mut all = Vec::new();
    // The same selection as `cargo xtask test` makes: another one has other features, and builds everything again.
    cargo.args(["--no-run", "--message-format=json-render-diagnostics"]);
    exec::each_line(cargo, |line| {
        let Ok(built) = serde_json::from_str::<Built>(line) else {
            step.now(line.trim());
            return;
        };
        all.extend(program(built));
    })?;
    for suite in SUITES {
        if !all.iter().any(|program| program.suite.name == suite.name) {
            bail!("cargo has built no test program {} of package {}", suite.target, suite.package.0);
        }
    }
    Ok(all)
}

fn program(built: Built) -> Option<Program> {
    let (manifest, target, path) = (built.manifest_path?, built.target?, built.executable?);
    let directory = manifest.parent()?.to_path_buf();
    let suite = SUITES.iter().find(|suite| {
        directory == places::repository().join(suite.package.1)
            && suite.target == target.name
            && target.kind.iter().any(|kind| kind == suite.kind)
    })?;
    (built.reason == "compiler-artifact").then_some(Program { suite, path, directory })
}

/// The tests to run, in the order of the list above. A filter is part of the name as it is printed, `e2e traffic::redis_pipelines`,
/// and leaves only ignored tests out; `full` leaves nothing out.
pub(super) fn tests(programs: &[Program], filter: Option<&str>, full: bool) -> Result<Vec<Test>> {
    let mut all = Vec::new();
    for suite in SUITES {
        let Some(program) = programs.iter().find(|program| program.suite.name == suite.name) else { continue };
        let names = |more: &[&str]| -> Result<BTreeSet<String>> {
            let text = exec::output(Command::new(&program.path).args(["--list", "--format", "terse"]).args(more))?;
            Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
        };
        let ignored = if full { BTreeSet::new() } else { names(&["--ignored"])? };
        let needs = |name: &String| name.contains(NEED_KTLS) || NEED_INTERFACES.iter().any(|part| name.contains(part));
        let ignored = ignored.into_iter().filter(|name| !needs(name)).collect();
        for name in names(&[])?.difference(&ignored) {
            let wanted = match filter {
                Some(filter) => format!("{} {name}", suite.name).contains(filter),
                None => full || suite.usual.has(name),
            };
            if wanted {
                all.push(Test {
                    suite: suite.name.to_owned(),
                    name: name.clone(),
                    program: program.path.clone(),
                    directory: program.directory.clone(),
                    retries: suite.retries,
                    limit: LIMIT,
                });
            }
        }
    }
    Ok(all)
}

/// Those of `tests` that a kernel can pass; without `all`, on all kernels but one only what differs between kernels.
pub(super) fn for_kernel(tests: &[Test], series: Series, all: bool) -> Vec<Test> {
    // The series with tcx have netkit too.
    let fits = |test: &&Test| series.has_tcx() || !(TCX.contains(&test.name.as_str()) || test.name.contains(NETKIT));
    let differs = |test: &Test| {
        let same = |(suite, parts): &(&str, &[&str])| {
            *suite == test.suite && parts.iter().any(|part| test.name.starts_with(part))
        };
        !ON_ONE_KERNEL.iter().any(same)
    };
    tests.iter().filter(fits).filter(|test| all || series == Series::V6_12 || differs(test)).cloned().collect()
}
