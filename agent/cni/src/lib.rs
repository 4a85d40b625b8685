//! `underpass-cni`: the last plugin of a node's CNI chain, and what installs it.
//!
//! When a runtime creates a pod, [`plugin`] asks the node's agent over [`protocol`] to capture the pod's network
//! namespace, and answers the runtime only when that is done: no container of the pod runs before. While no agent
//! runs, [`projection`] says which namespaces are none of the mesh's business; pods of all others wait.
//! [`install`] puts the plugin and its entry in place, [`conflist`] edits the file that the entry belongs in.

pub mod conflist;
pub mod descriptors;
pub mod install;
pub mod plugin;
pub mod projection;
pub mod protocol;

mod files;

pub use plugin::main;
