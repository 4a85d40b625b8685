//! `cargo xtask image`: the agent as a container image, in a file that needs no registry: `ctr images import FILE`.

pub(crate) mod oci;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::{exec, places, setup, ui::Ui, vm};
use oci::{Image, Layer};

/// Where the program is in the image.
const PROGRAM: &str = "/usr/bin/underpass";
/// The CNI plugin, which the agent copies to its node.
const PLUGIN: &str = "underpass-cni";
/// What a container runtime mounts something on, and what programs expect.
const DIRECTORIES: [&str; 5] = ["/etc", "/proc", "/run", "/sys", "/tmp"];

/// What it is called.
const NAME: &str = concat!("localhost/underpass:", env!("CARGO_PKG_VERSION"));

#[derive(clap::Args)]
pub(crate) struct Options {
    /// The image's name.
    #[arg(long, default_value = NAME)]
    name: String,
    /// Where to put the file; by default `target/image/underpass.tar`.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Use this program, and the `underpass-cni` beside it, instead of building them for release.
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
}

impl Options {
    fn output(&self) -> PathBuf {
        self.output.clone().unwrap_or_else(|| places::target().join("image/underpass.tar"))
    }
}

/// Makes the image of a release build; its file.
pub(crate) fn make(ui: &Ui) -> Result<PathBuf> {
    let options = Options { name: NAME.to_owned(), output: None, agent: None };
    run(ui, &options)?;
    Ok(options.output())
}

pub(crate) fn run(ui: &Ui, options: &Options) -> Result<()> {
    let output = options.output();
    let agent = if let Some(agent) = &options.agent {
        agent.clone()
    } else {
        setup::ensure(ui)?;
        let package = ["--locked", "--release", "--package", "underpass", "--bin"];
        ui.step("building underpass for release", |step| {
            let mut cargo = Command::new("cargo");
            exec::quietly(cargo.arg("build").args(package).arg("underpass").current_dir(places::repository()), step)
        })?;
        ui.step(&format!("building {PLUGIN} for release"), |step| {
            let mut cargo = Command::new("cargo");
            cargo.arg("rustc").args(package).arg(PLUGIN).current_dir(places::repository());
            // It runs on the node, whose C library may be older or another one: it brings its own.
            exec::quietly(cargo.args(["--", "-C", "target-feature=+crt-static"]), step)
        })?;
        places::target().join("release/underpass")
    };
    let plugin = agent.with_file_name(PLUGIN);
    ensure!(
        plugin.is_file(),
        "there is no {}, which has to be in the image: build it with the agent (cargo build --package underpass --bins)",
        plugin.display()
    );
    let digest = ui.step("the image", |_| write(&agent, &plugin, &options.name, &output))?;
    ui.say(&format!("{} is {} with digest {digest}; containerd takes it with", output.display(), options.name));
    ui.say(&format!("  ctr --namespace k8s.io images import {}", output.display()));
    Ok(())
}

/// Writes the image of agent and plugin, all of it or nothing; its digest.
fn write(agent: &Path, plugin: &Path, name: &str, output: &Path) -> Result<String> {
    let directory = output.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    let mut layer = Layer::new();
    for directory in DIRECTORIES {
        layer.directory(Path::new(directory))?;
    }
    for (program, place) in [(agent, Path::new(PROGRAM)), (plugin, &Path::new(PROGRAM).with_file_name(PLUGIN))] {
        let stripped = tempfile::NamedTempFile::new_in(directory).context("creating a file")?;
        exec::output(Command::new("strip").arg("--strip-debug").arg("-o").arg(stripped.path()).arg(program))?;
        layer.file(stripped.path(), place)?;
    }
    // At the paths where the loader found them here: it looks there before it asks a cache, which the image has none of.
    for library in vm::libraries(&BTreeSet::from([agent.to_path_buf()]))? {
        layer.file(&library, &library)?;
    }
    let image = Image { name, entrypoint: &[PROGRAM], layer };
    let new = tempfile::NamedTempFile::new_in(directory).context("creating a file")?;
    let digest = image.write(new.as_file())?;
    new.as_file().set_permissions(fs::Permissions::from_mode(0o644)).context("making the image readable")?;
    new.persist(output).with_context(|| format!("writing {}", output.display()))?;
    Ok(digest)
}
