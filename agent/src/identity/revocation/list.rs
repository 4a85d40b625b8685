//! One certificate revocation list (RFC 5280, section 5).

use std::{
    collections::HashSet,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::pki_types::{CertificateRevocationListDer, pem::PemObject as _};
use x509_parser::{
    extensions::ParsedExtension,
    prelude::FromDer,
    revocation_list::CertificateRevocationList,
    time::ASN1Time,
    x509::{SubjectPublicKeyInfo, X509Version},
};

/// Largest file of lists, bytes: an entry has some 40, so this is more than 300,000 of them.
pub const MAX_FILE: usize = 16 * 1024 * 1024;
/// Most lists in a file: a mesh has a root and an intermediate per cluster.
const MAX_LISTS: usize = 64;

/// Which certificates an authority has revoked.
pub struct List {
    /// Name of the authority, DER.
    pub(super) issuer: Box<[u8]>,
    /// The same for people.
    pub(super) name: String,
    /// Serial numbers, the bytes of the integers.
    pub(super) serials: HashSet<Box<[u8]>>,
    /// Grows with every list of an authority: its number (length and bytes), where it has one, and the time it was made at.
    pub(super) age: (usize, Vec<u8>, u64),
    /// When the authority promised the next one.
    pub(super) next: Option<SystemTime>,
    der: Box<[u8]>,
}

impl List {
    /// Is it signed with the key that goes with this `SubjectPublicKeyInfo` (DER)?
    pub(super) fn is_signed_by(&self, key: &[u8]) -> bool {
        let Ok((_, key)) = SubjectPublicKeyInfo::from_der(key) else { return false };
        CertificateRevocationList::from_der(&self.der).is_ok_and(|(_, list)| list.verify_signature(&key).is_ok())
    }

    /// Are both the same list?
    pub(super) fn same(&self, other: &Self) -> bool {
        self.der == other.der
    }

    /// Reads a list in DER. Lists that say something about a part of the certificates only, or about those of several
    /// authorities, are refused: they could be taken for more than they are.
    pub(super) fn parse(der: &[u8]) -> Result<Self, String> {
        let (rest, list) =
            CertificateRevocationList::from_der(der).map_err(|e| format!("not a certificate revocation list: {e}"))?;
        if !rest.is_empty() {
            return Err("bytes behind the list".into());
        }
        let tbs = &list.tbs_cert_list;
        if !matches!(tbs.version, None | Some(X509Version::V1 | X509Version::V2))
            || tbs.signature != list.signature_algorithm
        {
            return Err("it is of an unknown version, or names two signature algorithms".into());
        }
        let mut number = Vec::new();
        for extension in tbs.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::CRLNumber(n) => number = n.to_bytes_be(),
                ParsedExtension::IssuingDistributionPoint(_) => {
                    return Err("it covers a part of the certificates only; write a full list".into());
                }
                _ if extension.critical => {
                    return Err(format!("it has the unknown critical extension {}; write a full list", extension.oid));
                }
                _ => {}
            }
        }
        let mut serials = HashSet::with_capacity(tbs.revoked_certificates.len());
        for revoked in &tbs.revoked_certificates {
            if let Some(extension) = revoked.extensions().iter().find(|extension| extension.critical) {
                return Err(format!("an entry has the unknown critical extension {}", extension.oid));
            }
            serials.insert(serial(revoked.raw_serial()));
        }
        Ok(Self {
            issuer: tbs.issuer.as_raw().into(),
            name: tbs.issuer.to_string(),
            serials,
            age: (number.len(), number, seconds(tbs.this_update)),
            next: tbs.next_update.map(|next| UNIX_EPOCH + Duration::from_secs(seconds(next))),
            der: der.into(),
        })
    }
}

/// Reads every list of a PEM file, or the one of a file in DER. Errors say what is wrong with which list.
pub fn parse(bytes: &[u8]) -> Result<Vec<List>, String> {
    if bytes.len() > MAX_FILE {
        return Err(format!("{} bytes, at most {MAX_FILE} are read", bytes.len()));
    }
    // A SEQUENCE: DER.
    if bytes.first() == Some(&0x30) {
        return Ok(vec![List::parse(bytes)?]);
    }
    let mut lists = Vec::new();
    for der in CertificateRevocationListDer::pem_slice_iter(bytes) {
        let number = lists.len() + 1;
        if number > MAX_LISTS {
            return Err(format!("more than {MAX_LISTS} lists"));
        }
        let list = der.map_err(|e| e.to_string()).and_then(|der| List::parse(&der));
        lists.push(list.map_err(|e| format!("list {number}: {e}"))?);
    }
    if lists.is_empty() {
        return Err("no PEM block X509 CRL in it; write certificate revocation lists as PEM".into());
    }
    Ok(lists)
}

/// Serial numbers without the zero that keeps an integer positive, which some authorities forget.
pub(super) fn serial(bytes: &[u8]) -> Box<[u8]> {
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    bytes[zeros..].into()
}

fn seconds(time: ASN1Time) -> u64 {
    u64::try_from(time.timestamp()).unwrap_or_default()
}
