//! The Rust compiler that builds BPF programs.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result};

use crate::exec;

/// A compiler.
pub(super) struct Rustc {
    /// rustup's name for it, when it is not the default one.
    toolchain: Option<&'static str>,
    /// `1.95.0`.
    pub(super) release: String,
    /// Major version of its LLVM.
    pub(super) llvm: String,
    /// What tells this build of it from every other one.
    pub(super) id: String,
    sysroot: PathBuf,
}

impl Rustc {
    /// The one that this program was built with.
    pub(super) fn running() -> Result<Self> {
        Self::ask(None)
    }

    /// The nightly one, when there is one with the source of the standard library.
    pub(super) fn nightly() -> Option<Self> {
        let rustc = Self::ask(Some("nightly")).ok()?;
        rustc.sysroot.join("lib/rustlib/src/rust/library/core").is_dir().then_some(rustc)
    }

    /// cargo of the same toolchain.
    pub(super) fn cargo(&self) -> Command {
        program("cargo", self.toolchain)
    }

    /// The library with its LLVM.
    pub(super) fn llvm_library(&self) -> Result<PathBuf> {
        let directory = self.sysroot.join("lib");
        let prefix = format!("libLLVM.so.{}", self.llvm);
        let mut files =
            std::fs::read_dir(&directory).with_context(|| format!("listing {}", directory.display()))?.flatten();
        let found = files.find(|file| file.file_name().to_string_lossy().starts_with(&prefix)).map(|file| file.path());
        found.with_context(|| {
            format!(
                "no {prefix}* in {}: bpf-linker needs a Rust toolchain with its own LLVM, as rustup installs it",
                directory.display()
            )
        })
    }

    fn ask(toolchain: Option<&'static str>) -> Result<Self> {
        let text = exec::output(program("rustc", toolchain).arg("-vV"))?;
        let field = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            value.with_context(|| format!("`rustc -vV` has no line `{name}`: {text}"))
        };
        let llvm = field("LLVM version:")?;
        Ok(Self {
            toolchain,
            release: field("release:")?.to_owned(),
            llvm: llvm.split('.').next().unwrap_or_default().to_owned(),
            id: text.lines().next().unwrap_or_default().to_owned(),
            sysroot: exec::output(program("rustc", toolchain).args(["--print", "sysroot"]))?.trim().into(),
        })
    }
}

/// A program of a toolchain, through rustup when it is not the default one.
fn program(name: &str, toolchain: Option<&str>) -> Command {
    let mut command = Command::new(name);
    if let Some(toolchain) = toolchain {
        command.arg(format!("+{toolchain}")).env_remove("RUSTUP_TOOLCHAIN").env_remove("RUSTC").env_remove("CARGO");
    }
    command
}
