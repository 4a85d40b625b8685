//! One root certificate.

use std::time::SystemTime;

use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{super::certificate::system_time, BACKDATE, Broken, Part, Rules, serial};

/// A root certificate and what is needed of it all the time.
#[derive(Debug, Clone)]
pub(crate) struct Root {
    pub(crate) der: CertificateDer<'static>,
    /// `SubjectPublicKeyInfo`, DER.
    pub(crate) public_key: Vec<u8>,
    pub(crate) created: SystemTime,
    pub(crate) not_after: SystemTime,
}

impl Root {
    /// A new one, and its key.
    pub(super) fn create(rules: &Rules, now: SystemTime) -> Result<(Self, KeyPair), Broken> {
        let error = |e: rcgen::Error| Broken::new(Part::Roots, format!("creating a root: {e}"));
        let mut name = DistinguishedName::new();
        // Unique, so that a chain is never tried with a root that only has the same name.
        let id = rand::random::<u32>();
        name.push(DnType::OrganizationName, rules.organisation);
        name.push(DnType::CommonName, format!("{} {id:08x}", rules.common_name));
        let mut params = CertificateParams::default();
        params.serial_number = Some(serial());
        params.distinguished_name = name;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + rules.root_validity).into();
        let key = KeyPair::generate().map_err(error)?;
        let certificate = params.self_signed(&key).map_err(error)?;
        Ok((Self::parse(certificate.der().clone())?, key))
    }

    pub(super) fn parse(der: CertificateDer<'static>) -> Result<Self, Broken> {
        let (public_key, created, not_after) = {
            let (_, certificate) = X509Certificate::from_der(&der)
                .map_err(|e| Broken::new(Part::Roots, format!("not a certificate: {e}; restore it from a backup")))?;
            (
                certificate.public_key().raw.to_vec(),
                system_time(certificate.validity.not_before) + BACKDATE,
                system_time(certificate.validity.not_after),
            )
        };
        Ok(Self { der, public_key, created, not_after })
    }

    pub(super) fn parse_all(text: &[u8]) -> Result<Vec<Self>, Broken> {
        let broken = |e: String| Broken::new(Part::Roots, format!("{e}; restore it from a backup"));
        let roots: Vec<_> =
            CertificateDer::pem_slice_iter(text).collect::<Result<_, _>>().map_err(|e| broken(e.to_string()))?;
        if roots.is_empty() {
            return Err(broken("no PEM block CERTIFICATE in it".into()));
        }
        roots.into_iter().map(Self::parse).collect()
    }
}

/// `roots` as PEM.
pub(crate) fn pem_of(roots: &[Root]) -> String {
    pem_of_ders(roots.iter().map(|root| &root.der))
}

/// Certificates as PEM.
pub(crate) fn pem_of_ders<'a>(certificates: impl IntoIterator<Item = &'a CertificateDer<'static>>) -> String {
    let blocks: Vec<_> = certificates.into_iter().map(|der| pem::Pem::new("CERTIFICATE", der.to_vec())).collect();
    pem::encode_many_config(&blocks, pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF))
}
