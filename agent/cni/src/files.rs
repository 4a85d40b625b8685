//! Files that are read whole or replaced whole.

use std::{
    fs::{File, Permissions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{PermissionsExt as _, fchown},
    path::Path,
};

/// Start of the names of files that are being written. Runtimes read files by their suffix, so the names have none.
pub(crate) const TEMPORARY: &str = ".underpass-";

/// Owner and mode of a new file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) mode: u32,
    /// Users and groups stay those of the process without this.
    pub(crate) owner: Option<(u32, u32)>,
}

/// Reads a file of at most `limit` bytes.
///
/// # Errors
/// What reading gives; `FileTooLarge` when there is more.
pub(crate) fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {limit} bytes")));
    }
    Ok(bytes)
}

/// Replaces `path` by a file with these bytes: whoever opens it sees the old or the new one, also after a crash.
pub(crate) fn replace(path: &Path, bytes: &[u8], attributes: Attributes) -> io::Result<()> {
    let directory = path.parent().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut file = tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(directory)?;
    file.write_all(bytes)?;
    if let Some((user, group)) = attributes.owner {
        fchown(file.as_file(), Some(user), Some(group))?;
    }
    // After the owner, whose change takes bits away; explicitly, so that no umask has a say.
    file.as_file().set_permissions(Permissions::from_mode(attributes.mode))?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    File::open(directory)?.sync_all()
}
