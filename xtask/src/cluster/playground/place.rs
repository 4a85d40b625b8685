//! Where the playground is: everything of it follows from the directory that its files are in.

use std::{
    fmt::Write as _,
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

use crate::places;

/// Names of the nodes, in the order of their numbers, which start with 1.
pub(super) const NODES: [&str; 2] = ["node-a", "node-b"];

/// Longest name of a playground.
const LONGEST: usize = 40;

/// One playground of one checkout.
#[derive(Debug, Clone)]
pub(super) struct Place {
    directory: PathBuf,
    /// In the names of everything outside the directory, so that two checkouts do not meet.
    id: String,
    /// How commands name it: ` --name NAME`, or nothing.
    option: String,
}

impl Place {
    /// The playground of this checkout that has this name, whether it is there or not.
    pub(super) fn of(name: Option<&str>) -> Result<Self> {
        let target = places::target();
        fs::create_dir_all(&target).with_context(|| format!("creating {}", target.display()))?;
        let target = target.canonicalize().with_context(|| format!("looking at {}", target.display()))?;
        let Some(name) = name else { return Ok(Self::at(target.join("cluster"))) };
        let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        ensure!(
            (1..=LONGEST).contains(&name.len()) && name.bytes().all(known),
            "a playground's name is 1 to {LONGEST} characters of a-z, 0-9 and -, not {name:?}"
        );
        Ok(Self { option: format!(" --name {name}"), ..Self::at(target.join(format!("cluster-{name}"))) })
    }

    pub(super) fn at(directory: PathBuf) -> Self {
        let hash = ring::digest::digest(&ring::digest::SHA256, directory.as_os_str().as_encoded_bytes());
        let id = hash.as_ref()[..4].iter().fold("cluster-".to_owned(), |mut id, byte| {
            write!(id, "{byte:02x}").expect("a string takes everything");
            id
        });
        Self { directory, id, option: String::new() }
    }

    /// One command at a time.
    pub(super) fn lock(&self) -> Result<File> {
        let path = self.lock_file();
        let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => {
                bail!("another `cargo xtask cluster` is at work in {}", self.directory.display())
            }
            Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("locking {}", path.display())),
        }
    }

    /// Removes the file of the lock, which the caller holds.
    pub(super) fn unlock(&self) -> Result<()> {
        let path = self.lock_file();
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))
    }

    fn lock_file(&self) -> PathBuf {
        self.directory.with_extension("lock")
    }

    /// How a person calls a command for it.
    pub(super) fn command(&self, name: &str) -> String {
        format!("`cargo xtask cluster {name}{}`", self.option)
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// A file or directory of the playground's.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// How to reach its API.
    pub(super) fn kubeconfig(&self) -> PathBuf {
        self.file("kubeconfig")
    }

    /// Values for the chart that fit it.
    pub(super) fn values(&self) -> PathBuf {
        self.file("underpass.json")
    }

    /// What its programs have said.
    pub(super) fn logs(&self) -> PathBuf {
        self.file("logs")
    }

    /// Where the logs go when `up` fails.
    pub(super) fn failed_logs(&self) -> PathBuf {
        self.directory.with_extension("failed")
    }

    /// Name of its directory in every control group hierarchy.
    pub(super) fn cgroup(&self) -> &str {
        &self.id
    }

    /// Network namespace of the control plane (`api`) or of a node.
    pub(super) fn namespace(&self, of: &str) -> String {
        format!("{}-{of}", self.id)
    }

    /// All its network namespaces.
    pub(super) fn namespaces(&self) -> Vec<String> {
        std::iter::once("api").chain(NODES).map(|of| self.namespace(of)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::Place;

    #[test]
    fn names_that_are_part_of_paths() {
        assert!(Place::of(Some("test-1")).unwrap().directory().ends_with("cluster-test-1"));
        for name in ["", "../x", "A", "a.b", &"x".repeat(41)] {
            assert!(Place::of(Some(name)).unwrap_err().to_string().contains(&format!("{name:?}")));
        }
    }

    #[test]
    fn two_checkouts_have_different_names() {
        let [one, other] = ["/src/one/target/cluster", "/src/other/target/cluster"].map(|path| Place::at(path.into()));
        assert_ne!(one.cgroup(), other.cgroup());
        assert_eq!(one.cgroup(), Place::at("/src/one/target/cluster".into()).cgroup());
        assert_eq!(one.namespaces().len(), 3);
        assert!(one.namespaces().iter().all(|name| name.starts_with(one.cgroup())));
    }
}
