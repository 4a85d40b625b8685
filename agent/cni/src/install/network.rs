//! Files of a runtime's directory by their names.

use std::path::{Path, PathBuf};

/// Part of the names of lists that stand before a file that is left as it is.
const MARK: &str = ".00-underpass-";

/// A file that a runtime may take its network from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Network {
    pub(super) path: PathBuf,
    name: String,
    linked: bool,
}

impl Network {
    /// `None` for a file that no runtime reads. `linked`: it is a symbolic link.
    pub(super) fn of(directory: &Path, name: &str, linked: bool) -> Option<Self> {
        matches!(split(name)?.1, "conf" | "conflist" | "json").then(|| Self {
            path: directory.join(name),
            name: name.to_owned(),
            linked,
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// A list of plugins, not a configuration of one.
    pub(super) fn is_list(&self) -> bool {
        self.name.ends_with(".conflist")
    }

    /// Whether the entry is put into this file. A link would be replaced by a file, and its target is somebody's who
    /// does not expect that.
    pub(super) fn is_edited(&self) -> bool {
        self.is_list() && !self.linked
    }

    /// The list that stands before this file, when it is not edited: the next name before it in the order of bytes that
    /// runtimes go by, since a digit comes before the suffix's letter.
    pub(super) fn stand_in(&self) -> PathBuf {
        let (stem, suffix) = split(&self.name).expect("checked when it was made");
        self.path.with_file_name(format!("{stem}{MARK}{suffix}.conflist"))
    }

    /// Of a list that stands before another file: that file.
    pub(super) fn stands_for(&self) -> Option<PathBuf> {
        let (stem, suffix) = self.name.strip_suffix(".conflist")?.rsplit_once(MARK)?;
        Some(self.path.with_file_name(format!("{stem}.{suffix}")))
    }
}

/// As Go's `filepath.Ext`, by which runtimes go: also a name that begins with its only dot has a suffix.
fn split(name: &str) -> Option<(&str, &str)> {
    name.rsplit_once('.')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(name: &str) -> Network {
        Network::of(Path::new("/etc/cni/net.d"), name, false).unwrap()
    }

    #[test]
    fn what_stands_for_a_file_comes_right_before_it() {
        for name in ["10-bridge.conf", "10-bridge.json", "00-multus.conf", "a.b.conf", ".conf", "x.conflist"] {
            let stand_in = network(network(name).stand_in().file_name().unwrap().to_str().unwrap());
            assert!(stand_in.name() < name, "{stand_in:?}");
            assert!(stand_in.is_edited());
            assert_eq!(stand_in.stands_for(), Some(network(name).path), "{stand_in:?}");
        }
        let name = network("10-bridge.conf").stand_in();
        assert_eq!(name, Path::new("/etc/cni/net.d/10-bridge.00-underpass-conf.conflist"));
        assert_eq!(network("10-calico.conflist").stands_for(), None);
    }

    #[test]
    fn other_files_are_none_of_it() {
        for name in
            ["README", "calico-kubeconfig", "10-a.conflist.cilium_bak", ".underpass-Ab12cd", "a.conf~", "a.CONF", ""]
        {
            assert_eq!(Network::of(Path::new("/"), name, false), None, "{name}");
        }
    }
}
