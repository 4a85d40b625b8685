//! Removing directories that something may still be mounted in.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, umount2};

/// Unmounts what is mounted at or below `directory`, whose path has no symbolic links, and removes
/// the directory. A directory that is not there is no error.
///
/// A program that was killed unmounts nothing, and a directory with a mount in it cannot be
/// removed; what a mount shows may belong to somebody else, and must not be deleted through it.
pub fn remove_dir_all(directory: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    for mount in below(&mounts, directory) {
        umount2(&mount, MntFlags::MNT_DETACH).with_context(|| format!("unmounting {}", mount.display()))?;
    }
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", directory.display()))
        }
        _ => Ok(()),
    }
}

/// Mounted directories at or below `directory`, inner ones first.
fn below(mounts: &str, directory: &Path) -> Vec<PathBuf> {
    let mounted = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(unescaped);
    let mut found: Vec<_> = mounted.filter(|path| path.starts_with(directory)).collect();
    found.reverse();
    found
}

/// The kernel writes blanks, newlines and backslashes of a path as three octal digits.
fn unescaped(path: &str) -> PathBuf {
    let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    PathBuf::from(escapes.iter().fold(path.to_owned(), |path, (code, meant)| path.replace(code, meant)))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::below;

    #[test]
    fn only_the_mounts_of_the_directory() {
        let mounts = "/dev/vda / ext4 rw 0 0\ntmpfs /t/cluster/a tmpfs rw 0 0\nx /t/cluster/a/b\\040c tmpfs rw 0 0\ny /t/cluster-2 tmpfs rw 0 0\n";
        assert_eq!(below(mounts, Path::new("/t/cluster")), ["/t/cluster/a/b c", "/t/cluster/a"].map(Path::new));
    }
}
