//! Certificates: who issues them, when they are renewed, where they are found.
//!
//! Private keys live in memory and, for the embedded CA, under its `--ca-dir` (0600). They are never logged:
//! no type here that holds one derives `Debug`.

pub(crate) mod authority;
mod certificate;
mod description;
mod directory;
mod files;
pub mod istio;
pub mod kept;
mod local;
pub mod revocation;
mod schedule;
mod store;
#[cfg(test)]
mod tests;
mod waiting;
mod watch;

use std::collections::BTreeSet;

use futures_util::future::BoxFuture;

use crate::mesh::SpiffeId;

pub use certificate::{Leaf, Svid};
pub use description::Description;
pub use files::FilesIssuer;
pub use istio::IstioIssuer;
pub use kept::{Kept, Recalled};
pub use local::LocalIssuer;
pub use revocation::Revocations;
pub use store::CertificateStore;
pub(crate) use watch::Watch;

/// Why an identity has no certificate (yet).
#[derive(Debug, Clone, thiserror::Error)]
pub enum IssueError {
    /// A file could not be read or written.
    #[error("{action} {path}: {reason}")]
    File {
        /// What was tried, e.g. "reading certificate".
        action: &'static str,
        /// The file.
        path: String,
        /// What the system or parser said.
        reason: String,
    },
    /// The material does not fit: wrong SAN, key of another certificate, expired, no roots.
    #[error("certificate for {identity}: {reason}")]
    Unusable {
        /// For whom.
        identity: SpiffeId,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A certificate authority refused, could not be reached, or answered something that does not fit.
    #[error("asking {address} for {identity}: {reason}")]
    Authority {
        /// Where it is.
        address: String,
        /// For whom.
        identity: SpiffeId,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The crypto library refused.
    #[error("signing for {identity}: {reason}")]
    Signing {
        /// For whom.
        identity: SpiffeId,
        /// What it said.
        reason: String,
    },
}

/// Source of certificates.
pub trait Issuer: Send + Sync + 'static {
    /// Name in logs and `status`: `local`, `files`, `istio`.
    fn name(&self) -> &'static str;

    /// Issues (or reads) a certificate for `identity`. Bounded in time by the caller.
    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Svid, IssueError>>;

    /// What it has to have before it can issue anything, and does not have; for people.
    fn lacks(&self) -> Option<String> {
        None
    }

    /// What an earlier agent kept of the identity, if it is valid now. Reads files.
    fn recall(&self, _identity: &SpiffeId) -> Option<Recalled> {
        None
    }

    /// The identity is not wanted any more, or its certificate has ended: nothing is kept of it. Removes files.
    fn forget(&self, _identity: &SpiffeId) {}

    /// As above, of all identities but these.
    fn forget_others(&self, _wanted: &BTreeSet<SpiffeId>) {}

    /// Resolves when material may have changed outside of the renewal schedule (a file was rewritten, the CA's
    /// root was replaced); the store then issues everything again. Pending forever for issuers that never do.
    fn changed(&self) -> BoxFuture<'_, ()>;
}
