//! Debian's Go compiler, unpacked: old enough for the source, whatever the machine has.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use super::parts::fetch;
use crate::{exec, setup::apt::Sandbox, ui::Step};

/// Packages that make the compiler up: programs, and the standard library.
const PACKAGES: [&str; 2] = ["golang-1.19-go", "golang-1.19-src"];
const RELEASE: &str = "go-1.19";

/// A compiler that builds a source tree with all its dependencies in it, offline.
pub(super) struct Go {
    root: PathBuf,
    path: PathBuf,
    cache: PathBuf,
}

impl Go {
    /// Unpacks the compiler below `scratch`. The source is expected below `path`, Go's workspace.
    pub(super) fn unpack(sandbox: &Sandbox, scratch: &Path, path: &Path, step: &Step) -> Result<Self> {
        let root = scratch.join("go");
        for package in PACKAGES {
            let unpacked = fetch(sandbox, package, scratch, step)?;
            // Each refers to the other by relative links, so they have to be in one tree.
            std::fs::create_dir_all(&root)?;
            exec::quietly(Command::new("cp").args(["-a", "--update"]).arg(unpacked.join("usr")).arg(&root), step)?;
        }
        Ok(Self { root: root.join("usr/lib").join(RELEASE), path: path.to_path_buf(), cache: scratch.join("go-cache") })
    }

    /// Builds the package `package` of `directory` into the file `to`.
    pub(super) fn build(&self, directory: &Path, package: &str, flags: &[&str], to: &Path, step: &Step) -> Result<()> {
        let mut command = self.command(&self.root.join("bin/go"), directory);
        command.arg("build").args(flags).arg("-o").arg(to).arg(package);
        exec::quietly(&mut command, step)
    }

    /// A program in an environment that has this compiler, and looks for nothing outside the source.
    pub(super) fn command(&self, program: &Path, directory: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(directory).env("GOROOT", &self.root).env("GOPATH", &self.path).env("GOCACHE", &self.cache);
        // Kubernetes of that time is a tree in the workspace with `vendor`, not modules; static programs run on every machine.
        command.envs([("GO111MODULE", "off"), ("GOFLAGS", ""), ("GOENV", "off"), ("GOPROXY", "off")]);
        command.envs([("GOTOOLCHAIN", "local"), ("CGO_ENABLED", "0")]);
        // Compilers are short-lived: collecting garbage is a fifth of their time.
        command.env("GOGC", "400");
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", self.root.join("bin").display()));
        command
    }
}
