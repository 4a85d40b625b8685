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
    /// Cargo's profile to build with; `release` and `dev` are built sooner.
    #[arg(long, default_value = "dist", value_parser = ["dist", "release", "dev"], conflicts_with_all = ["agent", "program"])]
    profile: String,
    /// Use this program, and the `underpass-cni` beside it, instead of building them.
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// Instead of Underpass: an image of this program, for tests.
    #[arg(long, value_name = "FILE", conflicts_with = "agent", hide = true)]
    program: Option<PathBuf>,
}

impl Options {
    fn output(&self) -> PathBuf {
        self.output.clone().unwrap_or_else(|| places::target().join("image/underpass.tar"))
    }
}

/// Makes the image, soon rather than small; its file.
pub(crate) fn make(ui: &Ui) -> Result<PathBuf> {
    let profile = "release".to_owned();
    let options = Options { name: NAME.to_owned(), output: None, profile, agent: None, program: None };
    run(ui, &options)?;
    Ok(options.output())
}

pub(crate) fn run(ui: &Ui, options: &Options) -> Result<()> {
    let output = options.output();
    let programs = if let Some(program) = &options.program {
        let name = program.file_name().with_context(|| format!("--program {} has no name", program.display()))?;
        vec![(program.clone(), Path::new("/usr/bin").join(name))]
    } else {
        underpass(ui, options.agent.as_deref(), &options.profile)?
    };
    let digest = ui.step("the image", |_| write(&programs, &options.name, &output))?;
    ui.say(&format!("{} is {} with digest {digest}; containerd takes it with", output.display(), options.name));
    ui.say(&format!("  ctr --namespace k8s.io images import {}", output.display()));
    Ok(())
}

/// Agent and plugin, built if there is no `agent`, and their places in the image.
fn underpass(ui: &Ui, agent: Option<&Path>, profile: &str) -> Result<Vec<(PathBuf, PathBuf)>> {
    let agent = if let Some(agent) = agent {
        agent.to_path_buf()
    } else {
        setup::ensure(ui)?;
        let build = |command: &str, package: &str| {
            exec::cargo(&[command, "--locked", "--profile", profile, "--package", package, "--bin", package])
        };
        let what = |package| format!("building {package}, profile {profile}");
        ui.step(&what("underpass"), |step| exec::quietly(&mut build("build", "underpass"), step))?;
        ui.step(&what(PLUGIN), |step| {
            // It runs on the node, whose C library may be older or another one: it brings its own.
            exec::quietly(build("rustc", PLUGIN).args(["--", "-C", "target-feature=+crt-static"]), step)
        })?;
        // Of these, the one whose directory has another name.
        places::target().join(if profile == "dev" { "debug" } else { profile }).join("underpass")
    };
    let plugin = agent.with_file_name(PLUGIN);
    ensure!(
        plugin.is_file(),
        "there is no {}, which has to be in the image: build it with the agent \
         (cargo build --package underpass --package underpass-cni --bins)",
        plugin.display()
    );
    let place = Path::new(PROGRAM);
    Ok(vec![(agent, place.to_path_buf()), (plugin, place.with_file_name(PLUGIN))])
}

/// Writes the image of programs, of which it runs the first, all of it or nothing; its digest.
fn write(programs: &[(PathBuf, PathBuf)], name: &str, output: &Path) -> Result<String> {
    let directory = output.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    let mut layer = Layer::new();
    for directory in DIRECTORIES {
        layer.directory(Path::new(directory))?;
    }
    for (program, place) in programs {
        let stripped = tempfile::NamedTempFile::new_in(directory).context("creating a file")?;
        exec::output(Command::new("strip").arg("--strip-debug").arg("-o").arg(stripped.path()).arg(program))?;
        layer.file(stripped.path(), place)?;
    }
    let (first, place) = programs.first().context("an image has a program")?;
    // At the paths where the loader found them here: it looks there before it asks a cache, which the image has none of.
    for library in vm::libraries(&BTreeSet::from([first.clone()]))? {
        layer.file(&library, &library)?;
    }
    let image = Image { name, entrypoint: &[&place.to_string_lossy()], layer };
    let new = tempfile::NamedTempFile::new_in(directory).context("creating a file")?;
    let digest = image.write(new.as_file())?;
    new.as_file().set_permissions(fs::Permissions::from_mode(0o644)).context("making the image readable")?;
    new.persist(output).with_context(|| format!("writing {}", output.display()))?;
    Ok(digest)
}
