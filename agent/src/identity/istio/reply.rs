//! The authority's answer.

use rustls::pki_types::{CertificateDer, pem::PemObject};

/// Most certificates in an answer: a chain, and a few roots.
const MAX_CERTIFICATES: usize = 64;

/// The chain, leaf first, and the roots.
pub(super) type Certificates = (Vec<CertificateDer<'static>>, Vec<CertificateDer<'static>>);

/// Takes an answer apart: the last element has every root, those before it are the chain, leaf first.
pub(super) fn certificates(elements: &[String]) -> Result<Certificates, String> {
    let [chain @ .., roots] = elements else { return Err("it is empty".into()) };
    if chain.is_empty() {
        return Err("it has one element; a leaf and, last, the roots are needed".into());
    }
    let (mut certificates, roots) = (all(chain)?, all(std::slice::from_ref(roots))?);
    if certificates.len() + roots.len() > MAX_CERTIFICATES {
        return Err(format!("more than {MAX_CERTIFICATES} certificates"));
    }
    // Some authorities put their root into the chain too: peers have it, or do not trust it.
    let mut first = true;
    certificates.retain(|c| std::mem::take(&mut first) || !roots.contains(c));
    Ok((certificates, roots))
}

fn all(elements: &[String]) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut certificates = Vec::new();
    for element in elements {
        let before = certificates.len();
        for certificate in CertificateDer::pem_slice_iter(element.as_bytes()) {
            certificates.push(certificate.map_err(|e| format!("not PEM: {e}"))?);
        }
        if certificates.len() == before {
            return Err("an element without certificate".into());
        }
    }
    Ok(certificates)
}
