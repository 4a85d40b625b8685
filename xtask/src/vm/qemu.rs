//! The emulator: the installed one when it is new enough, else one that is unpacked beside the kernels and run from there.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::store::Store;
use crate::{
    exec, places,
    setup::apt::{Sandbox, unpack},
    ui::{Step, Ui},
};

const PROGRAM: &str = "qemu-system-x86_64";
const PACKAGE: &str = "qemu-system-x86";
/// The oldest major version taken from the machine: the one that the kernels have been run on.
const OLDEST: u32 = 10;
/// Where it is fetched from. It comes with its own C library, so the machine's distribution does not matter.
const SUITES: &[&str] = &["bookworm", "bookworm-backports"];
const RELEASE: &str = "bookworm-backports";

/// How to start the emulator.
pub(super) struct Qemu {
    program: OsString,
    arguments: Vec<OsString>,
    modules: Option<PathBuf>,
}

impl Qemu {
    /// The installed emulator, the one in the store, or a new one in the store.
    pub(super) fn get(ui: &Ui, store: &Store) -> Result<Self> {
        if let Some(program) = places::program(PROGRAM)
            && version(&exec::output(Command::new(&program).arg("-version"))?).is_some_and(|major| major >= OLDEST)
        {
            return Ok(Self { program: program.into(), arguments: Vec::new(), modules: None });
        }
        if store.current("qemu").is_none() {
            ui.say(&format!(
                "No {PROGRAM} {OLDEST} or newer is installed, which runs the tests' kernels: unpacking Debian's (160 MB). The machine's \
                 own packages stay as they are."
            ));
            ui.step("fetching QEMU", |step| fetch(store, step)).context("fetching QEMU")?;
        }
        let (_, root) = store.current("qemu").context("it has just been put there")?;
        Ok(Self::below(&root))
    }

    fn below(root: &Path) -> Self {
        let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|path| root.join(path));
        let mut arguments: Vec<OsString> = vec!["--library-path".into()];
        arguments.push(libraries.each_ref().map(|path| path.display().to_string()).join(":").into());
        arguments.push(root.join("usr/bin").join(PROGRAM).into());
        for firmware in ["usr/share/qemu", "usr/share/seabios"] {
            arguments.extend(["-L".into(), root.join(firmware).into()]);
        }
        let modules = Some(libraries[0].join("qemu"));
        Self { program: root.join("lib64/ld-linux-x86-64.so.2").into(), arguments, modules }
    }

    /// A command that starts it, and that dies with this process.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(&self.program).args(&self.arguments);
        if let Some(modules) = &self.modules {
            command.env("QEMU_MODULE_DIR", modules);
        }
        command
    }
}

fn fetch(store: &Store, step: &Step) -> Result<()> {
    let scratch = tempfile::tempdir().context("creating a directory for downloads")?;
    let sandbox = Sandbox::debian(scratch.path(), SUITES, RELEASE)?;
    sandbox.update(step)?;
    let packages = sandbox.download_with_dependencies(&[PACKAGE], step)?;
    let file = packages.iter().filter_map(|path| path.file_name()?.to_str()).find_map(|name| {
        let version = name.strip_prefix(&format!("{PACKAGE}_"))?.split('_').next()?;
        Some(version.to_owned())
    });
    let version = file.with_context(|| format!("apt downloaded no {PACKAGE}"))?;
    // Without the epoch: directories of libraries are separated by colons.
    let version = version.rsplit("%3a").next().unwrap_or_default();
    store.put("qemu", version, |root| {
        for package in &packages {
            unpack(package, root, step)?;
        }
        // Nobody reads it, and it is a third of all files.
        let documentation = root.join("usr/share/doc");
        fs::remove_dir_all(&documentation).with_context(|| format!("removing {}", documentation.display()))
    })
}

/// The major version in what `-version` prints: `QEMU emulator version 10.0.2 (Debian …)`.
fn version(text: &str) -> Option<u32> {
    text.split_once(" version ")?.1.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn versions() {
        assert_eq!(super::version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright"), Some(10));
        assert_eq!(super::version("something else"), None);
    }
}
