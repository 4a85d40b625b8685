//! Puts the plugin and its entry where the node's container runtime finds them, and takes them away again.
//!
//! Both are the work of a moment and can be repeated: the agent calls [`Installer::ensure`] whenever the directory with
//! the network configurations changes, because a CNI that is restarted or upgraded writes its file anew.
//!
//! A list (`*.conflist`) gets the entry where it is. A configuration with a single plugin (`*.conf`, `*.json`), and a list behind
//! a symbolic link, stay as they are: a list with both plugins is put beside it, under a name that comes
//! before it. Rewriting such a file under another name would lose the original, and a runtime that looked in
//! between would find no network. So removing is deleting what we have made, and if the original's owner changes or
//! removes it, the list beside it follows.

mod directory;
mod network;
mod program;
#[cfg(test)]
mod tests;

use std::{
    fs::{File, TryLockError},
    io,
    path::{Path, PathBuf},
};

use crate::conflist::{self, ConflistError, Fields};
use directory::Directory;

/// How often an edit starts again because the file's owner has just written it.
const TRIES: u32 = 3;

/// What the plugin's entry says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The agent's socket, as the runtime sees it.
    pub socket: PathBuf,
    /// The [projection](crate::projection), as the runtime sees it.
    pub projection: PathBuf,
    /// Namespaces whose pods the agent is never asked about.
    pub exempt_namespaces: Vec<String>,
}

/// Where things are, as this process sees them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installer {
    /// The plugin's program to install.
    pub program: PathBuf,
    /// The runtime's directory for plugins (`/opt/cni/bin` of the host).
    pub bin_dir: PathBuf,
    /// The runtime's directory for network configurations (`/etc/cni/net.d` of the host).
    pub conf_dir: PathBuf,
    /// The file in it that the runtime uses, where that is not the first.
    pub conf_name: Option<String>,
    /// The entry.
    pub entry: Entry,
}

/// How it stands after [`Installer::ensure`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// The plugin is called for every new pod.
    Chained {
        /// The file with its entry.
        file: PathBuf,
        /// Whether anything had to be changed for that.
        changed: bool,
        /// Files before or beside it that cannot be read.
        skipped: Vec<Skipped>,
    },
    /// There is no network configuration yet: nothing to chain to.
    NoNetwork {
        /// Files that cannot be read: where there are any, they are why.
        skipped: Vec<Skipped>,
    },
}

/// What [`Installer::remove`] has done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    /// Files that the entry was taken out of, or that were removed.
    pub files: Vec<PathBuf>,
    /// Whether the plugin's program was there.
    pub program: bool,
    /// Files that cannot be read, and so were left alone.
    pub skipped: Vec<Skipped>,
}

/// A network configuration that cannot be understood. Some runtimes pass over it, others take no network at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {reason}", file.display())]
pub struct Skipped {
    /// Which one.
    pub file: PathBuf,
    /// Why.
    pub reason: String,
}

/// Why something could not be put in place or away. What was there before is still in force.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The system said no.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// The file that the runtime uses is one that the plugin cannot be chained to.
    #[error("{}: {reason}. Pods are not held back on this node until that is changed", file.display())]
    Refused {
        /// Which one.
        file: PathBuf,
        /// Why.
        reason: ConflistError,
    },
    /// A setting cannot be used.
    #[error("{field}: {value:?} {reason}")]
    Setting {
        /// Its name.
        field: &'static str,
        /// Its value.
        value: PathBuf,
        /// What it has to be.
        reason: &'static str,
    },
    /// Another installer is at work in the same directories.
    #[error("another process is installing in {}: try again", .0.display())]
    Busy(PathBuf),
    /// Its owner wrote the file whenever it was to be replaced.
    #[error("{} changes all the time: try again", .0.display())]
    Changing(PathBuf),
}

impl Installer {
    /// Installs the program, and the entry as the last one of the list that the runtime uses.
    ///
    /// # Errors
    /// [`InstallError`]. Trying again later is right for all but `Refused` and `Setting`, which need somebody's help.
    pub fn ensure(&self) -> Result<State, InstallError> {
        let fields = self.fields()?;
        let _lock = self.lock()?.ok_or_else(|| {
            let missing = io::Error::new(io::ErrorKind::NotFound, "no such directory; is the host's mounted there?");
            failed("opening", &self.bin_dir)(missing)
        })?;
        directory::sweep(&self.bin_dir)?;
        // First, because from the moment that the entry is there the runtime calls it.
        let installed = program::install(&self.program, &self.installed())?;
        let mut changes = Changes::default();
        let chosen = settle(|| {
            changes.skipped.clear();
            let directory = Directory::of(&self.conf_dir)?;
            let chosen = directory.chain(self.conf_name.as_deref(), &fields, &mut changes)?;
            // Last, so that there is no moment without any.
            directory.unchain_all_but(chosen.as_deref(), &mut changes)?;
            Ok(chosen)
        })?;
        let Changes { files, skipped } = changes;
        Ok(match chosen {
            Some(file) => State::Chained { file, changed: installed || !files.is_empty(), skipped },
            None => State::NoNetwork { skipped },
        })
    }

    /// Takes the entry out of every list, then removes the program.
    ///
    /// # Errors
    /// [`InstallError`]. The program stays when an entry does.
    pub fn remove(&self) -> Result<Removed, InstallError> {
        let lock = self.lock()?;
        let mut changes = Changes::default();
        settle(|| {
            changes.skipped.clear();
            Directory::of(&self.conf_dir)?.unchain_all_but(None, &mut changes)
        })?;
        let mut program = false;
        if lock.is_some() {
            directory::sweep(&self.bin_dir)?;
            program = directory::remove(&self.installed())?;
        }
        Ok(Removed { files: changes.files, program, skipped: changes.skipped })
    }

    /// Where the program is installed.
    fn installed(&self) -> PathBuf {
        self.bin_dir.join(conflist::TYPE)
    }

    fn fields(&self) -> Result<Fields<'_>, InstallError> {
        let path = |field, value: &'_ PathBuf| {
            let setting = |reason| InstallError::Setting { field, value: value.clone(), reason };
            if !value.is_absolute() {
                return Err(setting("has to be an absolute path"));
            }
            value.to_str().map(str::to_owned).ok_or_else(|| setting("has to be UTF-8, as JSON is"))
        };
        if let Some(name) = &self.conf_name
            && (name.is_empty() || name.contains('/'))
        {
            let reason = "has to be the name of a file in the runtime's directory";
            return Err(InstallError::Setting { field: "conf_name", value: name.into(), reason });
        }
        Ok(Fields {
            socket: path("socket", &self.entry.socket)?.into(),
            projection: path("projection", &self.entry.projection)?.into(),
            exempt_namespaces: (&self.entry.exempt_namespaces).into(),
        })
    }

    /// Keeps a second agent out, such as the next one during an upgrade. `None` without a directory.
    fn lock(&self) -> Result<Option<File>, InstallError> {
        let opened = match File::open(&self.bin_dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(failed("opening", &self.bin_dir))?,
        };
        match opened.try_lock() {
            Ok(()) => Ok(Some(opened)),
            Err(TryLockError::WouldBlock) => Err(InstallError::Busy(self.bin_dir.clone())),
            Err(TryLockError::Error(error)) => Err(failed("locking", &self.bin_dir)(error)),
        }
    }
}

/// What was changed, and what was not understood.
#[derive(Default)]
struct Changes {
    files: Vec<PathBuf>,
    skipped: Vec<Skipped>,
}

/// Tries again when another program has written a file meanwhile.
fn settle<T>(mut attempt: impl FnMut() -> Result<T, InstallError>) -> Result<T, InstallError> {
    for _ in 1..TRIES {
        match attempt() {
            Err(InstallError::Changing(_)) => {}
            result => return result,
        }
    }
    attempt()
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError::Io { action, path, source }
}
