//! What is taken from a signing request: a public key, and the proof that the requester has its private half.
//!
//! Nothing else. Names, usages and extensions in it are neither copied nor looked at; who the certificate is for is
//! decided before.

use pem::PemError;
use rcgen::{PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PublicKeyData, SubjectPublicKeyInfo};
use x509_parser::{certification_request::X509CertificationRequest, prelude::FromDer};

/// Longest request, bytes of PEM: one with a 4096-bit RSA key has about 1,700.
pub const MAX_CSR: usize = 8 * 1024;

/// Reads a request in PEM. The error says what is wrong with it.
pub fn public_key(text: &str) -> Result<SubjectPublicKeyInfo, String> {
    if text.len() > MAX_CSR {
        return Err(format!("the signing request has {} bytes, more than {MAX_CSR}", text.len()));
    }
    let block = pem::parse(text).map_err(|error| match error {
        // These quote as much as was sent.
        PemError::MismatchedTags(..) => "the signing request is not PEM: its BEGIN and END do not match".to_owned(),
        PemError::InvalidHeader(_) => "the signing request is not PEM: it has a header that is none".to_owned(),
        error => format!("the signing request is not PEM: {error}"),
    })?;
    if !matches!(block.tag(), "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST") {
        return Err("the PEM block is not a CERTIFICATE REQUEST".into());
    }
    let (rest, request) = X509CertificationRequest::from_der(block.contents())
        .map_err(|e| format!("the signing request is not PKCS #10: {e}"))?;
    if !rest.is_empty() {
        return Err("bytes behind the signing request".into());
    }
    // Before the signature: verifying one is the expensive part, and keys of other kinds are not even tried.
    let key = SubjectPublicKeyInfo::from_der(request.certification_request_info.subject_pki.raw)
        .map_err(|e| format!("the signing request's key is of an unknown kind: {e}"))?;
    if ![&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384].contains(&key.algorithm()) {
        return Err("the signing request's key is not ECDSA over P-256 or P-384".into());
    }
    request.verify_signature().map_err(|_| "the signing request is not signed with its own key".to_owned())?;
    Ok(key)
}
