//! What the agent leaves behind for the time when it does not run: which Kubernetes namespaces are in the mesh.
//!
//! The agent writes the file whenever that changes. The plugin reads it only when no agent takes its connection,
//! and lets a pod pass for nothing but a namespace that the file calls free.

use std::{collections::BTreeMap, io, path::Path};

use serde::{Deserialize, Serialize};

use crate::files::{self, Attributes, Snapshot};

/// Version of the file's format.
pub const VERSION: u32 = 1;
/// Largest file that is read, in bytes: names have at most 63 characters, so this is more than 200,000 of them.
const LIMIT: u64 = 16 << 20;

/// What happens to a namespace's new pods while no agent runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Treatment {
    /// They wait for the agent.
    Held,
    /// They start: no pod of the namespace is in the mesh.
    Free,
}

/// The file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Projection {
    /// [`VERSION`].
    pub version: u32,
    /// By name. A namespace that is not there is held.
    pub namespaces: BTreeMap<String, Treatment>,
}

impl Projection {
    /// A projection of this version.
    pub fn new(namespaces: BTreeMap<String, Treatment>) -> Self {
        Self { version: VERSION, namespaces }
    }

    /// Reads the file.
    ///
    /// # Errors
    /// What reading gives; `InvalidData` for anything but this version's format, with what was expected.
    pub fn read(path: &Path) -> io::Result<Self> {
        Self::parse(&Snapshot::take(path, LIMIT)?.bytes)
    }

    fn parse(bytes: &[u8]) -> io::Result<Self> {
        /// First, because another version may have changed everything else.
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
        let Head { version } =
            serde_json::from_slice(bytes).map_err(|error| invalid(format!("not a projection: {error}")))?;
        if version != VERSION {
            return Err(invalid(format!("version {version}, and only version {VERSION} is understood")));
        }
        serde_json::from_slice(bytes).map_err(|error| invalid(format!("not a projection: {error}")))
    }

    /// Replaces the file at once (mode 0644); its directory has to exist.
    ///
    /// # Errors
    /// What creating, writing and renaming give. The old file is then still there.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let bytes = serde_json::to_vec(self)?;
        files::replace(path, &bytes, Attributes { mode: 0o644, owner: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Projection {
        Projection::new([("shop".into(), Treatment::Held), ("batch".into(), Treatment::Free)].into())
    }

    #[test]
    fn what_was_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("enrolment.json");
        sample().write(&path).unwrap();
        sample().write(&path).unwrap();
        assert_eq!(Projection::read(&path).unwrap(), sample());
        let mode = std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions());
        assert_eq!(mode & 0o7777, 0o644);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn the_format_is_this() {
        let text = r#"{"version":1,"namespaces":{"batch":"free","shop":"held"}}"#;
        assert_eq!(serde_json::to_string(&sample()).unwrap(), text);
        assert_eq!(Projection::parse(text.as_bytes()).unwrap(), sample());
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "{",
            "[]",
            "null",
            "{}",
            r#"{"version":1}"#,
            r#"{"version":1,"namespaces":{"a":"perhaps"}}"#,
            r#"{"version":1,"namespaces":{"a":"free"}} x"#,
            r#"{"version":2,"namespaces":{"a":"free"}}"#,
        ] {
            assert_eq!(Projection::parse(text.as_bytes()).unwrap_err().kind(), io::ErrorKind::InvalidData, "{text}");
        }
        let error = Projection::parse(br#"{"version":2,"treatments":[]}"#).unwrap_err();
        assert_eq!(error.to_string(), "version 2, and only version 1 is understood");
    }

    #[test]
    fn a_file_without_end_is_not_read_to_its_end() {
        let error = Projection::read(Path::new("/dev/zero")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }
}
