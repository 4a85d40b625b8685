//! A certificate with its key and the roots that come with it.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{
    RootCertStore,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime},
    server::WebPkiClientVerifier,
    sign::CertifiedKey,
};
use x509_parser::{
    certificate::X509Certificate,
    extensions::GeneralName,
    prelude::{ASN1Time, FromDer},
};

use crate::mesh::SpiffeId;

/// Most certificates in one roots file; a mesh has one root, two during a rotation.
const MAX_ROOTS: usize = 64;

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

    /// Checks that peers with the same roots would accept it at `now`: signatures, dates and usages up to a root.
    pub(crate) fn verify(&self, now: SystemTime) -> Result<(), String> {
        let Some((leaf, intermediates)) = self.certified.cert.split_first() else {
            return Err("the chain is empty".into());
        };
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.roots), provider().into())
            .build()
            .map_err(|e| e.to_string())?
            .verify_client_cert(leaf, intermediates, UnixTime::since_unix_epoch(now))
            .map(|_| ())
            .map_err(|e| format!("the chain does not lead to one of the roots: {e}"))
    }

    /// Puts one together, checking that the parts belong to each other and to `identity`. The error says what is wrong
    /// and what to do.
    pub(crate) fn assemble(
        identity: &SpiffeId,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        roots: &[CertificateDer<'static>],
    ) -> Result<Self, String> {
        let first = chain.first().ok_or("the chain is empty; put the workload's certificate first")?;
        let leaf = Leaf::parse(first)?;
        if leaf.identity != *identity {
            return Err(format!("it was issued for {}; issue one whose URI SAN is {identity}", leaf.identity));
        }
        let (roots, roots_id) = trust(roots)?;
        let certified = CertifiedKey::from_der(chain, key, &provider())
            .map_err(|e| format!("the key does not fit the certificate ({e}); replace both together"))?;
        Ok(Self {
            identity: leaf.identity,
            certified: Arc::new(certified),
            roots: Arc::new(roots),
            roots_id,
            serial: leaf.serial,
            not_before: leaf.not_before,
            not_after: leaf.not_after,
        })
    }
}

/// What a leaf certificate says about its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// The one URI SAN.
    pub identity: SpiffeId,
    /// Serial number, hexadecimal.
    pub serial: String,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
}

impl Leaf {
    /// Reads a leaf by the rules of the X.509-SVID specification: exactly one URI SAN, no CA. Signature and dates are
    /// the caller's to check.
    pub fn parse(der: &[u8]) -> Result<Self, String> {
        let (rest, certificate) =
            X509Certificate::from_der(der).map_err(|e| format!("not an X.509 certificate: {e}"))?;
        if !rest.is_empty() {
            return Err("bytes behind the certificate".into());
        }
        let extension = |e: x509_parser::error::X509Error| format!("malformed extension: {e}");
        if certificate.basic_constraints().map_err(extension)?.is_some_and(|c| c.value.ca) {
            return Err("it is a CA certificate; a workload needs a leaf".into());
        }
        if certificate.key_usage().map_err(extension)?.is_some_and(|u| u.value.key_cert_sign()) {
            return Err("its key usage allows signing certificates; a workload needs a leaf".into());
        }
        let names = certificate.subject_alternative_name().map_err(extension)?;
        let mut uris = names.iter().flat_map(|n| &n.value.general_names).filter_map(|n| match n {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
        let uri = match (uris.next(), uris.next()) {
            (Some(uri), None) => uri,
            (None, _) => return Err("it has no URI SAN; a SPIFFE certificate has exactly one".into()),
            (Some(_), Some(_)) => return Err("it has several URI SANs; a SPIFFE certificate has exactly one".into()),
        };
        Ok(Self {
            identity: uri.parse().map_err(|e| format!("{e}"))?,
            serial: certificate.serial.to_str_radix(16),
            not_before: system_time(certificate.validity.not_before),
            not_after: system_time(certificate.validity.not_after),
        })
    }

    /// Is it valid at `now`?
    pub fn valid_at(&self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
    }

    /// End of any certificate's validity.
    pub(crate) fn end_of(certificate: &X509Certificate<'_>) -> SystemTime {
        system_time(certificate.validity.not_after)
    }
}

/// Dates before 1970 become 1970.
pub(super) fn system_time(time: ASN1Time) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
}

/// The trust store over `roots`, and its id.
fn trust(roots: &[CertificateDer<'static>]) -> Result<(RootCertStore, [u8; 32]), String> {
    if roots.is_empty() || roots.len() > MAX_ROOTS {
        return Err(format!("{} roots; list at least one and at most {MAX_ROOTS}", roots.len()));
    }
    let mut store = RootCertStore::empty();
    let mut sorted: Vec<&[u8]> = Vec::with_capacity(roots.len());
    for (i, root) in roots.iter().enumerate() {
        store.add(root.clone()).map_err(|e| format!("root {} is no usable CA certificate: {e}", i + 1))?;
        sorted.push(root);
    }
    sorted.sort_unstable();
    sorted.dedup();
    let mut hash = aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256
        .tls13()
        .expect("a TLS 1.3 suite")
        .common
        .hash_provider
        .start();
    for root in sorted {
        hash.update(&(root.len() as u64).to_be_bytes());
        hash.update(root);
    }
    let mut id = [0; 32];
    id.copy_from_slice(hash.finish().as_ref());
    Ok((store, id))
}

/// The crypto library everything uses.
fn provider() -> CryptoProvider {
    aws_lc_rs::default_provider()
}
