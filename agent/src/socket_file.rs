//! The socket file: private from its first moment, never taken from a live agent, gone when the agent is.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, ErrorKind},
    os::unix::{
        fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    libc,
    unistd::geteuid,
};
use tokio::net::UnixListener;

use crate::sys::file::removed;

/// Longest path of a unix socket, in bytes: `sun_path` without its terminator (unix(7)).
const MAX_PATH: usize = 107;
/// Private directory that the socket is made in before it is moved into place.
const NURSERY: &str = ".new";

/// A listening socket that removes its file when dropped. One agent per directory.
pub struct SocketFile {
    /// The socket, mode 0600.
    pub listener: UnixListener,
    path: PathBuf,
    inode: u64,
    /// Held while the agent lives: the directory is this agent's.
    _lock: Flock<File>,
}

impl SocketFile {
    /// Makes the directory (0700) and the socket in it. What an agent that died left is replaced, what a living one has is not.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let directory = match path.parent() {
            Some(d) if !d.as_os_str().is_empty() => d,
            _ => return Err(invalid(format!("{} has no directory; give an absolute path", path.display()))),
        };
        let lock = own_directory(directory)?;
        check_stale(path)?;

        let nursery = directory.join(NURSERY);
        let temporary = nursery.join("s");
        if temporary.as_os_str().len().max(path.as_os_str().len()) > MAX_PATH {
            let problem = format!("{} is longer than {MAX_PATH} bytes; use a shorter --run-dir", path.display());
            return Err(invalid(problem));
        }
        // What an agent that died between these lines left.
        removed(fs::remove_file(&temporary))?;
        removed(fs::remove_dir(&nursery))?;
        DirBuilder::new().mode(0o700).create(&nursery)?;
        let bound = UnixListener::bind(&temporary).and_then(|listener| {
            fs::set_permissions(&temporary, Permissions::from_mode(0o600))?;
            let inode = fs::symlink_metadata(&temporary)?.ino();
            fs::rename(&temporary, path)?;
            Ok((listener, inode))
        });
        let _ = fs::remove_file(&temporary);
        let _ = fs::remove_dir(&nursery);
        let (listener, inode) = bound?;
        Ok(Self { listener, path: path.to_owned(), inode, _lock: lock })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Only our own file: somebody may have put another in its place.
        if fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes the directory (0700) or checks that nobody else can put files into it, and locks it. The lock dies with
/// the process that holds it, so it tells a dead agent's directory from a live one's without asking anybody.
fn own_directory(directory: &Path) -> io::Result<Flock<File>> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(directory)?;
    let meta = file.metadata()?;
    if (meta.uid() != 0 && meta.uid() != geteuid().as_raw()) || meta.mode() & 0o022 != 0 {
        let problem = format!(
            "{} belongs to uid {} with mode {:o}; others could replace the socket: give a directory of the agent's own with --run-dir",
            directory.display(),
            meta.uid(),
            meta.mode() & 0o7777
        );
        return Err(io::Error::new(ErrorKind::PermissionDenied, problem));
    }
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| {
        if e == nix::Error::EWOULDBLOCK {
            in_use(format!(
                "another agent is running with {}; stop it, or give this one another --run-dir",
                directory.display()
            ))
        } else {
            e.into()
        }
    })
}

/// A socket that nobody listens on may be replaced; anything else may not.
fn check_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
        Ok(m) if !m.file_type().is_socket() => Err(io::Error::new(
            ErrorKind::AlreadyExists,
            format!("{} exists and is no socket; remove it", path.display()),
        )),
        Ok(_) => match UnixStream::connect(path) {
            Err(e) if matches!(e.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) => Ok(()),
            Err(e) => Err(e),
            Ok(_) => Err(in_use(format!("somebody listens on {}; stop it, or use another --run-dir", path.display()))),
        },
    }
}

fn invalid(problem: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, problem)
}

fn in_use(problem: String) -> io::Error {
    io::Error::new(ErrorKind::AddrInUse, problem)
}
