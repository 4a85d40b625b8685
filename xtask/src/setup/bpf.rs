//! The toolchain for BPF programs in Rust: the source (or a build) of `core`, and `bpf-linker`.
//!
//! Three ways, in this order:
//! 1. `nightly`: rustup's nightly with the component `rust-src`, if it is installed;
//! 2. `source`: the source of exactly the running stable compiler, from the distribution's package `rust-src`;
//! 3. `web`: Debian's `rustc-web`, which comes with a built `core` for BPF.
//!
//! The agent's build script reads the result: `kind` (one of the names above), `bin/bpf-linker`, `rust-src/library`,
//! `web/usr/bin/rustc`.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    apt::{Sandbox, unpack},
    rustc::Rustc,
};
use crate::{
    exec,
    ui::{Step, Ui},
};

/// Version of the linker.
const LINKER: &str = "0.13.0";
/// Major versions of LLVM that it can be built for.
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;
/// Directories and files of the toolchain.
const STAMP: &str = "stamp";
const KIND: &str = "kind";
const SOURCE: &str = "rust-src/library";
const WEB_RUSTC: &str = "web/usr/bin/rustc";

/// A way to a toolchain; the name is what `kind` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Way {
    /// rustup's nightly toolchain with rust-src, which has to be there.
    Nightly,
    /// The source of the running compiler, from the distribution's packages.
    Source,
    /// Debian's rustc-web.
    Web,
}

impl Way {
    const ALL: [Self; 3] = [Self::Nightly, Self::Source, Self::Web];

    const fn name(self) -> &'static str {
        match self {
            Self::Nightly => "nightly",
            Self::Source => "source",
            Self::Web => "web",
        }
    }

    /// Goes it: the identity of the compiler that the result is for, `None` when this way does not exist here.
    fn go(self, ui: &Ui, tools: &Path, rustc: &Rustc) -> Result<Option<String>> {
        match self {
            Self::Nightly => nightly(ui, tools),
            Self::Source => source(ui, tools, rustc),
            Self::Web => web(ui, tools, rustc),
        }
    }
}

/// Whether the toolchain in `tools` is complete and made for this compiler, and in the way asked for.
pub(super) fn ready(tools: &Path, rustc: &Rustc, way: Option<Way>) -> bool {
    let Ok(stamp) = fs::read_to_string(tools.join(STAMP)) else { return false };
    let kind = fs::read_to_string(tools.join(KIND)).unwrap_or_default();
    if way.is_some_and(|way| way.name() != kind.trim()) {
        return false;
    }
    let (id, component) = match kind.trim() {
        "nightly" => (Rustc::nightly().map(|nightly| nightly.id), None),
        "source" => (Some(rustc.id.clone()), Some(SOURCE)),
        "web" => (Some(rustc.id.clone()), Some(WEB_RUSTC)),
        _ => return false,
    };
    let complete = tools.join("bin/bpf-linker").is_file() && component.is_none_or(|path| tools.join(path).exists());
    complete && id.is_some_and(|id| stamp == stamp_of(kind.trim(), &id))
}

/// Installs it, the first way that works, or only `way`.
pub(super) fn install(ui: &Ui, tools: &Path, rustc: &Rustc, way: Option<Way>) -> Result<()> {
    ui.say(&format!("Preparing the toolchain for BPF programs in {} (about 250 MB):", tools.display()));
    ui.say("  core           the standard library's core, which has to be compiled for BPF");
    ui.say(&format!("  bpf-linker     {LINKER} from the registry of crates, against the compiler's own LLVM"));
    fs::create_dir_all(tools.join("bin")).with_context(|| format!("creating {}", tools.display()))?;
    // Without it an interrupted setup is not mistaken for a complete one.
    remove(&tools.join(STAMP))?;

    let mut failures = Vec::new();
    for way in Way::ALL.into_iter().filter(|candidate| way.is_none_or(|only| only == *candidate)) {
        match way.go(ui, tools, rustc) {
            Ok(Some(id)) => {
                fs::write(tools.join(KIND), way.name())?;
                fs::write(tools.join(STAMP), stamp_of(way.name(), &id)).context("writing the toolchain's stamp")?;
                return Ok(());
            }
            Ok(None) => failures.push(format!("  {}: not installed", way.name())),
            Err(error) => failures.push(format!("  {}: {error:#}", way.name())),
        }
    }
    bail!(
        "no way to a toolchain for BPF programs worked:\n{}\nremedy: rustup toolchain install nightly --component rust-src, then this again",
        failures.join("\n")
    )
}

fn stamp_of(kind: &str, rustc: &str) -> String {
    format!("{kind}\n{rustc}\nbpf-linker {LINKER}\n")
}

fn nightly(ui: &Ui, tools: &Path) -> Result<Option<String>> {
    let Some(nightly) = Rustc::nightly() else { return Ok(None) };
    linker(ui, tools, &nightly, &nightly.llvm, &nightly.llvm_library()?)?;
    Ok(Some(nightly.id))
}

fn source(ui: &Ui, tools: &Path, rustc: &Rustc) -> Result<Option<String>> {
    let version = fs::read_to_string(tools.join("rust-src/version")).unwrap_or_default();
    if version.trim() != rustc.release || !tools.join(SOURCE).join("core/src/lib.rs").is_file() {
        ui.step(&format!("source of core {}", rustc.release), |step| fetch_source(step, tools, rustc))?;
    }
    linker(ui, tools, rustc, &rustc.llvm, &rustc.llvm_library()?)?;
    Ok(Some(rustc.id.clone()))
}

/// Debian's and Ubuntu's packages have the source of one release each; newer suites are looked at too.
fn fetch_source(step: &Step, tools: &Path, rustc: &Rustc) -> Result<()> {
    let work = Scratch::new(tools)?;
    let sandbox = Sandbox::with_newer_suites(&work.path)?;
    sandbox.update(step)?;
    let minor = rustc.release.rsplit_once('.').map_or("", |(minor, _)| minor);
    let names = ["rust-src".to_owned(), "rust-web-src".to_owned(), format!("rust-{minor}-src")];
    for name in &names {
        let versions = sandbox.versions(name)?;
        let Some(version) = versions.into_iter().find(|version| upstream(version) == rustc.release) else { continue };
        step.now(format!("{name} {version}"));
        let package = sandbox.download(name, &version, step)?;
        let unpacked = work.path.join("unpacked");
        unpack(&package, &unpacked, step)?;
        let source = one_below(&unpacked.join("usr/src"), "rustc-")?;
        ensure!(source.join("library/core/src/lib.rs").is_file(), "{name} {version} has no source of core");
        remove(&tools.join("rust-src"))?;
        fs::create_dir(tools.join("rust-src"))?;
        fs::rename(source.join("library"), tools.join(SOURCE))?;
        return fs::write(tools.join("rust-src/version"), &rustc.release)
            .context("writing the version of core's source");
    }
    bail!("no package of this distribution has the source of rustc {} (looked for {})", rustc.release, names.join(", "))
}

fn web(ui: &Ui, tools: &Path, rustc: &Rustc) -> Result<Option<String>> {
    let web = tools.join("web");
    ui.step("rustc-web", |step| {
        let work = Scratch::new(tools)?;
        let sandbox = Sandbox::with_debian_security(&work.path)?;
        sandbox.update(step)?;
        let unpacked = work.path.join("unpacked");
        for package in sandbox.download_with_dependencies(&["rustc-web", "libstd-rust-web-dev-bpf"], step)? {
            unpack(&package, &unpacked, step)?;
        }
        remove(&web)?;
        fs::rename(&unpacked, &web).with_context(|| format!("moving rustc-web to {}", web.display()))
    })?;
    ensure!(tools.join(WEB_RUSTC).is_file(), "the packages have no {WEB_RUSTC}");
    let library = one_below(&one_below(&web.join("usr/lib"), std::env::consts::ARCH)?, "libLLVM.so.")?;
    let name = library.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let llvm = name.trim_start_matches("libLLVM.so.").split('.').next().unwrap_or_default().to_owned();
    linker(ui, tools, rustc, &llvm, &library)?;
    Ok(Some(rustc.id.clone()))
}

/// Builds the linker against `library`, so that it reads exactly the bitcode that this LLVM writes.
fn linker(ui: &Ui, tools: &Path, rustc: &Rustc, llvm: &str, library: &Path) -> Result<()> {
    let supported = llvm.parse().is_ok_and(|version| LINKER_LLVM.contains(&version));
    ensure!(supported, "bpf-linker {LINKER} works with LLVM {LINKER_LLVM:?}, not {llvm} ({})", library.display());
    let name = library.file_name().context("a library has a name")?;
    let llvm_lib = tools.join("llvm/lib");
    let linked = fs::read_link(llvm_lib.join("libLLVM.so")).is_ok_and(|link| link == library);
    if linked && linker_version(tools).is_some_and(|version| version.contains(LINKER)) {
        return Ok(());
    }
    ui.step(&format!("bpf-linker {LINKER}"), |step| {
        remove(&tools.join("llvm"))?;
        fs::create_dir_all(&llvm_lib)?;
        symlink(library, llvm_lib.join("libLLVM.so"))?;
        if name != "libLLVM.so" {
            symlink(library, llvm_lib.join(name))?;
        }
        let mut cargo = rustc.cargo();
        cargo.args(["install", "bpf-linker", "--version", LINKER, "--locked", "--force", "--no-default-features"]);
        cargo.args(["--features", &format!("llvm-{llvm}"), "--root"]).arg(tools);
        cargo.env("LLVM_PREFIX", tools.join("llvm")).env("CARGO_TARGET_DIR", tools.join("build"));
        cargo.env("CARGO_PROFILE_RELEASE_DEBUG", "0").env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
        cargo.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
        exec::quietly(&mut cargo, step)?;
        remove(&tools.join("build"))?;
        linker_version(tools).context("the linker was built but does not run").map(drop)
    })
}

fn linker_version(tools: &Path) -> Option<String> {
    exec::output(Command::new(tools.join("bin/bpf-linker")).arg("--version")).ok()
}

/// The upstream part of a Debian version: `1:1.95.0+dfsg1-1` is `1.95.0`.
fn upstream(version: &str) -> &str {
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    version.split(['+', '-', '~']).next().unwrap_or_default()
}

/// The entry of `directory` whose name begins with `prefix`.
fn one_below(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(directory).with_context(|| format!("listing {}", directory.display()))?;
    let found = entries.flatten().find(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
    Ok(found.with_context(|| format!("no {prefix}* in {}", directory.display()))?.path())
}

/// Removes a file or directory that may not exist.
fn remove(path: &Path) -> Result<()> {
    let result = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match result {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// A directory that is gone after use; beside the result, so that files can be moved there.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn new(tools: &Path) -> Result<Self> {
        let path = tools.join("scratch");
        remove(&path)?;
        fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            eprintln!("{error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::upstream;

    #[test]
    fn upstream_versions() {
        assert_eq!(upstream("1.95.0+dfsg1-1~deb12u2"), "1.95.0");
        assert_eq!(upstream("2:1.95.0-3"), "1.95.0");
        assert_eq!(upstream("1.95.0~beta.1+dfsg"), "1.95.0");
    }
}
