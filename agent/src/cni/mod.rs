//! What the CNI plugin needs of the agent: it is installed on the node, and its questions are answered.
//!
//! The runtime calls the plugin (package `underpass-cni`) for every pod that starts, after the plugins that give the pod its
//! addresses. The plugin hands the pod's network namespace to this agent ([`server`]) and holds the pod's start until the pod is
//! captured, so that no process of it ever sends anything uncaptured. What was handed over outlives the agent ([`store`]).
//! [`installer`] puts the plugin on the node and keeps it in the node's configuration, whoever else rewrites that.

pub mod installer;
pub mod server;
mod store;

use std::path::{Path, PathBuf};

use underpass_cni::install::Entry;

use crate::sys::file::removed;

/// Directory below the agent's run directory for everything between agent and plugin.
const DIRECTORY: &str = "cni";

/// The socket that the plugin asks, by the agent's run directory.
pub fn socket(run_dir: &Path) -> PathBuf {
    run_dir.join(DIRECTORY).join("plugin.sock")
}

/// What the plugin reads when nobody answers, by the agent's run directory.
pub fn projection(run_dir: &Path) -> PathBuf {
    run_dir.join(DIRECTORY).join("enrolment.json")
}

/// The plugin's entry in the node's network configuration, by the agent's run directory. Pods of the exempt namespaces start without an
/// agent.
pub fn entry(run_dir: &Path, exempt_namespaces: Vec<String>) -> Entry {
    Entry { socket: socket(run_dir), projection: projection(run_dir), exempt_namespaces }
}

/// Removes everything that is between agent and plugin, for good.
pub fn remove(run_dir: &Path) -> std::io::Result<()> {
    removed(std::fs::remove_dir_all(run_dir.join(DIRECTORY)))
}
