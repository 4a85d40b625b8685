//! The copy of what was last accepted, so that a node starts when its source is missing or broken.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, BufWriter, IntoInnerError, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use nix::{libc, unistd::geteuid};

use crate::sys::file::removed;

/// A copy that a source keeps in the state directory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Copy {
    /// Its name.
    pub(super) name: &'static str,
    /// Longest text that is read, in bytes.
    pub(super) longest: usize,
}

impl Copy {
    /// Where the copy is.
    pub(super) fn path(self, state_dir: &Path) -> PathBuf {
        state_dir.join(self.name)
    }

    /// Removes it, whether it is there or not.
    pub(super) fn forget(self, state_dir: &Path) -> io::Result<()> {
        for path in [self.path(state_dir), self.temporary(state_dir)] {
            removed(fs::remove_file(path))?;
        }
        Ok(())
    }

    /// Name while it is written. Fixed, so that crashes cannot pile up files.
    fn temporary(self, state_dir: &Path) -> PathBuf {
        state_dir.join(format!(".{}.tmp", self.name))
    }

    /// Replaces the copy, atomically and durably, unless it says that already. On failure the previous copy is still there.
    pub(super) fn save(self, state_dir: &Path, text: &str) -> io::Result<()> {
        if read(self, state_dir).is_ok_and(|old| old == text) {
            return Ok(());
        }
        self.write(state_dir, |file| file.write_all(text.as_bytes()))
    }

    /// As [`save`](Self::save), of what is too much to be in memory twice.
    pub(super) fn write(
        self,
        state_dir: &Path,
        text: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
    ) -> io::Result<()> {
        write(self, state_dir, text)
    }

    /// Reads the copy. One that somebody else could have written is refused: it decides who is trusted as whom.
    pub(super) fn read(self, state_dir: &Path) -> io::Result<String> {
        read(self, state_dir)
    }
}

fn write(copy: Copy, state_dir: &Path, text: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(state_dir)?;
    if fs::metadata(state_dir)?.permissions().mode() & 0o777 != 0o700 {
        fs::set_permissions(state_dir, Permissions::from_mode(0o700))?;
    }
    let temporary = copy.temporary(state_dir);
    removed(fs::remove_file(&temporary))?;
    let written = write_new(&temporary, text).and_then(|()| fs::rename(&temporary, copy.path(state_dir)));
    if written.is_err() {
        // Best effort: on a full disk even a truncated file takes room that the next attempt needs.
        let _ = fs::remove_file(&temporary);
    }
    written?;
    File::open(state_dir)?.sync_all()
}

fn write_new(path: &Path, text: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
    let mut file = BufWriter::new(OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?);
    text(&mut file)?;
    file.into_inner().map_err(IntoInnerError::into_error)?.sync_all()
}

fn read(copy: Copy, state_dir: &Path) -> io::Result<String> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(copy.path(state_dir))?;
    let meta = file.metadata()?;
    let owner = meta.uid();
    if !meta.is_file() || (owner != 0 && owner != geteuid().as_raw()) || meta.mode() & 0o022 != 0 {
        let problem = format!("not a regular file that only its owner (uid {owner}) can write; remove it");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, problem));
    }
    let mut text = String::new();
    file.take(copy.longest as u64 + 1).read_to_string(&mut text)?;
    Ok(text)
}
