//! An embedded certificate authority for one machine.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use futures_util::future::BoxFuture;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use tokio::task::spawn_blocking;
use tracing::{info, warn};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};
use zeroize::Zeroizing;

use super::{
    IssueError, Issuer, Svid,
    certificate::system_time,
    directory::{KEY, Locked, NEXT_KEY, ROOTS, refuse},
    watch::Watch,
};
use crate::mesh::{SpiffeId, TrustDomain};

/// Validity of a root.
const ROOT_VALIDITY: Duration = Duration::from_hours(10 * 365 * 24);
/// A root is replaced when less than this is left of it.
const ROOT_REPLACED_BEFORE: Duration = Duration::from_hours(365 * 24);
/// Certificates start this long before they are issued, so that a peer whose clock is a little behind accepts them.
const BACKDATE: Duration = Duration::from_mins(1);
/// Shortest lifetime: dates in certificates have a resolution of a second.
const MIN_LIFETIME: Duration = Duration::from_secs(2);

/// The embedded CA: P-256, in a directory that several agents on one machine may share (with the same lifetime).
pub struct LocalIssuer {
    ca: Arc<Ca>,
    watch: Watch,
    /// `ca.crt` as [`Issuer::changed`] last reported it.
    reported: Mutex<Vec<u8>>,
}

struct Ca {
    directory: PathBuf,
    trust_domain: TrustDomain,
    lifetime: Duration,
}

/// What the directory holds.
struct Loaded {
    /// Oldest first.
    roots: Vec<Root>,
    key: KeyPair,
    /// Index of the root whose key signs.
    signing: usize,
}

#[derive(Clone)]
struct Root {
    der: CertificateDer<'static>,
    public_key: Vec<u8>,
    created: SystemTime,
    not_after: SystemTime,
}

impl LocalIssuer {
    /// Opens the CA in `directory`, creating it if there is none. Certificates are for identities of `trust_domain` and
    /// valid for `lifetime` (at least 2 s).
    pub fn open(directory: &Path, trust_domain: &TrustDomain, lifetime: Duration) -> Result<Self, IssueError> {
        let ca = Ca {
            directory: directory.to_owned(),
            trust_domain: trust_domain.clone(),
            lifetime: lifetime.max(MIN_LIFETIME),
        };
        let locked = Locked::new(&ca.directory)?;
        ca.load(&locked)?;
        let watch = Watch::new().map_err(|e| refuse("watching CA directory", directory, e.to_string()))?;
        if let Some((path, e)) = watch.set(&BTreeSet::from([directory.to_owned()])).pop() {
            return Err(refuse("watching CA directory", &path, e.to_string()));
        }
        let reported = Mutex::new(locked.read(ROOTS)?.unwrap_or_default().to_vec());
        drop(locked);
        Ok(Self { ca: Arc::new(ca), watch, reported })
    }

    /// Starts replacing the root: a new one is distributed at once, signs after one lifetime, and the old one is removed two
    /// lifetimes after that. Nothing happens while such a replacement is under way.
    pub fn rotate(&self) -> Result<(), IssueError> {
        let locked = Locked::new(&self.ca.directory)?;
        let loaded = self.ca.load(&locked)?;
        self.ca.rotate(&locked, loaded.roots)
    }
}

impl Issuer for LocalIssuer {
    fn name(&self) -> &'static str {
        "local"
    }

    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Svid, IssueError>> {
        let (ca, owner) = (Arc::clone(&self.ca), identity.clone());
        Box::pin(async move {
            // Waits for a lock and does public-key cryptography.
            spawn_blocking(move || ca.issue(&owner)).await.unwrap_or_else(|e| Err(signing(identity, &e)))
        })
    }

    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            loop {
                self.watch.changed().await;
                // A rename puts the file in place whole, so this needs no lock.
                let Ok(roots) = tokio::fs::read(self.ca.directory.join(ROOTS)).await else { continue };
                let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
                if *reported != roots {
                    *reported = roots;
                    return;
                }
            }
        })
    }
}

impl Ca {
    fn issue(&self, identity: &SpiffeId) -> Result<Svid, IssueError> {
        if *identity.trust_domain() != self.trust_domain {
            return Err(IssueError::Unusable {
                identity: identity.clone(),
                reason: format!("the local CA signs for trust domain {} only", self.trust_domain),
            });
        }
        let loaded = {
            let locked = Locked::new(&self.directory)?;
            self.load(&locked)?
        };
        let signer = &loaded.roots[loaded.signing];
        let issuer = rcgen::Issuer::from_ca_cert_der(&signer.der, &loaded.key).map_err(|e| signing(identity, &e))?;
        let key = KeyPair::generate().map_err(|e| signing(identity, &e))?;
        let params = self.leaf(identity, signer.not_after).map_err(|e| signing(identity, &e))?;
        let certificate = params.signed_by(&key, &issuer).map_err(|e| signing(identity, &e))?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let roots: Vec<_> = loaded.roots.iter().map(|r| r.der.clone()).collect();
        Svid::assemble(identity, vec![certificate.der().clone()], key, &roots)
            .map_err(|reason| IssueError::Unusable { identity: identity.clone(), reason })
    }

    fn leaf(&self, identity: &SpiffeId, not_after: SystemTime) -> Result<CertificateParams, rcgen::Error> {
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params.serial_number = Some(serial());
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = (now - BACKDATE.min(self.lifetime / 10)).into();
        params.not_after = (now + self.lifetime).min(not_after).into();
        Ok(params)
    }

    /// How long a new root is only distributed: every agent has then issued everything again at least once.
    fn overlap(&self) -> Duration {
        self.lifetime
    }

    /// Reads the directory, creating the CA if it is empty and carrying on with a rotation where one is due.
    fn load(&self, locked: &Locked<'_>) -> Result<Loaded, IssueError> {
        let (mut roots, key) = match (locked.read(ROOTS)?, locked.read_key(KEY)?) {
            (None, None) => {
                let (root, key) = self.new_root(locked)?;
                locked.replace(KEY, 0o600, Zeroizing::new(key.serialize_pem()).as_bytes())?;
                locked.replace(ROOTS, 0o644, pem_of(&[&root]).as_bytes())?;
                info!(directory = %self.directory.display(), "created a certificate authority");
                (vec![root], key)
            }
            (Some(roots), Some(key)) => (parse_roots(locked, &roots)?, parse_key(locked, KEY, &key)?),
            (Some(_), None) => {
                let remedy = "it is missing but ca.crt is there; restore it, or remove ca.crt to start a new CA";
                return Err(refuse("reading CA key", &locked.path(KEY), remedy));
            }
            (None, Some(_)) => {
                let remedy = "it is missing but ca.key is there; restore it, or remove ca.key to start a new CA";
                return Err(refuse("reading CA roots", &locked.path(ROOTS), remedy));
            }
        };
        let now = SystemTime::now();
        let key = self.promote(locked, &roots, key, now)?;
        let signing = position(&roots, &key).ok_or_else(|| {
            let remedy = "it is the key of none of the roots in ca.crt; restore both from one backup, or remove both to \
                          start a new CA";
            refuse("using CA key", &locked.path(KEY), remedy)
        })?;
        if roots[signing].not_after <= now {
            let remedy = "the signing root has expired; remove ca.crt and ca.key to start a new CA";
            return Err(refuse("using CA roots", &locked.path(ROOTS), remedy));
        }
        let signing = self.retire(locked, &mut roots, signing, now)?;
        if signing + 1 == roots.len() && roots[signing].not_after < now + ROOT_REPLACED_BEFORE {
            self.rotate(locked, roots.clone())?;
        }
        Ok(Loaded { roots, key, signing })
    }

    /// Once everybody knows the newest root, its key signs.
    fn promote(
        &self,
        locked: &Locked<'_>,
        roots: &[Root],
        key: KeyPair,
        now: SystemTime,
    ) -> Result<KeyPair, IssueError> {
        let Some(next) = locked.read_key(NEXT_KEY)? else { return Ok(key) };
        let next = parse_key(locked, NEXT_KEY, &next)?;
        match position(roots, &next) {
            None => {
                warn!("removing {}: its root was never distributed", locked.path(NEXT_KEY).display());
                locked.remove(NEXT_KEY)?;
                Ok(key)
            }
            Some(i) if now < roots[i].created + self.overlap() => Ok(key),
            Some(_) => {
                locked.rename(NEXT_KEY, KEY)?;
                info!(directory = %self.directory.display(), "the new root signs from now on");
                Ok(next)
            }
        }
    }

    /// Removes roots older than the signing one once nothing they signed can be valid any more.
    fn retire(
        &self,
        locked: &Locked<'_>,
        roots: &mut Vec<Root>,
        signing: usize,
        now: SystemTime,
    ) -> Result<usize, IssueError> {
        if signing == 0 || now < roots[signing].created + self.overlap() + 2 * self.lifetime {
            return Ok(signing);
        }
        let kept: Vec<&Root> = roots[signing..].iter().collect();
        locked.replace(ROOTS, 0o644, pem_of(&kept).as_bytes())?;
        roots.drain(..signing);
        info!(directory = %self.directory.display(), removed = signing, "removed superseded roots");
        Ok(0)
    }

    fn rotate(&self, locked: &Locked<'_>, mut roots: Vec<Root>) -> Result<(), IssueError> {
        if locked.read_key(NEXT_KEY)?.is_some() {
            return Ok(());
        }
        let (root, key) = self.new_root(locked)?;
        // In this order: a key without a root is an unfinished rotation, a root without a key could never sign.
        locked.replace(NEXT_KEY, 0o600, Zeroizing::new(key.serialize_pem()).as_bytes())?;
        roots.push(root);
        locked.replace(ROOTS, 0o644, pem_of(&roots.iter().collect::<Vec<_>>()).as_bytes())?;
        info!(directory = %self.directory.display(), "distributing a new root");
        Ok(())
    }

    fn new_root(&self, locked: &Locked<'_>) -> Result<(Root, KeyPair), IssueError> {
        let error = |e: rcgen::Error| refuse("creating a root for", &locked.path(ROOTS), e.to_string());
        let serial = serial();
        let mut name = DistinguishedName::new();
        // Unique, so that a chain is never tried with a root that only has the same name.
        let id = rand::random::<u32>();
        name.push(DnType::OrganizationName, "Underpass local CA");
        name.push(DnType::CommonName, format!("{} {id:08x}", self.trust_domain));
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params.serial_number = Some(serial);
        params.distinguished_name = name;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + ROOT_VALIDITY).into();
        let key = KeyPair::generate().map_err(error)?;
        let certificate = params.self_signed(&key).map_err(error)?;
        Ok((parse_root(locked, certificate.der().clone())?, key))
    }
}

fn signing(identity: &SpiffeId, reason: &dyn std::fmt::Display) -> IssueError {
    IssueError::Signing { identity: identity.clone(), reason: reason.to_string() }
}

/// 127 random bits: positive, as RFC 5280 (section 4.1.2.2) wants it.
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] &= 0x7f;
    SerialNumber::from_slice(&bytes)
}

fn position(roots: &[Root], key: &KeyPair) -> Option<usize> {
    roots.iter().position(|r| r.public_key == key.subject_public_key_info())
}

fn parse_roots(locked: &Locked<'_>, text: &[u8]) -> Result<Vec<Root>, IssueError> {
    let broken = |e: String| refuse("reading CA roots", &locked.path(ROOTS), format!("{e}; restore it from a backup"));
    let roots: Vec<_> =
        CertificateDer::pem_slice_iter(text).collect::<Result<_, _>>().map_err(|e| broken(e.to_string()))?;
    if roots.is_empty() {
        return Err(broken("no PEM block CERTIFICATE in it".into()));
    }
    roots.into_iter().map(|der| parse_root(locked, der)).collect()
}

fn parse_root(locked: &Locked<'_>, der: CertificateDer<'static>) -> Result<Root, IssueError> {
    let (public_key, created, not_after) = {
        let (_, certificate) = X509Certificate::from_der(&der).map_err(|e| {
            refuse("reading CA roots", &locked.path(ROOTS), format!("not a certificate: {e}; restore it from a backup"))
        })?;
        (
            certificate.public_key().raw.to_vec(),
            system_time(certificate.validity.not_before) + BACKDATE,
            system_time(certificate.validity.not_after),
        )
    };
    Ok(Root { der, public_key, created, not_after })
}

fn parse_key(locked: &Locked<'_>, name: &str, text: &[u8]) -> Result<KeyPair, IssueError> {
    std::str::from_utf8(text)
        .map_err(|e| e.to_string())
        .and_then(|t| KeyPair::from_pem(t).map_err(|e| e.to_string()))
        .map_err(|e| refuse("reading CA key", &locked.path(name), format!("{e}; restore it from a backup")))
}

fn pem_of(roots: &[&Root]) -> String {
    let blocks: Vec<_> = roots.iter().map(|r| pem::Pem::new("CERTIFICATE", r.der.to_vec())).collect();
    pem::encode_many_config(&blocks, pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF))
}
