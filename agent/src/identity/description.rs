//! A certificate as people see it: everything but the key.

use std::{fmt::Write as _, time::SystemTime};

use x509_parser::{certificate::X509Certificate, prelude::FromDer, public_key::PublicKey, x509::X509Name};

use super::Svid;

/// What an [`Svid`] says, without anything secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Serial number, hexadecimal.
    pub serial: String,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
    /// Distinguished name of who signed it.
    pub issuer: String,
    /// Algorithm of its key and, where it has different sizes, its size in bits.
    pub key: String,
    /// Certificates in the chain, the leaf included.
    pub chain: usize,
    /// Distinguished names of the roots that peers are verified with.
    pub roots: Vec<String>,
    /// SHA-256 over the roots, hexadecimal.
    pub roots_sha256: String,
}

impl Svid {
    /// Describes the certificate. A field that cannot be read says so: the certificate was accepted, so this is no error.
    pub fn describe(&self) -> Description {
        let unknown = || "unknown".to_owned();
        let leaf = self.certified.cert.first().and_then(|der| X509Certificate::from_der(der).ok());
        let leaf = leaf.as_ref().map(|(_, leaf)| leaf);
        let name = |der: &[u8]| X509Name::from_der(der).map_or_else(|_| unknown(), |(_, name)| name.to_string());
        let mut roots: Vec<_> = self.roots.subjects().iter().map(|root| name(root.as_ref())).collect();
        roots.sort();
        let mut roots_sha256 = String::with_capacity(2 * self.roots_id.len());
        for byte in self.roots_id {
            let _ = write!(roots_sha256, "{byte:02x}");
        }
        Description {
            serial: self.serial.clone(),
            not_before: self.not_before,
            not_after: self.not_after,
            issuer: leaf.map_or_else(unknown, |leaf| leaf.issuer().to_string()),
            key: leaf.and_then(key).unwrap_or_else(unknown),
            chain: self.certified.cert.len(),
            roots,
            roots_sha256,
        }
    }
}

fn key(leaf: &X509Certificate<'_>) -> Option<String> {
    Some(match leaf.public_key().parsed().ok()? {
        PublicKey::EC(point) => format!("ECDSA {}", point.key_size()),
        PublicKey::RSA(key) => format!("RSA {}", key.key_size()),
        // Ed25519 and its like have no parameters; the object identifier names them.
        _ => leaf.public_key().algorithm.algorithm.to_id_string(),
    })
}
