//! rustls configurations per identity.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use rustls::{
    CipherSuite, ClientConfig, Error, ServerConfig,
    client::Resumption,
    crypto::{
        CryptoProvider,
        aws_lc_rs::{self, Ticketer, cipher_suite, kx_group},
    },
    pki_types::ServerName,
    server::ProducesTickets,
    sign::SingleCertAndKey,
    version::TLS13,
};
use tokio::sync::watch;

use super::{
    ALPN_NATIVE,
    ktls::Support,
    verify::{Accepted, ClientVerifier, Leaves, ServerVerifier},
};
use crate::{
    identity::{CertificateStore, Revocations, Svid},
    mesh::{SpiffeId, TrustDomain},
};

/// Tickets kept for one pair of identities; rustls keeps them in eights.
const TICKETS_PER_PAIR: usize = 8;
/// Tickets a server sends. Every connection uses one and brings one; as many as are shaking hands at the same time come into being by themselves,
/// because whoever finds none gets one by a full handshake. Each one more would cost a connection some 3 % of its instructions.
pub(super) const TICKETS_SENT: u8 = 1;
/// Pairs whose configurations are kept; beyond that they are built anew.
const MAX_CLIENTS: usize = 4096;
/// Local identities whose configurations are kept; more than a node has pods.
const MAX_SERVERS: usize = 4096;

/// A cipher suite of TLS 1.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// `TLS13_AES_128_GCM_SHA256`
    Aes128Gcm,
    /// `TLS13_AES_256_GCM_SHA384`
    Aes256Gcm,
    /// `TLS13_CHACHA20_POLY1305_SHA256`
    Chacha20Poly1305,
}

impl Suite {
    /// All of them, preferred first.
    pub const ALL: [Self; 3] = [Self::Aes128Gcm, Self::Aes256Gcm, Self::Chacha20Poly1305];

    /// The name of the cipher.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Aes128Gcm => "AES-128-GCM",
            Self::Aes256Gcm => "AES-256-GCM",
            Self::Chacha20Poly1305 => "ChaCha20-Poly1305",
        }
    }

    /// Which one a connection uses; `None` for one that is never offered.
    pub(super) fn of(suite: CipherSuite) -> Option<Self> {
        match suite {
            CipherSuite::TLS13_AES_128_GCM_SHA256 => Some(Self::Aes128Gcm),
            CipherSuite::TLS13_AES_256_GCM_SHA384 => Some(Self::Aes256Gcm),
            CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => Some(Self::Chacha20Poly1305),
            _ => None,
        }
    }
}

/// What can be chosen about the tunnel's TLS.
#[derive(Clone, Debug)]
pub struct TlsOptions {
    /// Cipher suites, preferred first. Not empty.
    pub suites: Vec<Suite>,
    /// What the kernel can do; where it can, it gets the keys.
    pub ktls: Support,
    /// Records that a key may protect before it is replaced, or, where it cannot be, before the connection ends. By default what its
    /// cipher can bear.
    pub records_per_key: Option<u64>,
    /// Whether sessions are resumed. Without it every connection has a full handshake.
    pub resumption: bool,
    /// Certificates that are not accepted any more.
    pub revocations: Arc<Revocations>,
}

impl Default for TlsOptions {
    fn default() -> Self {
        Self {
            suites: Suite::ALL.into(),
            ktls: Support::disabled(),
            records_per_key: None,
            resumption: true,
            revocations: Arc::default(),
        }
    }
}

impl TlsOptions {
    /// Leaves records to the kernel as far as it can: suites that it knows come first.
    pub fn with_ktls(support: Support) -> Self {
        let mut options = Self::default();
        if !support.suites.is_empty() {
            // Stable: among equals the order stays.
            options.suites.sort_by_key(|&suite| !support.covers(suite));
        }
        options.ktls = support;
        options
    }
}

/// Builds and caches configurations: one server configuration (with its ticket key) per local identity, one client
/// configuration (with its session store) per pair of identities. Rebuilt when the certificate changes; sessions
/// are dropped when the roots do.
pub struct TlsConfigs {
    certificates: Arc<CertificateStore>,
    changes: watch::Receiver<u64>,
    /// Which change of the store was last cleaned up after.
    cleaned: AtomicU64,
    trust_domain: TrustDomain,
    ktls: Support,
    records_per_key: Option<u64>,
    resumption: bool,
    provider: Arc<CryptoProvider>,
    clients: Cache<(SpiffeId, SpiffeId), ClientConfig>,
    servers: Cache<SpiffeId, Server>,
    leaves: Leaves,
    revocations: Arc<Revocations>,
}

struct Server {
    config: Arc<ServerConfig>,
    ticketer: Arc<dyn ProducesTickets>,
}

impl TlsConfigs {
    /// Configurations from `certificates`, accepting clients of `trust_domain`.
    pub fn new(certificates: Arc<CertificateStore>, trust_domain: TrustDomain) -> Arc<Self> {
        Self::with_options(certificates, trust_domain, &TlsOptions::default())
    }

    /// The same with other than the default options.
    pub fn with_options(
        certificates: Arc<CertificateStore>,
        trust_domain: TrustDomain,
        options: &TlsOptions,
    ) -> Arc<Self> {
        Arc::new(Self {
            changes: certificates.subscribe(),
            certificates,
            cleaned: AtomicU64::new(0),
            trust_domain,
            ktls: options.ktls.clone(),
            records_per_key: options.records_per_key,
            resumption: options.resumption,
            provider: provider(&options.suites),
            clients: Cache::new(MAX_CLIENTS),
            servers: Cache::new(MAX_SERVERS),
            leaves: Leaves::default(),
            revocations: Arc::clone(&options.revocations),
        })
    }

    /// For dialling `peer` as `local`. `None` without a valid certificate.
    pub fn client(&self, local: &SpiffeId, peer: &SpiffeId) -> Option<(Arc<ClientConfig>, Arc<Svid>)> {
        self.clean();
        let svid = self.certificates.current(local)?;
        let config = self.clients.get_or_build((local.clone(), peer.clone()), &svid, |_| {
            let mut config = client_config(&svid, peer, &self.provider)?;
            if !self.resumption {
                config.resumption = Resumption::disabled();
            }
            Ok(Arc::new(config))
        });
        built(config, local).map(|config| (config, svid))
    }

    /// For accepting as `local`. `None` without a valid certificate.
    pub fn server(&self, local: &SpiffeId) -> Option<(Arc<ServerConfig>, Arc<Svid>)> {
        self.clean();
        let svid = self.certificates.current(local)?;
        let server = self.servers.get_or_build(local.clone(), &svid, |old| {
            // A renewed certificate does not invalidate tickets: clients' certificates are judged on every connection.
            // Other roots do, because nobody verifies the chain of a client that resumes.
            let ticketer = match old {
                Some((old, server)) if old.roots_id == svid.roots_id => Arc::clone(&server.ticketer),
                _ => Ticketer::new()?,
            };
            let mut config = server_config(&svid, &self.trust_domain, Arc::clone(&ticketer), &self.provider)?;
            // Where the kernel does not have every cipher, ours is the order that matters; elsewhere the client may have such a kernel.
            config.ignore_client_order = !self.ktls.suites.is_empty() && self.ktls.suites.len() < Suite::ALL.len();
            if !self.resumption {
                config.send_tls13_tickets = 0;
            }
            Ok(Arc::new(Server { config: Arc::new(config), ticketer }))
        });
        built(server, local).map(|server| (Arc::clone(&server.config), svid))
    }

    /// Whose clients are accepted.
    pub(super) fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Peers' leaves.
    pub(super) fn leaves(&self) -> &Leaves {
        &self.leaves
    }

    /// Certificates that are not accepted any more.
    pub fn revocations(&self) -> &Arc<Revocations> {
        &self.revocations
    }

    /// What the kernel can do.
    pub fn ktls(&self) -> &Support {
        &self.ktls
    }

    pub(super) fn records_per_key(&self) -> Option<u64> {
        self.records_per_key
    }

    /// Once per change of the certificate store, forgets what no longer has a valid certificate.
    fn clean(&self) {
        let version = *self.changes.borrow();
        if self.cleaned.swap(version, Relaxed) == version {
            return;
        }
        let wanted = |id: &SpiffeId| self.certificates.current(id).is_some();
        self.clients.retain(|(local, _)| wanted(local));
        self.servers.retain(wanted);
    }
}

fn built<T>(config: Result<T, Error>, local: &SpiffeId) -> Option<T> {
    config.inspect_err(|error| tracing::error!(identity = %local, %error, "TLS configuration cannot be built")).ok()
}

/// The certificate, and what was built from it.
type Built<V> = (Arc<Svid>, Arc<V>);

/// Values built from a certificate, until it is replaced.
struct Cache<K, V> {
    capacity: usize,
    entries: Mutex<HashMap<K, Built<V>>>,
}

impl<K: Eq + Hash, V> Cache<K, V> {
    fn new(capacity: usize) -> Self {
        Self { capacity, entries: Mutex::default() }
    }

    /// The value for `key` and exactly this certificate; `build` sees the one it replaces.
    fn get_or_build(
        &self,
        key: K,
        svid: &Arc<Svid>,
        build: impl FnOnce(Option<&Built<V>>) -> Result<Arc<V>, Error>,
    ) -> Result<Arc<V>, Error> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let old = entries.get(&key);
        if let Some((of, value)) = old
            && Arc::ptr_eq(of, svid)
        {
            return Ok(Arc::clone(value));
        }
        let value = build(old)?;
        if old.is_none() && entries.len() >= self.capacity {
            entries.clear();
        }
        entries.insert(key, (Arc::clone(svid), Arc::clone(&value)));
        Ok(value)
    }

    fn retain(&self, keep: impl Fn(&K) -> bool) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).retain(|k, _| keep(k));
    }
}

/// aws-lc, cut down to what the tunnel speaks.
pub(super) fn provider(suites: &[Suite]) -> Arc<CryptoProvider> {
    let suite = |s: &Suite| match s {
        Suite::Aes128Gcm => cipher_suite::TLS13_AES_128_GCM_SHA256,
        Suite::Aes256Gcm => cipher_suite::TLS13_AES_256_GCM_SHA384,
        Suite::Chacha20Poly1305 => cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    };
    Arc::new(CryptoProvider {
        cipher_suites: suites.iter().map(suite).collect(),
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519],
        ..aws_lc_rs::default_provider()
    })
}

/// The key of a pair's session store, which holds one peer only; never sent (no SNI) and never verified.
pub(super) fn peer_name() -> ServerName<'static> {
    ServerName::try_from("peer.underpass.invalid").expect("a DNS name")
}

pub(super) fn client_config(
    svid: &Svid,
    peer: &SpiffeId,
    provider: &Arc<CryptoProvider>,
) -> Result<ClientConfig, Error> {
    let verifier = ServerVerifier {
        roots: Arc::clone(&svid.roots),
        accepted: Accepted::Exactly(peer.clone()),
        algorithms: provider.signature_verification_algorithms,
    };
    let mut config = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&svid.certified))));
    config.alpn_protocols = vec![ALPN_NATIVE.to_vec()];
    config.enable_sni = false;
    config.enable_early_data = false;
    config.enable_secret_extraction = true;
    config.resumption = Resumption::in_memory_sessions(TICKETS_PER_PAIR);
    Ok(config)
}

pub(super) fn server_config(
    svid: &Svid,
    trust_domain: &TrustDomain,
    ticketer: Arc<dyn ProducesTickets>,
    provider: &Arc<CryptoProvider>,
) -> Result<ServerConfig, Error> {
    let accepted = Accepted::Domain(trust_domain.clone());
    let verifier = ClientVerifier::new(Arc::clone(&svid.roots), accepted, Arc::clone(provider))?;
    let mut config = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&svid.certified))));
    config.alpn_protocols = vec![ALPN_NATIVE.to_vec()];
    config.enable_secret_extraction = true;
    config.max_early_data_size = 0;
    config.ticketer = ticketer;
    config.send_tls13_tickets = TICKETS_SENT.into();
    Ok(config)
}
