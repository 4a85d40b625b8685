//! The `file` source: one YAML document describes the node.
//!
//! `docs/configuration.md` documents the schema field by field; its examples are parsed by the tests here.

mod access_log;
mod convert;
mod fields;
mod labels;
mod one_policy;
mod policies;
mod policy_values;
mod probes;
mod schema;
mod services;
mod source;
mod stats;
#[cfg(test)]
mod tests;
mod watch;
mod workloads;
mod yaml;

use std::path::{Path, PathBuf};

pub use one_policy::policy_of_spec;
pub use source::FileSource;
pub use stats::{ReloadStats, ReloadStatus};

use super::{kubernetes::KubernetesConfig, last_good::Copy};
use crate::mesh::{IstioCa, Snapshot};

/// The copy of the last accepted document.
const LAST_GOOD: Copy = Copy { name: "last-good.yaml", longest: MAX_DOCUMENT };

/// Removes the last good copy.
pub(super) fn forget(state_dir: &Path) -> std::io::Result<()> {
    LAST_GOOD.forget(state_dir)
}

/// Largest document that is read, in bytes.
pub const MAX_DOCUMENT: usize = 16 * 1024 * 1024;

/// Why a configuration was not accepted. The display form is complete: file, line, column, field, value, remedy.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// How the node gets certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IssuerConfig {
    /// The embedded CA.
    Local {
        /// Where its key and root are; two agents on one machine may share it.
        ca_dir: PathBuf,
        /// Lifetime of a certificate.
        lifetime: std::time::Duration,
    },
    /// PEM files named per workload.
    Files,
    /// An authority that speaks Istio's certificate service.
    Istio(IstioCa),
}

impl std::fmt::Display for IssuerConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Local { .. } => "local",
            Self::Files => "files",
            Self::Istio(_) => "istio",
        })
    }
}

/// What a configuration file says.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// The mesh.
    pub snapshot: Snapshot,
    /// The issuer; a change needs a restart.
    pub issuer: IssuerConfig,
    /// Certificate revocation lists; a change of the path needs a restart, one of the file does not.
    pub crl_file: Option<PathBuf>,
    /// Present when the mesh comes from the Kubernetes API; the snapshot then only has settings. A change needs a restart.
    pub kubernetes: Option<KubernetesConfig>,
}

/// Parses and checks a document. `name` is used in messages. Pure: reads no file.
pub fn parse(name: &str, text: &str) -> Result<NodeConfig, ConfigError> {
    parse_for(name, text, None)
}

/// The same for the node of this name, whatever name the document has: many nodes share one document.
pub fn parse_for(name: &str, text: &str, node: Option<&str>) -> Result<NodeConfig, ConfigError> {
    convert::node_config(name, &yaml::document(name, text)?, node)
}

/// Reads `path` and parses it. Unlike [`load`], neither uses nor writes a last good copy.
pub fn read(path: &Path, node: Option<&str>) -> Result<NodeConfig, ConfigError> {
    parse_for(&path.display().to_string(), &source::read(path)?, node)
}

/// The text of the last good copy in `state_dir`. One that somebody else could have written is refused.
pub fn last_good(state_dir: &Path) -> std::io::Result<String> {
    LAST_GOOD.read(state_dir)
}

/// Loads `path`; when it cannot be read or is invalid, the last good copy in `state_dir` (and says so). A valid file becomes the new last good copy.
///
/// [`FileSource::open`] does the same and can go on to watch the file.
pub fn load(path: &Path, state_dir: &Path) -> Result<NodeConfig, ConfigError> {
    FileSource::open(path, state_dir, None).map(|(_, config)| config)
}
