//! Revoked certificates: lists from a file, in force from the moment that the file has them.
//!
//! A list that was in force stays so until its authority signs a newer one: a file that is gone, empty, cut short or
//! written by somebody else revokes nothing back. Whose a list is, is found out by the roots of this node's certificates
//! and by the authorities between them and the certificates. A list of an authority that is not known (another cluster's
//! intermediate) is in force as it is: it concerns nobody but the authority's own certificates, and those are only met
//! together with the authority's certificate.

mod list;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    io::Read as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use rustls::pki_types::{CertificateDer, TrustAnchor};
use tokio::{sync::watch, time::timeout};
use tracing::{error, info, warn};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

pub use self::list::{List, parse};
use super::{CertificateStore, Svid, Watch};

/// How often the file is looked at where its directory cannot be watched, and otherwise just in case.
const LOOK: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// What tells a certificate from all others: who issued it, and its serial number. A chain has one for each.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Chain(Box<[Id]>);

/// The issuer's name in DER, and the serial number's bytes.
type Id = (Box<[u8]>, Box<[u8]>);

impl Chain {
    /// Of these certificates.
    pub fn of(certificates: &[CertificateDer<'_>]) -> Result<Self, String> {
        let id = |der: &CertificateDer<'_>| {
            let (_, certificate) =
                X509Certificate::from_der(der).map_err(|e| format!("not an X.509 certificate: {e}"))?;
            Ok((certificate.issuer().as_raw().into(), list::serial(certificate.raw_serial())))
        };
        certificates.iter().map(id).collect::<Result<_, String>>().map(Self)
    }
}

/// A list in force.
#[derive(Clone)]
struct InForce {
    list: Arc<List>,
    /// The key that it is signed with, of an authority that is known.
    signer: Option<Arc<[u8]>>,
}

/// By the authority's name. Authorities that follow each other may have one name, and a key and a list each.
type Lists = HashMap<Box<[u8]>, Vec<InForce>>;

/// Names of authorities, and their keys (`SubjectPublicKeyInfo`), in DER.
type Authorities = HashSet<(Vec<u8>, Arc<[u8]>)>;

/// The lists of one file. Without a file, nothing is revoked.
#[derive(Default)]
pub struct Revocations {
    file: Option<PathBuf>,
    lists: ArcSwap<Lists>,
    version: watch::Sender<u64>,
    /// What was said last, so that it is said once.
    said: Mutex<Vec<String>>,
}

impl std::fmt::Debug for Revocations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Revocations")
            .field("file", &self.file)
            .field("lists", &self.lists.load().len())
            .finish_non_exhaustive()
    }
}

/// The lists in force, for operators.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RevocationStatus {
    /// Where they are read.
    pub file: String,
    /// Lists in force.
    pub lists: usize,
    /// Certificates that they revoke.
    pub revoked: usize,
    /// What is wrong with the file or with a list; the lists above are in force all the same.
    pub problems: Vec<String>,
}

impl Revocations {
    /// With the lists of `file`, which has to be readable now. Errors say what is wrong and what to do.
    pub fn open(file: &Path) -> Result<Self, String> {
        let lists = read(file).map_err(|e| {
            format!("crlFile {}: {e}; write it before the agent starts, or take crlFile (CRL_PATH) out", file.display())
        })?;
        let revocations = Self { file: Some(file.to_owned()), ..Self::default() };
        // Who signed them is known when there are certificates.
        revocations.take(&lists, &Authorities::new());
        Ok(revocations)
    }

    /// Is a certificate of the chain revoked?
    pub fn revoke(&self, chain: &Chain) -> bool {
        let lists = self.lists.load();
        !lists.is_empty()
            && chain.0.iter().any(|(issuer, serial)| {
                lists.get(issuer).is_some_and(|all| all.iter().any(|in_force| in_force.list.serials.contains(serial)))
            })
    }

    /// Counts up whenever other certificates are revoked.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// What is in force, and what is wrong; `None` without a file.
    pub fn status(&self) -> Option<RevocationStatus> {
        let lists = self.lists.load();
        Some(RevocationStatus {
            file: self.file.as_ref()?.display().to_string(),
            lists: lists.values().flatten().count(),
            revoked: lists.values().flatten().map(|in_force| in_force.list.serials.len()).sum(),
            problems: self.said.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        })
    }

    /// Follows the file, and the authorities that `certificates` know, until dropped.
    pub async fn follow(self: Arc<Self>, certificates: Arc<CertificateStore>) {
        let Some(file) = &self.file else { return };
        let directory = file.parent().unwrap_or(Path::new("/")).to_owned();
        let watch = Watch::new().inspect_err(|error| warn!(%error, "crlFile is looked at twice a second instead")).ok();
        let mut changes = certificates.subscribe();
        loop {
            // Anew each time: a directory that was replaced is another one.
            let watched = watch.as_ref().is_some_and(|watch| watch.set(&[directory.clone()].into()).is_empty());
            let all = certificates.all();
            let (this, path) = (Arc::clone(&self), file.clone());
            let look = tokio::task::spawn_blocking(move || this.look(&path, &all)).await;
            if let Err(error) = look {
                error!(%error, "reading crlFile");
            }
            let limit = if watched { LOOK.1 } else { LOOK.0 };
            let changed = async {
                match &watch {
                    Some(watch) if watched => watch.changed().await,
                    _ => std::future::pending().await,
                }
            };
            let _ = timeout(limit, async {
                tokio::select! {
                    () = changed => {}
                    Ok(()) = changes.changed() => {}
                }
            })
            .await;
        }
    }

    /// Reads the file and puts in force what it has. Says what is wrong, once.
    fn look(&self, file: &Path, certificates: &HashMap<crate::mesh::SpiffeId, Arc<Svid>>) {
        let authorities = authorities(certificates.values());
        let mut problems = match read(file) {
            Ok(lists) => self.take(&lists, &authorities),
            Err(problem) => {
                self.take(&[], &authorities);
                vec![format!("{problem}; the lists before stay in force")]
            }
        };
        let now = SystemTime::now();
        for in_force in self.lists.load().values().flatten() {
            let name = &in_force.list.name;
            if in_force.list.next.is_some_and(|next| next < now) {
                problems.push(format!("the list of {name} should have been replaced by now; it stays in force"));
            }
        }
        for svid in certificates.values() {
            if Chain::of(&svid.certified.cert).is_ok_and(|chain| self.revoke(&chain)) {
                let identity = &svid.identity;
                problems.push(format!("the certificate of {identity} on this node is revoked; its peers refuse it"));
            }
        }
        problems.sort();
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        for problem in problems.iter().filter(|problem| !said.contains(problem)) {
            error!(file = %file.display(), "crlFile: {problem}");
        }
        *said = problems;
    }

    /// Puts the lists in force that may be. What is wrong with the others.
    fn take(&self, lists: &[Arc<List>], authorities: &Authorities) -> Vec<String> {
        let before = self.lists.load_full();
        let mut problems = Vec::new();
        let mut now = Lists::new();
        // Those in force, as far as nobody knows better by now.
        for in_force in before.values().flatten() {
            let signer = match (&in_force.signer, prove(&in_force.list, authorities)) {
                (None, Proof::Forged) => {
                    problems.push(format!("the list of {} is not signed by it, and is dropped", in_force.list.name));
                    continue;
                }
                (None, Proof::Signed(key)) => Some(key),
                (signer, _) => signer.clone(),
            };
            admit(&mut now, InForce { list: Arc::clone(&in_force.list), signer }, &mut Vec::new());
        }
        for list in lists {
            let signer = match prove(list, authorities) {
                Proof::Forged => {
                    problems.push(format!("the list of {} is not signed by it; what was in force stays so", list.name));
                    continue;
                }
                Proof::Signed(key) => Some(key),
                Proof::Unknown => None,
            };
            admit(&mut now, InForce { list: Arc::clone(list), signer }, &mut problems);
        }
        for in_force in now.values().flatten().filter(|_| !lists.is_empty()) {
            if !lists.iter().any(|list| list.issuer == in_force.list.issuer) {
                let name = &in_force.list.name;
                problems.push(format!("the file has no list of {name} any more; the one before stays in force"));
            }
        }
        let same = |a: &InForce, b: &InForce| a.signer == b.signer && a.list.same(&b.list);
        let alike = now.len() == before.len()
            && now.iter().all(|(issuer, all)| {
                let others = before.get(issuer).map(Vec::as_slice).unwrap_or_default();
                all.len() == others.len() && all.iter().all(|a| others.iter().any(|b| same(a, b)))
            });
        if !alike {
            let revoked: usize = now.values().flatten().map(|in_force| in_force.list.serials.len()).sum();
            info!(lists = now.values().flatten().count(), revoked, "certificate revocation lists in force");
            self.lists.store(Arc::new(now));
            self.version.send_modify(|version| *version += 1);
        }
        problems
    }
}

/// Puts a list into the place of the one before it, if it may have it.
fn admit(now: &mut Lists, new: InForce, problems: &mut Vec<String>) {
    let of_name = now.entry(new.list.issuer.clone()).or_default();
    let name = &new.list.name;
    if of_name.iter().any(|known| known.list.same(&new.list)) {
        return;
    }
    let alone = of_name.is_empty();
    match of_name.iter_mut().find(|known| known.signer == new.signer) {
        // Whoever can write the file can go back as long as nobody can tell who signed: at the start, that is.
        Some(known) if known.signer.is_some() && new.list.age < known.list.age => {
            problems.push(format!("the list of {name} is older than the one in force, which stays"));
        }
        Some(known) => *known = new,
        None if new.signer.is_none() && !alone => {
            problems.push(format!("nobody can tell whether {name} has signed its list; the one before stays in force"));
        }
        None => of_name.push(new),
    }
}

/// Who signed a list.
enum Proof {
    /// An authority of the name in the list, with this key.
    Signed(Arc<[u8]>),
    /// No authority of that name.
    Forged,
    /// No authority of that name is known.
    Unknown,
}

fn prove(list: &List, authorities: &Authorities) -> Proof {
    let mut named = authorities.iter().filter(|(name, _)| **name == *list.issuer).peekable();
    if named.peek().is_none() {
        return Proof::Unknown;
    }
    named.find(|(_, key)| list.is_signed_by(key)).map_or(Proof::Forged, |(_, key)| Proof::Signed(Arc::clone(key)))
}

/// The authorities behind these certificates: their roots, and what is between.
fn authorities<'a>(certificates: impl Iterator<Item = &'a Arc<Svid>>) -> Authorities {
    let mut authorities = Authorities::new();
    for svid in certificates {
        for TrustAnchor { subject, subject_public_key_info, .. } in &svid.roots.roots {
            authorities.insert((sequence(subject), sequence(subject_public_key_info).into()));
        }
        for der in svid.certified.cert.iter().skip(1) {
            if let Ok((_, authority)) = X509Certificate::from_der(der) {
                authorities.insert((authority.subject().as_raw().to_vec(), authority.public_key().raw.into()));
            }
        }
    }
    authorities
}

/// What webpki takes apart: the contents with their tag (SEQUENCE) and length, X.690 section 8.1.3.
fn sequence(contents: &[u8]) -> Vec<u8> {
    let mut out = vec![0x30];
    if let Ok(short @ ..0x80) = u8::try_from(contents.len()) {
        out.push(short);
    } else {
        let length = contents.len().to_be_bytes();
        let length: Vec<u8> = length.into_iter().skip_while(|byte| *byte == 0).collect();
        // At most eight bytes of length.
        out.push(0x80 | length.len() as u8);
        out.extend(length);
    }
    out.extend_from_slice(contents);
    out
}

fn read(file: &Path) -> Result<Vec<Arc<List>>, String> {
    let open = std::fs::File::open(file).map_err(|e| format!("cannot be read: {e}"))?;
    let mut bytes = Vec::new();
    open.take(list::MAX_FILE as u64 + 1).read_to_end(&mut bytes).map_err(|e| format!("cannot be read: {e}"))?;
    Ok(parse(&bytes)?.into_iter().map(Arc::new).collect())
}
