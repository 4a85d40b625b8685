//! A certificate with its key and the roots that come with it.

use std::{sync::Arc, time::SystemTime};

use rustls::{RootCertStore, sign::CertifiedKey};

use crate::mesh::SpiffeId;

/// An X.509 SVID: what a workload proves itself with, and whom it trusts. No `Debug`: it holds a key.
#[derive(Clone)]
pub struct Svid {
    /// Whose it is.
    pub identity: SpiffeId,
    /// Chain (leaf first) and signing key, as rustls wants them.
    pub certified: Arc<CertifiedKey>,
    /// Roots for verifying peers. During a root rotation both old and new.
    pub roots: Arc<RootCertStore>,
    /// SHA-256 over the sorted roots: sessions are not resumed across a change.
    pub roots_id: [u8; 32],
    /// Serial number of the leaf, hexadecimal.
    pub serial: String,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
}

impl Svid {
    /// Is it valid at `now`?
    pub fn valid_at(&self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
    }
}
