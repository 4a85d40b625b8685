//! `cargo xtask setup`: system packages and the BPF toolchain.

pub(crate) mod apt;
mod bpf;
mod packages;
mod rustc;

use std::{
    fs::{self, File, TryLockError},
    path::Path,
};

use anyhow::{Context, Result};

use crate::{exec, places, ui::Ui};

#[derive(clap::Args, Default)]
pub(crate) struct Options {
    /// Make the BPF toolchain in this way, also when there is one that was made in another.
    #[arg(long, value_enum)]
    way: Option<bpf::Way>,
}

/// Installs what is missing and says that all is there.
pub(crate) fn run(ui: &Ui, options: &Options) -> Result<()> {
    install(ui, options.way)?;
    ui.say(&format!(
        "Everything is in place; the toolchain for BPF programs is in {}.",
        places::bpf_tools()?.display()
    ));
    Ok(())
}

/// Installs what is missing. Quick and silent when nothing is.
pub(crate) fn ensure(ui: &Ui) -> Result<()> {
    install(ui, None)
}

fn install(ui: &Ui, way: Option<bpf::Way>) -> Result<()> {
    let packages = packages::missing(packages::NEEDS);
    let rustc = rustc::Rustc::running()?;
    let tools = places::bpf_tools()?;
    if packages.is_empty() && bpf::ready(&tools, &rustc, way) {
        return Ok(());
    }
    let _lock = lock(ui, &places::cache()?)?;
    // Someone else may have been busy with the same.
    let packages = packages::missing(packages::NEEDS);
    if !packages.is_empty() {
        packages::install(ui, &packages)?;
    }
    if !bpf::ready(&tools, &rustc, way) {
        bpf::install(ui, &tools, &rustc, way)?;
    }
    Ok(())
}

/// Installs what benchmarks compare with. Quick and silent when all is there.
pub(crate) fn ensure_for_bench(ui: &Ui) -> Result<()> {
    if packages::missing(packages::BENCH).is_empty() {
        return Ok(());
    }
    let _lock = lock(ui, &places::cache()?)?;
    let packages = packages::missing(packages::BENCH);
    if packages.is_empty() { Ok(()) } else { packages::install(ui, &packages) }
}

/// Makes sure that `cargo deny` can be run; the directory that it is in.
pub(crate) fn cargo_deny(ui: &Ui) -> Result<std::path::PathBuf> {
    const VERSION: &str = "0.20.2";
    if let Some(path) = places::program("cargo-deny") {
        return Ok(path);
    }
    let cache = places::cache()?;
    let path = cache.join("bin/cargo-deny");
    if path.is_file() {
        return Ok(path);
    }
    let _lock = lock(ui, &cache)?;
    if path.is_file() {
        return Ok(path);
    }
    ui.say(&format!(
        "Installing cargo-deny {VERSION} into {}: it checks licences and advisories.",
        cache.join("bin").display()
    ));
    ui.step("cargo-deny", |step| {
        let mut cargo = exec::cargo(&["install", "--locked", "--version", VERSION, "cargo-deny", "--root"]);
        cargo.arg(&cache);
        // It runs for a second: compile it fast rather than make it fast.
        cargo.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0").env("CARGO_PROFILE_RELEASE_LTO", "off");
        cargo.env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "256");
        cargo.env("CARGO_TARGET_DIR", cache.join("build")).env("CARGO_PROFILE_RELEASE_DEBUG", "0");
        exec::quietly(&mut cargo, step)
    })?;
    fs::remove_dir_all(cache.join("build")).context("removing cargo-deny's build files")?;
    Ok(path)
}

/// One setup at a time on this machine.
pub(crate) fn lock(ui: &Ui, cache: &Path) -> Result<File> {
    fs::create_dir_all(cache).with_context(|| format!("creating {}", cache.display()))?;
    let path = cache.join("setup.lock");
    let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            ui.step("another setup to finish", |_| file.lock().with_context(|| format!("locking {}", path.display())))?;
        }
        Err(TryLockError::Error(error)) => return Err(error).with_context(|| format!("locking {}", path.display())),
    }
    Ok(file)
}
