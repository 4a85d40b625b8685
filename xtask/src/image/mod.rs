//! `cargo xtask image`: the agent as a container image, in a file that needs no registry: `ctr images import FILE`.

pub(crate) mod oci;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{exec, places, setup, ui::Ui, vm};
use oci::{Image, Layer};

/// Where the program is in the image.
const PROGRAM: &str = "/usr/bin/underpass";
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
    /// Use this program instead of building one for release.
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
        ui.step("building underpass for release", |step| {
            let mut cargo = Command::new("cargo");
            cargo.args(["build", "--locked", "--release", "--package", "underpass", "--bins"]);
            exec::quietly(cargo.current_dir(places::repository()), step)
        })?;
        places::target().join("release/underpass")
    };
    let digest = ui.step("the image", |_| write(&agent, &options.name, &output))?;
    ui.say(&format!("{} is {} with digest {digest}; containerd takes it with", output.display(), options.name));
    ui.say(&format!("  ctr --namespace k8s.io images import {}", output.display()));
    Ok(())
}

/// Writes the image of a program, all of it or nothing; its digest.
fn write(agent: &Path, name: &str, output: &Path) -> Result<String> {
    let directory = output.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    let stripped = tempfile::NamedTempFile::new_in(directory).context("creating a file")?;
    exec::output(Command::new("strip").arg("--strip-debug").arg("-o").arg(stripped.path()).arg(agent))?;
    let mut layer = Layer::new();
    for directory in DIRECTORIES {
        layer.directory(Path::new(directory))?;
    }
    layer.file(stripped.path(), Path::new(PROGRAM))?;
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
