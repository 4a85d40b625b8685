//! An embedded certificate authority for one machine.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use futures_util::future::BoxFuture;
use rcgen::KeyPair;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::task::spawn_blocking;
use tracing::{info, warn};
use zeroize::Zeroizing;

use super::{
    IssueError, Issuer, Svid,
    authority::{self, Authority, Broken, MIN_LIFETIME, Part, Pem, ROOT_REPLACED_BEFORE, ROOT_VALIDITY, Rules, Step},
    directory::{Locked, refuse},
    watch::Watch,
};
use crate::mesh::{SpiffeId, TrustDomain};

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
    rules: Rules,
}

impl LocalIssuer {
    /// Opens the CA in `directory`, creating it if there is none. Certificates are for identities of `trust_domain` and
    /// valid for `lifetime` (at least 2 s).
    pub fn open(directory: &Path, trust_domain: &TrustDomain, lifetime: Duration) -> Result<Self, IssueError> {
        let ca = Ca {
            directory: directory.to_owned(),
            trust_domain: trust_domain.clone(),
            rules: Rules {
                organisation: "Underpass local CA",
                common_name: trust_domain.to_string(),
                lifetime: lifetime.max(MIN_LIFETIME),
                root_validity: ROOT_VALIDITY,
                replaced_before: ROOT_REPLACED_BEFORE,
            },
        };
        let locked = Locked::new(&ca.directory)?;
        ca.load(&locked)?;
        let watch = Watch::new().map_err(|e| refuse("watching CA directory", directory, e.to_string()))?;
        if let Some((path, e)) = watch.set(&BTreeSet::from([directory.to_owned()])).pop() {
            return Err(refuse("watching CA directory", &path, e.to_string()));
        }
        let reported = Mutex::new(locked.read(Part::Roots.name())?.unwrap_or_default().to_vec());
        drop(locked);
        Ok(Self { ca: Arc::new(ca), watch, reported })
    }

    /// Starts replacing the root: a new one is distributed at once, signs after one lifetime, and the old one is removed two
    /// lifetimes after that. Nothing happens while such a replacement is under way.
    pub fn rotate(&self) -> Result<(), IssueError> {
        let locked = Locked::new(&self.ca.directory)?;
        let mut authority = self.ca.load(&locked)?;
        let step = authority.rotate(&self.ca.rules, SystemTime::now()).map_err(|e| broken(&locked, e))?;
        step.map_or(Ok(()), |step| self.ca.persist(&locked, step, &authority.pem()))
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
                let Ok(roots) = tokio::fs::read(self.ca.directory.join(Part::Roots.name())).await else { continue };
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
        let authority = {
            let locked = Locked::new(&self.directory)?;
            self.load(&locked)?
        };
        let signer = authority.signing();
        let issuer =
            rcgen::Issuer::from_ca_cert_der(&signer.der, authority.key()).map_err(|e| signing(identity, &e))?;
        let key = KeyPair::generate().map_err(|e| signing(identity, &e))?;
        let params = authority::workload(identity, self.rules.lifetime, SystemTime::now(), signer.not_after);
        let params = params.map_err(|e| signing(identity, &e))?;
        let certificate = params.signed_by(&key, &issuer).map_err(|e| signing(identity, &e))?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let roots: Vec<_> = authority.roots().iter().map(|r| r.der.clone()).collect();
        Svid::assemble(identity, vec![certificate.der().clone()], key, &roots)
            .map_err(|reason| IssueError::Unusable { identity: identity.clone(), reason })
    }

    /// Reads the directory, creating the CA if it is empty and carrying on with a rotation where one is due.
    fn load(&self, locked: &Locked<'_>) -> Result<Authority, IssueError> {
        let now = SystemTime::now();
        let (roots, key) = (Part::Roots.name(), Part::Key.name());
        let mut authority = match (locked.read(roots)?, locked.read_key(key)?) {
            (None, None) => {
                let authority = Authority::create(&self.rules, now).map_err(|e| broken(locked, e))?;
                let pem = authority.pem();
                locked.replace(key, 0o600, pem.key.as_bytes())?;
                locked.replace(roots, 0o644, pem.roots.as_bytes())?;
                info!(directory = %self.directory.display(), "created a certificate authority");
                authority
            }
            (Some(roots), Some(key)) => {
                let next = locked.read_key(Part::NextKey.name())?;
                let next = next.as_ref().map(|next: &Zeroizing<Vec<u8>>| next.as_slice());
                Authority::parse(&roots, &key, next).map_err(|e| broken(locked, e))?
            }
            (Some(_), None) => {
                let remedy = "it is missing but ca.crt is there; restore it, or remove ca.crt to start a new CA";
                return Err(refuse("reading CA key", &locked.path(key), remedy));
            }
            (None, Some(_)) => {
                let remedy = "it is missing but ca.key is there; restore it, or remove ca.key to start a new CA";
                return Err(refuse("reading CA roots", &locked.path(roots), remedy));
            }
        };
        while let Some(step) = authority.step(&self.rules, now).map_err(|e| broken(locked, e))? {
            self.persist(locked, step, &authority.pem())?;
        }
        Ok(authority)
    }

    /// Writes what `step` changed, in an order that a crash in between does no harm to.
    fn persist(&self, locked: &Locked<'_>, step: Step, pem: &Pem) -> Result<(), IssueError> {
        let directory = self.directory.display();
        let (roots, key, next) = (Part::Roots.name(), Part::Key.name(), Part::NextKey.name());
        match step {
            Step::Undone => {
                locked.remove(next)?;
                warn!(%directory, "removed next.key: its root was never distributed");
            }
            Step::Distributing => {
                // In this order: a key without a root is an unfinished rotation, a root without a key could never sign.
                let key = pem.next.as_ref().map_or(&[][..], |key| key.as_bytes());
                locked.replace(next, 0o600, key)?;
                locked.replace(roots, 0o644, pem.roots.as_bytes())?;
                info!(%directory, "distributing a new root");
            }
            Step::Promoted => {
                locked.rename(next, key)?;
                info!(%directory, "the new root signs from now on");
            }
            Step::Retired(removed) => {
                locked.replace(roots, 0o644, pem.roots.as_bytes())?;
                info!(%directory, removed, "removed superseded roots");
            }
        }
        Ok(())
    }
}

fn signing(identity: &SpiffeId, reason: &dyn std::fmt::Display) -> IssueError {
    IssueError::Signing { identity: identity.clone(), reason: reason.to_string() }
}

fn broken(locked: &Locked<'_>, broken: Broken) -> IssueError {
    refuse("using CA file", &locked.path(broken.part.name()), broken.reason)
}
