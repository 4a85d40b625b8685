//! Files that are read whole or replaced whole.

use std::{
    fs::{self, File, Metadata, Permissions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, fchown},
    path::Path,
};

/// Start of the names of files that are being written. Runtimes go by a file's suffix, and these have none.
pub(crate) const TEMPORARY: &str = ".underpass-";

/// Mode of a new file and, where it is not the process's own, its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) mode: u32,
    pub(crate) owner: Option<(u32, u32)>,
}

/// A file as it was once.
pub(crate) struct Snapshot {
    pub(crate) bytes: Vec<u8>,
    metadata: Metadata,
}

impl Snapshot {
    /// Reads a file of at most `limit` bytes.
    ///
    /// # Errors
    /// What reading gives; `FileTooLarge` when there is more.
    pub(crate) fn take(path: &Path, limit: u64) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {limit} bytes")));
        }
        Ok(Self { bytes, metadata })
    }

    pub(crate) fn attributes(&self) -> Attributes {
        Attributes { mode: self.metadata.mode() & 0o7777, owner: Some((self.metadata.uid(), self.metadata.gid())) }
    }

    /// Whether the file at `path` is still the one that was read. Its owner may not know of us, nor lock anything.
    pub(crate) fn is_current(&self, path: &Path) -> io::Result<bool> {
        let stamp = |m: &Metadata| (m.dev(), m.ino(), m.size(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec());
        match fs::metadata(path) {
            Ok(now) => Ok(stamp(&now) == stamp(&self.metadata)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Replaces `path` by a file with these bytes: whoever opens it sees the old or the new one, also after a crash.
pub(crate) fn replace(path: &Path, bytes: &[u8], attributes: Attributes) -> io::Result<()> {
    replace_if(path, bytes, attributes, || Ok(true)).map(drop)
}

/// As [`replace`], when the condition still holds once everything is ready for it. Returns whether it did.
pub(crate) fn replace_if(
    path: &Path,
    bytes: &[u8],
    attributes: Attributes,
    condition: impl FnOnce() -> io::Result<bool>,
) -> io::Result<bool> {
    let directory = path.parent().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut file = tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(directory)?;
    file.write_all(bytes)?;
    if let Some((user, group)) = attributes.owner {
        fchown(file.as_file(), Some(user), Some(group))?;
    }
    // After the owner, whose change takes bits away; explicitly, so that no umask has a say.
    file.as_file().set_permissions(Permissions::from_mode(attributes.mode))?;
    file.as_file().sync_all()?;
    if !condition()? {
        return Ok(false);
    }
    file.persist(path).map_err(|error| error.error)?;
    sync(directory)?;
    Ok(true)
}

/// Makes what was renamed or removed in a directory last.
pub(crate) fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}
