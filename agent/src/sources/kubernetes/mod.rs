//! The `kubernetes` source: pods, services, endpoint slices, namespaces and this node out of the Kubernetes API, and Istio's
//! `AuthorizationPolicy` and `PeerAuthentication` where their CRDs exist.
//!
//! Every kind has a watch ([`watch`], [`presence`]) whose objects are cut down to what is needed
//! ([`objects`], [`read`], [`records`]). One owner ([`source`]) keeps them ([`cluster`], [`table`])
//! and compiles snapshots ([`compile`]) out of all that is known: who is in the mesh
//! ([`enrolment`], [`annotations`]), who has an address that several claim ([`disputes`]), where
//! this node's pods are ([`finder`]), how plaintext is met ([`modes`]), which endpoints are used
//! ([`services`]). Of a snapshot only what a change concerns is made again ([`wiring`]). What was
//! known is kept on disk ([`saved`]) for a start without the API server.
//!
//! `docs/kubernetes.md` says what it means for users.

mod annotations;
mod attachments;
mod cluster;
mod compile;
mod disputes;
mod enrolment;
mod finder;
mod holdings;
mod index;
mod leaving;
pub mod manifests;
mod modes;
mod names;
mod objects;
mod pods;
mod policies;
mod presence;
mod problems;
mod projection;
mod read;
mod records;
mod saved;
mod services;
mod source;
mod status;
mod table;
#[cfg(test)]
mod tests;
mod watch;
mod wiring;

use std::path::PathBuf;

pub use attachments::{Attachment, Attachments, Verdict};
pub use leaving::{Leaving, UNINSTALL};
pub(super) use saved::forget;
pub use source::{KubernetesSource, SourceError};
pub use status::{Kind, KindStatus, Problem, SourceStatus, Statuses};

/// How the API server is reached, and what the cluster is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubernetesConfig {
    /// A kubeconfig file; without one the pod's own service account is used.
    pub kubeconfig: Option<PathBuf>,
    /// Domain of the cluster's services, e.g. `cluster.local`.
    pub cluster_domain: String,
}
