//! `cargo xtask check`: what can be said without running the tests.

use std::{process::Command, time::Duration};

use anyhow::Result;
use testbed::Process;

use crate::{exec, places, setup, ui::Ui};

/// How long the advisory database may take to come.
const DATABASE: Duration = Duration::from_secs(90);

pub(crate) fn run(ui: &Ui) -> Result<()> {
    setup::ensure(ui)?;
    // Formatting of every member, whether built by default or not.
    ui.step("cargo fmt --check", |_| exec::openly(&mut exec::cargo(&["fmt", "--all", "--check"])))?;
    // The BPF programs compile for another target only: the agent's build script builds them, with warnings shown.
    // Fuzz targets, too, which are not built by default: in one go, so that what both need is compiled once.
    ui.step("cargo clippy", |step| {
        let all = ["clippy", "--workspace", "--exclude", "underpass-ebpf", "--all-targets", "--locked"];
        exec::quietly(exec::cargo(&all).args(["--", "-D", "warnings"]), step)
    })?;
    ui.step("cargo doc", |step| {
        let mut doc = exec::cargo(&["doc", "--no-deps", "--document-private-items", "--locked"]);
        exec::quietly(doc.env("RUSTDOCFLAGS", "-D rustdoc::broken_intra_doc_links"), step)
    })?;
    deny(ui)
}

/// Licences, sources and duplicates need nothing but the lock file; advisories need a database from the network.
fn deny(ui: &Ui) -> Result<()> {
    let deny = setup::cargo_deny(ui)?;
    let command = |arguments: &[&str]| {
        let mut command = Command::new(&deny);
        command.args(arguments).current_dir(places::repository());
        command
    };
    ui.step("cargo deny: bans, licences, sources", |step| {
        // It reads the manifests of every platform's crates, more than a build has downloaded.
        exec::quietly(&mut exec::cargo(&["fetch", "--locked"]), step)?;
        exec::quietly(&mut command(&["--offline", "check", "bans", "licenses", "sources"]), step)
    })?;
    let fetched = ui.step("cargo deny: advisories", |step| {
        step.now("fetching the advisory database");
        let fetch = Process::spawn(&mut command(&["fetch", "db"]))?.output(DATABASE);
        if let Ok(output) = fetch
            && output.status.success()
        {
            exec::quietly(&mut command(&["check", "--disable-fetch", "advisories"]), step)?;
            return Ok(true);
        }
        Ok(false)
    })?;
    if !fetched {
        ui.say("    advisories NOT checked: the advisory database cannot be fetched from here");
    }
    Ok(())
}
