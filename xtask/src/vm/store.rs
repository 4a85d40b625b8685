//! Downloaded things of which one version at a time is current. Half a download never looks like a finished one.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// Names the current version, below a thing's directory.
const CURRENT: &str = "current";

/// A directory per thing, and in it a directory per version.
pub(super) struct Store {
    directory: PathBuf,
}

impl Store {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// The current version of `thing` and its directory.
    pub(super) fn current(&self, thing: &str) -> Option<(String, PathBuf)> {
        let version = fs::read_to_string(self.directory.join(thing).join(CURRENT)).ok()?;
        let directory = self.directory.join(thing).join(&version);
        directory.is_dir().then_some((version, directory))
    }

    /// Makes `version` the current one of `thing`, with what `fill` puts into the directory that it gets, and forgets the others.
    pub(super) fn put(&self, thing: &str, version: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let home = self.directory.join(thing);
        fs::create_dir_all(&home).with_context(|| format!("creating {}", home.display()))?;
        let directory = home.join(version);
        if !directory.is_dir() {
            let staging = tempfile::Builder::new().prefix(".new-").tempdir_in(&home).context("creating a directory")?;
            fill(staging.path())?;
            let staging = staging.keep();
            fs::rename(&staging, &directory).with_context(|| format!("creating {}", directory.display()))?;
        }
        let mut name = tempfile::NamedTempFile::new_in(&home).context("creating a file")?;
        std::io::Write::write_all(&mut name, version.as_bytes()).context("writing a file")?;
        name.persist(home.join(CURRENT)).with_context(|| format!("replacing {}", home.join(CURRENT).display()))?;
        for old in fs::read_dir(&home).with_context(|| format!("listing {}", home.display()))?.flatten() {
            // Another user of an old version has read it into memory already, or says clearly that it is gone.
            if old.path().is_dir() && old.path() != directory {
                fs::remove_dir_all(old.path()).with_context(|| format!("removing {}", old.path().display()))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Store;

    #[test]
    fn one_version_is_current_and_a_failure_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(directory.path().to_path_buf());
        assert_eq!(store.current("kernel"), None);
        store.put("kernel", "1", |dir| Ok(std::fs::write(dir.join("file"), "one")?)).unwrap();
        let (version, first) = store.current("kernel").unwrap();
        assert_eq!((version.as_str(), std::fs::read_to_string(first.join("file")).unwrap().as_str()), ("1", "one"));
        store.put("kernel", "2", |_| anyhow::bail!("the network is down")).unwrap_err();
        assert_eq!(store.current("kernel").unwrap().0, "1");
        store.put("kernel", "2", |_| Ok(())).unwrap();
        assert_eq!(store.current("kernel").unwrap().0, "2");
        assert!(!first.exists());
    }
}
