//! The file system of the machines, without the kernel's modules.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use testbed::pace;
use vm_guest::{PLAN, PROGRAMS, Plan, Program, Test};

use super::{archive::Archive, contents};
use crate::{exec, places};

/// The first process, as a program and as a package.
pub(super) const GUEST: &str = "vm-guest";
/// How many times slower than here programs may be in a machine. Tests' limits of time are multiplied by it, sizes divided. Measured:
/// five times for programs that compute, ten times for those that call the kernel.
const SLOWNESS: &str = "8";
/// Tests that run at a time. The machine has two processors, and many tests wait for a clock.
const JOBS: usize = 3;

/// How the programs under test were built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Profile {
    /// For tests.
    Debug,
    /// As they are shipped, for benchmarks.
    Release,
}

impl Profile {
    /// cargo's directory.
    fn name(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Release => "release",
        }
    }

    /// What cargo is told.
    pub(super) fn argument(self) -> Option<&'static str> {
        (self == Self::Release).then_some("--release")
    }
}

/// Everything that `tests` need, which are parts of `programs`.
pub(super) fn make(profile: Profile, programs: &[PathBuf], tests: &[Test]) -> Result<Archive> {
    let mut archive = Archive::new();
    let programs = [&own_programs(profile)[..], programs].concat();
    contents::fill(&mut archive, &programs, profile == Profile::Release)?;
    // At the same places as here: tests know some of them from their build.
    for (path, stripped) in strip(&programs, &places::target().join("vm").join(profile.name()))? {
        archive.copy(&path, &stripped);
        if path.file_name().is_some_and(|name| name == GUEST) {
            archive.copy("/init", &stripped);
        }
    }
    for test in tests {
        archive.directory(&test.directory, 0o755);
    }
    Ok(archive)
}

/// What one machine has of its own: its plan.
pub(super) fn plan(profile: Profile, tests: Vec<Test>, program: Option<Program>, full: bool) -> Result<Archive> {
    let mut archive = Archive::new();
    let plan = Plan { jobs: JOBS, environment: environment(profile, full), tests, program };
    archive.text(PLAN, serde_json::to_vec(&plan).context("writing the plan as JSON")?);
    Ok(archive)
}

/// The agent, as it is in the machines.
pub(super) fn agent(profile: Profile) -> PathBuf {
    let [agent, ..] = own_programs(profile);
    agent
}

/// The program under test, the testbed's, and the first process.
fn own_programs(profile: Profile) -> [PathBuf; 4] {
    ["underpass", "testbed-app", GUEST, "testbed-load"].map(|name| places::target().join(profile.name()).join(name))
}

fn environment(profile: Profile, full: bool) -> BTreeMap<String, String> {
    let [underpass, app, ..] = own_programs(profile).map(|path| path.display().to_string());
    let mut all: BTreeMap<String, String> = [
        ("PATH", PROGRAMS),
        ("HOME", "/root"),
        ("UNDERPASS_BIN", underpass.as_str()),
        ("TESTBED_APP", app.as_str()),
        (pace::SLOWNESS, SLOWNESS),
        // Tests of the relay leave records to the kernel.
        ("UNDERPASS_TEST_KTLS", "1"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    if full {
        all.insert("UNDERPASS_FULL".into(), "1".into());
    }
    all
}

/// Copies of programs without what only debuggers read, for they have to fit into memory. They are kept until the program changes.
fn strip(programs: &[PathBuf], into: &Path) -> Result<Vec<(PathBuf, PathBuf)>> {
    fs::create_dir_all(into).with_context(|| format!("creating {}", into.display()))?;
    let mut kept = BTreeSet::new();
    let mut all = Vec::new();
    for program in programs {
        let stripped = into.join(program.file_name().context("a program has a name")?);
        let time = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified());
        let new = time(&stripped).is_ok_and(|made| time(program).is_ok_and(|built| made >= built));
        if !new {
            let partial = tempfile::NamedTempFile::new_in(into).context("creating a file")?;
            exec::output(Command::new("strip").arg("--strip-all").arg("-o").arg(partial.path()).arg(program))?;
            fs::set_permissions(partial.path(), fs::Permissions::from_mode(0o755))?;
            partial.persist(&stripped).with_context(|| format!("writing {}", stripped.display()))?;
        }
        kept.insert(stripped.clone());
        all.push((program.clone(), stripped));
    }
    for old in fs::read_dir(into).with_context(|| format!("listing {}", into.display()))?.flatten() {
        if !kept.contains(&old.path()) && !old.file_name().to_string_lossy().starts_with('.') {
            // Another copy of this program may have been faster.
            let _ = fs::remove_file(old.path());
        }
    }
    Ok(all)
}
