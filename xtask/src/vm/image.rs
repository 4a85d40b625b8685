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

/// Everything that `tests` need, which are parts of `programs`.
pub(super) fn make(programs: &[PathBuf], tests: &[Test]) -> Result<Archive> {
    let mut archive = Archive::new();
    let programs = [&own_programs()[..], programs].concat();
    contents::fill(&mut archive, &programs)?;
    // At the same places as here: tests know some of them from their build.
    for (path, stripped) in strip(&programs, &places::target().join("vm"))? {
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
pub(super) fn plan(tests: Vec<Test>, program: Option<Program>, full: bool) -> Result<Archive> {
    let mut archive = Archive::new();
    let plan = Plan { jobs: JOBS, environment: environment(full), tests, program };
    archive.text(PLAN, serde_json::to_vec(&plan).context("writing the plan as JSON")?);
    Ok(archive)
}

/// The agent, as it is in the machines.
pub(super) fn agent() -> PathBuf {
    let [agent, ..] = own_programs();
    agent
}

/// The program under test, the testbed's, and the first process.
fn own_programs() -> [PathBuf; 3] {
    ["underpass", "testbed-app", GUEST].map(|name| places::target().join("debug").join(name))
}

fn environment(full: bool) -> BTreeMap<String, String> {
    let [underpass, app, _] = own_programs().map(|path| path.display().to_string());
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
