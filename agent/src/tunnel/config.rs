//! rustls configurations per identity.

use std::sync::Arc;

use rustls::{ClientConfig, ServerConfig};

use crate::{
    identity::{CertificateStore, Svid},
    mesh::{SpiffeId, TrustDomain},
};

/// Builds and caches configurations: one server configuration (with its ticket key) per local identity, one client
/// configuration (with its session store) per pair of identities. Rebuilt when the certificate changes; sessions
/// are dropped when the roots do.
pub struct TlsConfigs {}

impl TlsConfigs {
    /// Configurations from `certificates`, accepting clients of `trust_domain`.
    pub fn new(certificates: Arc<CertificateStore>, trust_domain: TrustDomain) -> Arc<Self> {
        let _ = (certificates, trust_domain);
        todo!()
    }

    /// For dialling `peer` as `local`. `None` without a valid certificate.
    pub fn client(&self, local: &SpiffeId, peer: &SpiffeId) -> Option<(Arc<ClientConfig>, Arc<Svid>)> {
        let _ = (local, peer);
        todo!()
    }

    /// For accepting as `local`. `None` without a valid certificate.
    pub fn server(&self, local: &SpiffeId) -> Option<(Arc<ServerConfig>, Arc<Svid>)> {
        let _ = local;
        todo!()
    }
}
