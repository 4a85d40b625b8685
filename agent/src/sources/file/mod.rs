//! The `file` source: one YAML document describes the node.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::mesh::{MeshStore, Snapshot};

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
}

/// What a configuration file says.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// The mesh.
    pub snapshot: Snapshot,
    /// The issuer; a change needs a restart.
    pub issuer: IssuerConfig,
}

/// Parses and checks a document. `name` is used in messages. Pure: reads no file.
pub fn parse(name: &str, text: &str) -> Result<NodeConfig, ConfigError> {
    let _ = (name, text);
    todo!()
}

/// Loads `path`; when it cannot be read or is invalid, the last good copy in `state_dir` (and says so). A valid file becomes the new last good copy.
pub fn load(path: &Path, state_dir: &Path) -> Result<NodeConfig, ConfigError> {
    let _ = (path, state_dir);
    todo!()
}

/// Watches `path` and puts every valid change into `store`; an invalid one is logged and counted, the old one stays. Runs until dropped.
pub async fn watch(path: PathBuf, state_dir: PathBuf, store: Arc<MeshStore>) -> Result<(), ConfigError> {
    let _ = (path, state_dir, store);
    todo!()
}
