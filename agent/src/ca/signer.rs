//! Signs: a key, its certificate, and the roots that belong to it.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{KeyPair, PublicKeyData, SubjectPublicKeyInfo};
use rustls::{
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use crate::{
    identity::{
        Leaf, Svid,
        authority::{self, Authority, pem_of_ders},
    },
    mesh::SpiffeId,
};

/// Most certificates in a chain or a bundle of roots.
const MAX_CERTIFICATES: usize = 32;

/// What signs. No `Debug`: it holds a key.
pub(super) struct Signer {
    key: KeyPair,
    /// Whose key it is.
    certificate: CertificateDer<'static>,
    /// What peers need between a leaf and a root: `certificate` and what is above it; empty when it is a root.
    intermediates: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
}

/// A signed workload certificate.
pub(super) struct Signed {
    /// PEM: leaf, then each intermediate, then all roots as one.
    pub(super) chain: Vec<String>,
    pub(super) serial: String,
    pub(super) not_after: SystemTime,
}

impl Signer {
    /// The authority's signing root.
    pub(super) fn of_authority(authority: &Authority) -> Result<Self, String> {
        let root = authority.signing();
        let key = PrivatePkcs8KeyDer::from(authority.key().serialize_der());
        Ok(Self {
            key: KeyPair::try_from(&key).map_err(|e| e.to_string())?,
            certificate: root.der.clone(),
            intermediates: Vec::new(),
            roots: authority.roots().iter().map(|root| root.der.clone()).collect(),
            not_after: root.not_after,
        })
    }

    /// Somebody else's: a CA certificate with what is between it and the roots, its key, the roots. Errors name the part
    /// as cert-manager's Secrets do.
    pub(super) fn of_pem(chain: &[u8], key: &[u8], roots: &[u8]) -> Result<Self, String> {
        let chain = certificates("tls.crt", chain)?;
        let roots = certificates("ca.crt", roots)?;
        let key = std::str::from_utf8(key).map_err(|e| e.to_string());
        let key = key.and_then(|key| KeyPair::from_pem(key).map_err(|e| e.to_string()));
        let key = key.map_err(|e| format!("tls.key: {e}; it must be a private key in PEM"))?;
        let certificate = chain[0].clone();
        let not_after = {
            let (_, parsed) = X509Certificate::from_der(&certificate).map_err(|e| format!("tls.crt: {e}"))?;
            if !parsed.basic_constraints().ok().flatten().is_some_and(|c| c.value.ca) {
                return Err("tls.crt: it is no CA certificate; with cert-manager, set isCA: true".into());
            }
            if parsed.public_key().raw != key.subject_public_key_info() {
                return Err("tls.key: it is not the key of tls.crt; replace both together".into());
            }
            Leaf::end_of(&parsed)
        };
        let intermediates = chain.into_iter().filter(|c| !roots.contains(c)).collect();
        let signer = Self { key, certificate, intermediates, roots, not_after };
        signer.prove().map_err(|e| format!("tls.crt: what it signs is not accepted with the roots in ca.crt: {e}"))?;
        Ok(signer)
    }

    /// Peers that trust `self`'s roots accept what it signs: chain, usages, path length, dates.
    fn prove(&self) -> Result<(), String> {
        let now = SystemTime::now();
        let identity: SpiffeId = "spiffe://probe/ns/probe/sa/probe".parse().map_err(|e| format!("{e}"))?;
        let key = KeyPair::generate().map_err(|e| e.to_string())?;
        let params = authority::workload(&identity, Duration::from_mins(1), now, self.not_after);
        let params = params.map_err(|e| e.to_string())?;
        let leaf = params.signed_by(&key, &self.issuer()?).map_err(|e| e.to_string())?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Svid::assemble(&identity, self.with_intermediates(leaf.der()), key, &self.roots)?.verify(now)
    }

    /// A certificate for `identity`, whoever asks: the caller has decided. Never outlives the signer.
    pub(super) fn sign(
        &self,
        identity: &SpiffeId,
        key: &SubjectPublicKeyInfo,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Signed, String> {
        if self.not_after <= now {
            return Err("the signing certificate has expired; replace it".into());
        }
        let params = authority::workload(identity, lifetime, now, self.not_after).map_err(|e| e.to_string())?;
        let leaf = params.signed_by(key, &self.issuer()?).map_err(|e| e.to_string())?;
        let read = Leaf::parse(leaf.der())?;
        let mut chain: Vec<String> = self.with_intermediates(leaf.der()).iter().map(|c| pem_of_ders([c])).collect();
        chain.push(self.roots_pem());
        Ok(Signed { chain, serial: read.serial, not_after: read.not_after })
    }

    /// A certificate for this server itself, and when it ends.
    pub(super) fn serving(
        &self,
        names: &[String],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<(CertifiedKey, SystemTime), String> {
        let key = KeyPair::generate().map_err(|e| e.to_string())?;
        let params = authority::server(names, lifetime, now, self.not_after).map_err(|e| e.to_string())?;
        let leaf = params.signed_by(&key, &self.issuer()?).map_err(|e| e.to_string())?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let chain = self.with_intermediates(leaf.der());
        let certified =
            CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider()).map_err(|e| e.to_string())?;
        Ok((certified, (now + lifetime).min(self.not_after)))
    }

    /// Every root that is trusted, PEM.
    pub(super) fn roots_pem(&self) -> String {
        pem_of_ders(&self.roots)
    }

    /// Every root that is trusted.
    pub(super) fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// When the signing certificate ends.
    pub(super) fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Do both sign with the same certificate and distribute the same roots?
    pub(super) fn same(&self, other: &Self) -> bool {
        self.certificate == other.certificate && self.intermediates == other.intermediates && self.roots == other.roots
    }

    /// The same, with more roots to trust.
    pub(super) fn trusting(&self, others: &[CertificateDer<'static>]) -> Result<Self, String> {
        let key = PrivatePkcs8KeyDer::from(self.key.serialize_der());
        let mut roots: Vec<_> = others.to_vec();
        roots.extend(self.roots.iter().filter(|root| !others.contains(root)).cloned());
        Ok(Self {
            key: KeyPair::try_from(&key).map_err(|e| e.to_string())?,
            certificate: self.certificate.clone(),
            intermediates: self.intermediates.clone(),
            roots,
            not_after: self.not_after,
        })
    }

    fn issuer(&self) -> Result<rcgen::Issuer<'static, &KeyPair>, String> {
        rcgen::Issuer::from_ca_cert_der(&self.certificate, &self.key).map_err(|e| e.to_string())
    }

    fn with_intermediates(&self, leaf: &CertificateDer<'static>) -> Vec<CertificateDer<'static>> {
        std::iter::once(leaf).chain(&self.intermediates).cloned().collect()
    }
}

fn certificates(part: &str, text: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).take(MAX_CERTIFICATES + 1).collect();
    let all = all.map_err(|e| format!("{part}: {e}; it must be certificates in PEM"))?;
    if all.is_empty() || all.len() > MAX_CERTIFICATES {
        return Err(format!("{part}: {} certificates; 1 to {MAX_CERTIFICATES} are needed", all.len()));
    }
    Ok(all)
}

/// Shared by whoever signs.
pub(super) type Current = Option<Arc<Signer>>;
