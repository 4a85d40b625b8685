//! cgroup v2 paths, as `/proc/PID/cgroup` writes them, and the directories that show them.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

/// A mount of the cgroup v2 hierarchy, or of a part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The cgroup that the mount point shows.
    root: PathBuf,
    point: PathBuf,
}

impl Mount {
    /// The mount that `directory`, an existing one without symbolic links, is on. Errors say why there is none.
    pub fn of(directory: &Path) -> Result<Self, String> {
        let mounts =
            fs::read_to_string("/proc/self/mountinfo").map_err(|error| format!("/proc/self/mountinfo: {error}"))?;
        Self::find(&mounts, directory)
    }

    fn find(mountinfo: &str, directory: &Path) -> Result<Self, String> {
        let mount = mountinfo
            .lines()
            .filter_map(Self::parse)
            .filter(|mount| directory.starts_with(&mount.point))
            .max_by_key(|mount| mount.point.components().count())
            .ok_or_else(|| {
                format!("{} is not on a cgroup v2 file system; give --cgroup a directory of one", directory.display())
            })?;
        // Roots are shown relative to the cgroup namespace of the reader, and a path that leads out of it cannot be compared.
        if mount.root.components().any(|component| component == Component::ParentDir) {
            return Err(format!(
                "{} lies outside the agent's cgroup namespace; run the agent in the host's (privileged)",
                directory.display()
            ));
        }
        Ok(mount)
    }

    /// A cgroup2 line of mountinfo (`proc_pid_mountinfo(5)`).
    fn parse(line: &str) -> Option<Self> {
        let (mount, super_block) = line.split_once(" - ")?;
        if super_block.split(' ').next() != Some("cgroup2") {
            return None;
        }
        let mut fields = mount.split(' ').skip(3);
        Some(Self { root: unescape(fields.next()?), point: unescape(fields.next()?) })
    }

    /// Where it is mounted.
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// The cgroup that a directory on this mount shows.
    pub fn cgroup(&self, directory: &Path) -> PathBuf {
        self.root.join(directory.strip_prefix(&self.point).unwrap_or(Path::new("")))
    }

    /// The directory that shows a cgroup; `None` when the mount shows another part of the hierarchy.
    pub fn directory(&self, cgroup: &Path) -> Option<PathBuf> {
        cgroup.strip_prefix(&self.root).ok().map(|below| self.point.join(below))
    }
}

/// Undoes the octal escapes of mountinfo: space, tab, newline and backslash.
fn unescape(field: &str) -> PathBuf {
    let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    escapes.iter().fold(field.to_owned(), |text, (escape, character)| text.replace(escape, character)).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_translated_by_their_mount() {
        let v1 = "30 25 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755";
        let hybrid = "31 30 0:27 / /sys/fs/cgroup/unified rw shared:10 master:1 - cgroup2 cgroup2 rw";
        let part = "99 30 0:27 /kubepods /host/pods\\040here rw - cgroup2 cgroup rw";
        let outside = "98 30 0:27 /../.. /outer rw - cgroup2 cgroup rw";
        let mounts = [v1, hybrid, part, outside].join("\n");
        let find = |directory: &str| Mount::find(&mounts, Path::new(directory));
        for (directory, cgroup) in [
            ("/sys/fs/cgroup/unified", "/"),
            ("/sys/fs/cgroup/unified/a/b", "/a/b"),
            ("/host/pods here/pod1", "/kubepods/pod1"),
        ] {
            let mount = find(directory).unwrap();
            assert_eq!(mount.cgroup(Path::new(directory)), Path::new(cgroup));
            assert_eq!(mount.directory(Path::new(cgroup)).unwrap(), Path::new(directory));
        }
        assert_eq!(find("/host/pods here").unwrap().directory(Path::new("/system.slice")), None);
        assert!(find("/sys/fs/cgroup/memory").is_err_and(|error| error.contains("not on a cgroup v2 file system")));
        assert!(find("/outer/kubepods").is_err_and(|error| error.contains("outside the agent's cgroup namespace")));
    }
}
