//! A runtime's directory with network configurations.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{Changes, InstallError, Skipped, failed, network::Network};
use crate::{
    conflist::{self, ConflistError, Fields},
    files::{self, Attributes, Snapshot},
};

/// Largest network configuration that is read, in bytes. Real ones have a few thousand.
const LARGEST: u64 = 1 << 20;

/// Its files at one moment, in the order in which a runtime looks at them.
pub(super) struct Directory(Vec<Network>);

impl Directory {
    /// Removes temporary files of installers that were killed. Without a directory there are no files.
    pub(super) fn of(path: &Path) -> Result<Self, InstallError> {
        sweep(path)?;
        let mut networks = Vec::new();
        for (name, kind) in list(path)? {
            if !kind.is_dir() {
                networks.extend(Network::of(path, &name, kind.is_symlink()));
            }
        }
        networks.sort_by(|one, other| one.name().cmp(other.name()));
        Ok(Self(networks))
    }

    /// Puts the entry behind the plugins of the file that the runtime uses: the one called so, or the first that is
    /// a network at all. Returns where the entry is; `None` without a network.
    pub(super) fn chain(
        &self,
        name: Option<&str>,
        fields: &Fields<'_>,
        changes: &mut Changes,
    ) -> Result<Option<PathBuf>, InstallError> {
        for network in self.0.iter().filter(|network| network.stands_for().is_none()) {
            if name.is_some_and(|name| name != network.name()) {
                continue;
            }
            let Some(file) = File::read(network, changes)? else { continue };
            match file.chain(fields) {
                Ok(Some((to, text))) => {
                    file.write(&to, &text)?;
                    changes.files.push(to.clone());
                    return Ok(Some(to));
                }
                Ok(None) => return Ok(Some(file.target())),
                // The runtime uses this one: to go on with the next would be to look as if all were well.
                Err(reason @ ConflistError::Version(_)) => {
                    return Err(InstallError::Refused { file: network.path.clone(), reason });
                }
                Err(reason) => {
                    skip(network, reason.to_string(), changes);
                    // Half written, perhaps; what stands for it is still whole, and the runtime uses that.
                    if let Some(stand_in) = self.0.iter().find(|other| other.path == network.stand_in()) {
                        return Ok(Some(stand_in.path.clone()));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Takes the entry out of all files but this.
    pub(super) fn unchain_all_but(&self, but: Option<&Path>, changes: &mut Changes) -> Result<(), InstallError> {
        for network in self.0.iter().filter(|network| Some(&*network.path) != but) {
            if network.stands_for().is_some() {
                if remove(&network.path)? {
                    changes.files.push(network.path.clone());
                }
                continue;
            }
            if !network.is_edited() {
                continue;
            }
            let Some(file) = File::read(network, changes)? else { continue };
            match conflist::unchain(&file.text) {
                Ok(None) => {}
                Ok(Some(text)) => {
                    file.write(&network.path, &text)?;
                    changes.files.push(network.path.clone());
                }
                Err(reason) => skip(network, reason.to_string(), changes),
            }
        }
        Ok(())
    }
}

/// A network configuration's text.
struct File<'a> {
    network: &'a Network,
    snapshot: Snapshot,
    text: String,
}

impl<'a> File<'a> {
    /// `None` when it has gone meanwhile or is no text, which is noted.
    fn read(network: &'a Network, changes: &mut Changes) -> Result<Option<Self>, InstallError> {
        let mut snapshot = match Snapshot::take(&network.path, LARGEST) {
            Ok(snapshot) => snapshot,
            Err(error) => {
                let linked = fs::symlink_metadata(&network.path).is_ok();
                return match error.kind() {
                    io::ErrorKind::NotFound if !linked => Ok(None),
                    io::ErrorKind::FileTooLarge => {
                        skip(network, error.to_string(), changes);
                        Ok(None)
                    }
                    // A link to a place that this process does not see, which the runtime may.
                    _ => Err(failed("reading", &network.path)(error)),
                };
            }
        };
        match String::from_utf8(std::mem::take(&mut snapshot.bytes)) {
            Ok(text) => Ok(Some(Self { network, snapshot, text })),
            Err(error) => {
                skip(network, format!("not UTF-8: {}", error.utf8_error()), changes);
                Ok(None)
            }
        }
    }

    /// Which file has the entry when this one's network does.
    fn target(&self) -> PathBuf {
        if self.network.is_edited() { self.network.path.clone() } else { self.network.stand_in() }
    }

    /// What has to be written where; `None` when it is there.
    fn chain(&self, fields: &Fields<'_>) -> Result<Option<(PathBuf, String)>, ConflistError> {
        let target = self.target();
        let text = if self.network.is_edited() {
            conflist::chain(&self.text, fields)?
        } else {
            let text = if self.network.is_list() {
                conflist::chain(&self.text, fields)?.unwrap_or_else(|| self.text.clone())
            } else {
                conflist::from_single(&self.text, fields)?
            };
            let there = Snapshot::take(&target, LARGEST)
                .is_ok_and(|there| there.bytes == text.as_bytes() && there.attributes() == self.snapshot.attributes());
            (!there).then_some(text)
        };
        Ok(text.map(|text| (target, text)))
    }

    /// Writes what was made of this file, unless that has changed meanwhile.
    fn write(&self, to: &Path, text: &str) -> Result<(), InstallError> {
        let attributes: Attributes = self.snapshot.attributes();
        let current = || self.snapshot.is_current(&self.network.path);
        if files::replace_if(to, text.as_bytes(), attributes, current).map_err(failed("writing", to))? {
            Ok(())
        } else {
            Err(InstallError::Changing(self.network.path.clone()))
        }
    }
}

fn skip(network: &Network, reason: String, changes: &mut Changes) {
    let skipped = Skipped { file: network.path.clone(), reason };
    if !changes.skipped.contains(&skipped) {
        changes.skipped.push(skipped);
    }
}

/// Removes temporary files that were never finished.
pub(super) fn sweep(directory: &Path) -> Result<(), InstallError> {
    for (name, kind) in list(directory)? {
        if kind.is_file() && name.starts_with(files::TEMPORARY) {
            remove(&directory.join(name))?;
        }
    }
    Ok(())
}

/// Removes a file for good; whether there was one.
pub(super) fn remove(path: &Path) -> Result<bool, InstallError> {
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(failed("removing", path)(error)),
    }
    if let Some(directory) = path.parent() {
        files::sync(directory).map_err(failed("removing", path))?;
    }
    Ok(true)
}

/// Names and kinds of what is in a directory; nothing without one. Names that are not UTF-8 are nothing of ours.
fn list(directory: &Path) -> Result<Vec<(String, fs::FileType)>, InstallError> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed("listing", directory))?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed("listing", directory))?;
        if let Ok(name) = entry.file_name().into_string() {
            files.push((name, entry.file_type().map_err(failed("listing", directory))?));
        }
    }
    Ok(files)
}
