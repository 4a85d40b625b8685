//! The kernels that tests run on: Debian's, built for virtual machines.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use super::{archive::Archive, modules, store::Store};
use crate::{
    exec,
    setup::apt::{Sandbox, unpack},
    ui::{Step, Ui},
};

/// The package that depends on a suite's current kernel.
const PACKAGE: &str = "linux-image-cloud-amd64";
/// Files of a prepared kernel.
const IMAGE: &str = "vmlinuz";
const MODULES: &str = "modules.cpio";

/// A series of kernels, and with it a support window: the oldest with all that is needed, the current one of stable distributions,
/// and the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Series {
    /// Debian 12.
    #[value(name = "6.1")]
    V6_1,
    /// Debian 13, as Debian 12's backports have it.
    #[value(name = "6.12")]
    V6_12,
    /// Debian's development suite.
    #[value(name = "7.x")]
    V7,
}

impl Series {
    pub(super) const ALL: [Self; 3] = [Self::V6_1, Self::V6_12, Self::V7];

    /// Whether its kernels attach programs as tcx links (Linux 6.6).
    pub(super) const fn has_tcx(self) -> bool {
        !matches!(self, Self::V6_1)
    }

    /// Its name, the suites that it is in, and how its versions begin.
    const fn facts(self) -> (&'static str, &'static [&'static str], &'static str) {
        match self {
            Self::V6_1 => ("6.1", &["bookworm", "bookworm-security"], "6.1."),
            Self::V6_12 => ("6.12", &["bookworm-backports"], "6.12."),
            Self::V7 => ("7.x", &["sid"], "7."),
        }
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.facts().0)
    }
}

/// A kernel that can be started.
pub(super) struct Kernel {
    pub(super) series: Series,
    /// Debian's version, e.g. `6.12.95-1~bpo12+1`.
    pub(super) version: String,
    pub(super) image: PathBuf,
    /// An initramfs with its modules.
    pub(super) modules: PathBuf,
}

/// The kernel of a series from the store, fetched when it is not there or when `update` asks for the newest.
pub(super) fn get(ui: &Ui, store: &Store, series: Series, update: bool) -> Result<Kernel> {
    let name = series.facts().0;
    let usable = store.current(name).is_some_and(|(version, _)| version.ends_with(&modules::edition()));
    if update || !usable {
        ui.step(&format!("fetching Debian's kernel {series}"), |step| fetch(store, series, step))
            .with_context(|| format!("fetching kernel {series}"))?;
    }
    let (version, directory) = store.current(name).context("it has just been put there")?;
    let version = version.strip_suffix(&modules::edition()).context("it has just been put there")?.to_owned();
    Ok(Kernel { series, version, image: directory.join(IMAGE), modules: directory.join(MODULES) })
}

fn fetch(store: &Store, series: Series, step: &Step) -> Result<()> {
    let (name, suites, prefix) = series.facts();
    let scratch = tempfile::tempdir().context("creating a directory for downloads")?;
    let sandbox = Sandbox::debian(scratch.path(), suites, suites.last().expect("every series has a suite"))?;
    sandbox.update(step)?;
    let version = newest(&sandbox.versions(PACKAGE)?, prefix)
        .with_context(|| format!("looking for {PACKAGE} in {}", suites.join(", ")))?;
    store.put(name, &format!("{version}{}", modules::edition()), |directory| {
        let root = scratch.path().join("root");
        for (package, version) in with_own_parts(&sandbox, &version)? {
            unpack(&sandbox.download(&package, &version, step)?, &root, step)?;
        }
        step.now("preparing the modules");
        prepare(&root, directory)
    })
}

/// The first of `versions`, which apt sorts from new to old, that belongs to the series.
fn newest(versions: &[String], prefix: &str) -> Result<String> {
    let found = versions.iter().find(|version| version.starts_with(prefix));
    found.cloned().with_context(|| format!("no version {prefix}* is on offer, only: {}", versions.join(", ")))
}

/// The packages that the kernel consists of: what the named one depends on in exactly one version, and so on.
fn with_own_parts(sandbox: &Sandbox, version: &str) -> Result<Vec<(String, String)>> {
    let mut all = vec![(PACKAGE.to_owned(), version.to_owned())];
    let mut next = 0;
    while let Some((package, version)) = all.get(next).cloned() {
        for part in exact(&sandbox.depends(&package, &version)?) {
            if !all.contains(&part) {
                all.push(part);
            }
        }
        next += 1;
    }
    ensure!(all.len() > 1, "{PACKAGE} {version} depends on no kernel");
    Ok(all)
}

/// The dependencies in `depends` on one version only: `a (>= 1) | b, c (= 2)` has `c` in version 2.
fn exact(depends: &str) -> Vec<(String, String)> {
    let parts = depends.split(',').filter_map(|part| {
        let (package, rest) = part.trim().split_once(" (= ")?;
        Some((package.to_owned(), rest.strip_suffix(')')?.to_owned()))
    });
    parts.collect()
}

/// Makes of unpacked packages what a machine is started with.
fn prepare(root: &Path, into: &Path) -> Result<()> {
    // Newer packages keep the image beside the modules.
    let places = ["lib/modules", "usr/lib/modules"].map(|place| root.join(place));
    let modules = places.iter().find(|place| place.is_dir()).context("the packages have no modules")?;
    let release = only_entry(modules)?;
    let name = release.file_name().context("a release has a name")?.to_string_lossy().into_owned();
    let images = [root.join("boot").join(format!("vmlinuz-{name}")), release.join("vmlinuz")];
    let image = images.iter().find(|image| image.is_file()).context("the packages have no vmlinuz")?;
    fs::copy(image, into.join(IMAGE)).with_context(|| format!("copying {}", image.display()))?;

    let staging = root.join("staging");
    modules::select(&release, &staging, &name)?;
    exec::output(
        Command::new(crate::places::program("depmod").context("there is no depmod here: install kmod")?)
            .arg("-b")
            .arg(&staging)
            .arg(&name),
    )?;
    let mut archive = Archive::new();
    // Where distributions have it today; depmod and modprobe use the old name.
    archive.link("/lib", "usr/lib");
    archive.tree(&staging.join("lib/modules"), Path::new("/usr/lib/modules"))?;
    archive.write(&into.join(MODULES))
}

fn only_entry(directory: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(directory).with_context(|| format!("listing {}", directory.display()))?;
    let entry = entries.next().with_context(|| format!("{} is empty", directory.display()))??;
    Ok(entry.path())
}

#[cfg(test)]
mod tests {
    use super::{Series, exact, newest};

    #[test]
    fn the_newest_version_of_the_series_is_chosen() {
        let versions = ["7.2.13-1", "6.12.95-1~bpo12+1", "6.1.192-2", "6.1.176-1"].map(str::to_owned);
        let chosen = Series::ALL.map(|series| newest(&versions, series.facts().2).unwrap());
        assert_eq!(chosen, ["6.1.192-2", "6.12.95-1~bpo12+1", "7.2.13-1"]);
        let error = newest(&versions, "8.").unwrap_err().to_string();
        assert!(error.contains("8.*") && error.contains("6.1.192-2"), "{error}");
    }

    #[test]
    fn a_kernels_own_parts_are_exact_dependencies() {
        let depends = "dracut | initramfs-tools (>= 0.120) | linux-initramfs-tool, linux-binary-7.2.13+deb14-cloud-amd64 (= 7.2.13-1), kmod";
        assert_eq!(exact(depends), [("linux-binary-7.2.13+deb14-cloud-amd64".to_owned(), "7.2.13-1".to_owned())]);
        assert_eq!(exact(""), []);
    }
}
