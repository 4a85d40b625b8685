//! Keeps a valid certificate for every local identity.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::sync::watch;

use super::{Issuer, Svid};
use crate::mesh::SpiffeId;

/// Current certificates by identity. Renewed at half-life with jitter; a failed renewal keeps the old one while it is
/// valid and is retried with backoff.
pub struct CertificateStore {}

impl CertificateStore {
    /// A store fed by `issuer`.
    pub fn new(issuer: Arc<dyn Issuer>) -> Arc<Self> {
        let _ = issuer;
        todo!()
    }

    /// Sets which identities are kept; new ones are issued at once, others dropped.
    pub fn want(&self, identities: BTreeSet<SpiffeId>) {
        let _ = identities;
        todo!()
    }

    /// The current certificate, if there is one that is valid now.
    pub fn current(&self, identity: &SpiffeId) -> Option<Arc<Svid>> {
        let _ = identity;
        todo!()
    }

    /// Waits until `identity` has a certificate, at most `limit`.
    pub async fn wait_for(&self, identity: &SpiffeId, limit: Duration) -> Option<Arc<Svid>> {
        let _ = (identity, limit);
        todo!()
    }

    /// Counts up whenever any certificate changed.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        todo!()
    }

    /// Issues and renews until cancelled (dropped).
    pub async fn run(self: Arc<Self>) {
        todo!()
    }
}
