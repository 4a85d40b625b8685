//! The embedded CA's files. All of them are only touched with the lock held, and only ever replaced whole.
//!
//! - `ca.crt`: every root that peers are to trust, oldest first
//! - `ca.key`: the key that signs, of one of these roots
//! - `next.key`: during a rotation, the key of the newest root, which everybody has to know before it signs
//! - `ca.lock`: held while any of the others is read or written

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{ErrorKind, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use zeroize::Zeroizing;

use super::IssueError;
use crate::sys::file::removed;

const LOCK: &str = "ca.lock";

/// The directory, locked until this is dropped.
pub(super) struct Locked<'a> {
    directory: &'a Path,
    _lock: File,
}

impl<'a> Locked<'a> {
    /// Creates the directory if it is missing, and waits for the lock.
    pub(super) fn new(directory: &'a Path) -> Result<Self, IssueError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|e| error("creating CA directory", directory, &e))?;
        let mode = fs::metadata(directory).map_err(|e| error("examining CA directory", directory, &e))?.permissions();
        if mode.mode() & 0o022 != 0 {
            return Err(refuse("using CA directory", directory, "others may write to it; chmod 700 it"));
        }
        let path = directory.join(LOCK);
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| error("opening lock", &path, &e))?;
        lock.lock().map_err(|e| error("locking", &path, &e))?;
        Ok(Self { directory, _lock: lock })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// `None` when there is no such file.
    pub(super) fn read(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, IssueError> {
        let path = self.path(name);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(Zeroizing::new(bytes))),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(error("reading", &path, &e)),
        }
    }

    /// The same for a key, which nobody else may be able to read.
    pub(super) fn read_key(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, IssueError> {
        let path = self.path(name);
        match fs::metadata(&path) {
            Ok(m) if m.permissions().mode() & 0o077 != 0 => Err(refuse(
                "reading CA key",
                &path,
                "others may read it; chmod 600 it, or replace the CA if somebody has",
            )),
            _ => self.read(name),
        }
    }

    /// Replaces a file: after a crash either the old or the new one is there, whole.
    pub(super) fn replace(&self, name: &str, mode: u32, contents: &[u8]) -> Result<(), IssueError> {
        let path = self.path(name);
        let temporary = self.path(&format!(".{name}.new"));
        let write = || {
            removed(fs::remove_file(&temporary))?;
            let mut file = OpenOptions::new().create_new(true).write(true).mode(mode).open(&temporary)?;
            file.write_all(contents)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            self.sync()
        };
        write().map_err(|e| error("writing", &path, &e))
    }

    /// Renames a file over another one.
    pub(super) fn rename(&self, from: &str, to: &str) -> Result<(), IssueError> {
        let to = self.path(to);
        fs::rename(self.path(from), &to).and_then(|()| self.sync()).map_err(|e| error("replacing", &to, &e))
    }

    pub(super) fn remove(&self, name: &str) -> Result<(), IssueError> {
        let path = self.path(name);
        fs::remove_file(&path).and_then(|()| self.sync()).map_err(|e| error("removing", &path, &e))
    }

    fn sync(&self) -> std::io::Result<()> {
        File::open(self.directory)?.sync_all()
    }
}

pub(super) fn refuse(action: &'static str, path: &Path, reason: impl Into<String>) -> IssueError {
    IssueError::File { action, path: path.display().to_string(), reason: reason.into() }
}

fn error(action: &'static str, path: &Path, error: &std::io::Error) -> IssueError {
    refuse(action, path, error.to_string())
}
