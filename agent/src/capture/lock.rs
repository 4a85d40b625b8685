//! One agent per pin directory.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use super::CaptureError;
use crate::fnv::fnv1a;

/// Node-local run-time state.
const RUN_DIR: &str = "/run/underpass";

/// Held for as long as the owner lives; the kernel releases it however the owner ends.
#[derive(Debug)]
pub struct PinLock {
    file: File,
    path: PathBuf,
    remove_with_drop: AtomicBool,
}

impl PinLock {
    /// Takes the lock on `pin_root`. Fails at once, naming the owner, when another process has it.
    pub fn acquire(pin_root: &Path) -> Result<Self, CaptureError> {
        let path = lock_path(pin_root);
        loop {
            let mut file = open(&path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut text = String::new();
                    // The owner may be about to write it: the number is a help, not a condition.
                    let _ = file.read_to_string(&mut text);
                    let owner = match text.lines().next() {
                        Some(pid) if !pid.is_empty() => format!("the process with pid {pid}"),
                        _ => "another process".to_owned(),
                    };
                    return Err(CaptureError::Bpf {
                        action: format!("take ownership of {}", pin_root.display()),
                        reason: format!("{owner} owns it; stop that first, or use another pin directory"),
                    });
                }
                Err(TryLockError::Error(source)) => {
                    return Err(CaptureError::Path { action: "lock", path, source });
                }
            }
            if !is_current(&file, &path) {
                continue; // an earlier owner removed the file between our open and our lock
            }
            let written =
                file.set_len(0).and_then(|()| writeln!(file, "{}\n{}", std::process::id(), pin_root.display()));
            return match written {
                Ok(()) => Ok(Self { file, path, remove_with_drop: AtomicBool::new(false) }),
                Err(source) => Err(CaptureError::Path { action: "write", path, source }),
            };
        }
    }

    /// The file goes when the last owner lets go, whenever that is.
    pub fn remove_with_drop(&self) {
        self.remove_with_drop.store(true, Relaxed);
    }

    /// Removes the file with the lock: for whoever leaves nothing behind.
    pub fn remove(self) -> Result<(), CaptureError> {
        fs::remove_file(&self.path).map_err(|source| CaptureError::Path {
            action: "remove",
            path: self.path.clone(),
            source,
        })
    }
}

impl Drop for PinLock {
    fn drop(&mut self) {
        // Before unlocking, so that whoever waits for the lock finds that its file is not the current one.
        if *self.remove_with_drop.get_mut()
            && let Err(e) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), error = %e, "cannot remove the lock file");
        }
        // Closing is not enough: a child that is just being spawned has the same open file until it executes its
        // program.
        if let Err(e) = self.file.unlock() {
            tracing::warn!(path = %self.path.display(), error = %e, "cannot unlock");
        }
    }
}

/// Waits for the lock on `what`: for short critical sections between agents.
pub fn exclusive(what: &Path) -> Result<File, CaptureError> {
    let path = lock_path(what);
    let file = open(&path)?;
    file.lock().map_err(|source| CaptureError::Path { action: "lock", path, source })?;
    Ok(file)
}

fn open(path: &Path) -> Result<File, CaptureError> {
    let failed = |action, path: &Path, source| CaptureError::Path { action, path: path.into(), source };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(RUN_DIR)
        .map_err(|e| failed("make directory", Path::new(RUN_DIR), e))?;
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|e| failed("open lock file", path, e))
}

fn is_current(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

fn lock_path(what: &Path) -> PathBuf {
    // A path has too many characters and too much length for a file name.
    let what = fs::canonicalize(what).unwrap_or_else(|_| what.into());
    let hash = fnv1a(what.as_os_str().as_encoded_bytes());
    Path::new(RUN_DIR).join(format!("{hash:016x}.lock"))
}
