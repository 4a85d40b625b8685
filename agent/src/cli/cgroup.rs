//! Where the cgroup hooks attach.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use procfs::process::Process;

/// The cgroup v2 hierarchy of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub mount: PathBuf,
    /// Whether it is the only one (unified) or beside cgroup v1 (hybrid).
    pub unified: bool,
}

impl Hierarchy {
    /// Finds it in the mount table.
    pub fn find() -> anyhow::Result<Self> {
        let mounts = Process::myself().and_then(|p| p.mountinfo()).context("reading /proc/self/mountinfo")?;
        let mut mount = None;
        let mut unified = true;
        for m in mounts {
            match m.fs_type.as_str() {
                "cgroup2" if mount.is_none() => mount = Some(m.mount_point),
                "cgroup" => unified = false,
                _ => {}
            }
        }
        match mount {
            Some(mount) => Ok(Self { mount, unified }),
            None => bail!("no cgroup v2 is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup/unified"),
        }
    }

    /// The directory that holds the pods' cgroups: `kubepods` or `kubepods.slice` at the top.
    pub fn kubepods(&self) -> Option<PathBuf> {
        let mut found: Vec<_> = fs::read_dir(&self.mount)
            .ok()?
            .flatten()
            .filter(|e| e.file_name().as_encoded_bytes().starts_with(b"kubepods"))
            .map(|e| e.path())
            .filter(|p| p.is_dir())
            .collect();
        found.sort();
        found.into_iter().next()
    }
}

/// The directory to attach to: the one asked for, checked, or else the kubelet's.
pub fn attach_point(asked: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(path) = asked {
        let magic = statfs(path).with_context(|| format!("--cgroup {}", path.display()))?.filesystem_type();
        if magic != CGROUP2_SUPER_MAGIC || !path.is_dir() {
            bail!(
                "--cgroup {} is no cgroup v2 directory; see `underpass check` for where cgroup v2 is mounted",
                path.display()
            );
        }
        return Ok(path.to_owned());
    }
    let hierarchy = Hierarchy::find()?;
    hierarchy.kubepods().with_context(|| {
        format!(
            "no kubepods cgroup in {}; name the directory above the pods' cgroups with --cgroup or UNDERPASS_CGROUP",
            hierarchy.mount.display()
        )
    })
}
