//! A certificate authority without a place to live: what its roots are, when they change, and how a leaf looks.
//!
//! The embedded CA keeps it in a directory, `underpass ca` in a Secret that its replicas share; both persist what
//! [`Authority`] says has to be persisted, one [`Step`] at a time. Nothing here reads a clock, a file or the network.
//!
//! A root's life: it is distributed and does not sign (one overlap), it signs, and it stays trusted beside the next
//! one until nothing that it signed can be valid any more.

mod leaf;
mod root;
mod state;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub(crate) use leaf::{BACKDATE, serial, server, workload};
pub(crate) use root::{Root, pem_of, pem_of_ders};
pub(crate) use state::{Authority, Pem, Step};

/// Validity of a root when nothing else is said.
pub(crate) const ROOT_VALIDITY: Duration = Duration::from_hours(10 * 365 * 24);
/// A root is replaced when less than this is left of it.
pub(crate) const ROOT_REPLACED_BEFORE: Duration = Duration::from_hours(365 * 24);
/// Shortest lifetime of a leaf: dates in certificates have a resolution of a second.
pub(crate) const MIN_LIFETIME: Duration = Duration::from_secs(2);

/// What an authority is told.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    /// Name of new roots: organisation.
    pub(crate) organisation: &'static str,
    /// Name of new roots: first word of the common name.
    pub(crate) common_name: String,
    /// Longest lifetime of a leaf. Also how long a new root is only distributed: everybody has then asked for
    /// everything again at least once.
    pub(crate) lifetime: Duration,
    /// Validity of new roots.
    pub(crate) root_validity: Duration,
    /// A root with less left than this is replaced.
    pub(crate) replaced_before: Duration,
}

/// Which part cannot be used, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{part}: {reason}")]
pub(crate) struct Broken {
    /// Which part.
    pub(crate) part: Part,
    /// What is wrong and what to do.
    pub(crate) reason: String,
}

impl Broken {
    fn new(part: Part, reason: impl Into<String>) -> Self {
        Self { part, reason: reason.into() }
    }
}

/// The parts that are persisted, named as their files and Secret keys are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Every root that is trusted, oldest first.
    Roots,
    /// The key that signs, of one of the roots.
    Key,
    /// During a rotation, the key of the newest root.
    NextKey,
}

impl Part {
    /// File name and Secret key.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Roots => "ca.crt",
            Self::Key => "ca.key",
            Self::NextKey => "next.key",
        }
    }
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
