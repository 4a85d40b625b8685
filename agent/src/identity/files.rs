//! Certificates, keys and roots from PEM files, reloaded when they change.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use futures_util::future::BoxFuture;
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{self, PemObject},
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{task::spawn_blocking, time::timeout};
use tracing::warn;
use zeroize::Zeroizing;

use super::{IssueError, Issuer, Svid, watch::Watch};
use crate::mesh::{CertificateFiles, SpiffeId};

/// A directory that could not be watched is tried again, and its files are read again, this often.
const RETRY_WATCH: Duration = Duration::from_secs(10);
/// Largest PEM file read, bytes.
const MAX_FILE: u64 = 1024 * 1024;

/// Reads PEM files; see [`crate::mesh::CertificateFiles`].
pub struct FilesIssuer {
    files: Mutex<BTreeMap<SpiffeId, CertificateFiles>>,
    watch: Watch,
    all_watched: AtomicBool,
}

impl FilesIssuer {
    /// Reads these files when asked for their identities, and watches their directories.
    pub fn new(files: BTreeMap<SpiffeId, CertificateFiles>) -> Result<Self, IssueError> {
        let watch = Watch::new().map_err(|e| IssueError::File {
            action: "watching for changes of",
            path: "certificate files".into(),
            reason: format!("{e}; raise fs.inotify.max_user_instances if it is exhausted"),
        })?;
        let issuer = Self { files: Mutex::new(files), watch, all_watched: AtomicBool::new(false) };
        issuer.watch_directories(true);
        Ok(issuer)
    }

    /// Replaces which files belong to which identities. Everything is read again if that is a change.
    pub fn set(&self, files: BTreeMap<SpiffeId, CertificateFiles>) {
        let changed = {
            let mut current = self.files.lock().unwrap_or_else(PoisonError::into_inner);
            let changed = *current != files;
            *current = files;
            changed
        };
        if changed {
            self.watch_directories(true);
            self.watch.wake();
        }
    }

    /// Returns whether all directories are being watched.
    fn watch_directories(&self, log: bool) -> bool {
        let directories: BTreeSet<PathBuf> = {
            let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
            let all = files.values().flat_map(|f| [&f.certificate, &f.key, &f.roots]);
            all.map(|f| parent(f).to_owned()).collect()
        };
        let failed = self.watch.set(&directories);
        if log {
            for (directory, error) in &failed {
                warn!(directory = %directory.display(), %error, "cannot watch for changes; reading every 10 s instead");
            }
        }
        self.all_watched.store(failed.is_empty(), Relaxed);
        failed.is_empty()
    }
}

impl Issuer for FilesIssuer {
    fn name(&self) -> &'static str {
        "files"
    }

    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Svid, IssueError>> {
        Box::pin(async move {
            let files = self.files.lock().unwrap_or_else(PoisonError::into_inner).get(identity).cloned();
            let files = files.ok_or_else(|| IssueError::Unusable {
                identity: identity.clone(),
                reason: "no files are configured; list certificate, key and roots under the workload's `files`".into(),
            })?;
            let owner = identity.clone();
            let read = spawn_blocking(move || read(&owner, &files)).await;
            read.unwrap_or_else(|e| {
                Err(IssueError::Signing { identity: identity.clone(), reason: format!("reading its files: {e}") })
            })
        })
    }

    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let before = self.all_watched.load(Relaxed);
            match (before, self.watch_directories(false)) {
                // What happened before the watch began is not known.
                (false, true) => {}
                (true, true) => self.watch.changed().await,
                (_, false) => {
                    let _ = timeout(RETRY_WATCH, self.watch.changed()).await;
                }
            }
        })
    }
}

fn parent(file: &Path) -> &Path {
    match file.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    }
}

fn read(identity: &SpiffeId, files: &CertificateFiles) -> Result<Svid, IssueError> {
    let chain = certificates("reading certificate", &files.certificate)?;
    let roots = certificates("reading roots", &files.roots)?;
    let key = contents("reading key", &files.key)?;
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(|e| file_error("reading key", &files.key, pem_error(&e)))?;

    let unusable = |reason: String| IssueError::Unusable {
        identity: identity.clone(),
        reason: format!(
            "{reason} (certificate {}, key {}, roots {})",
            files.certificate.display(),
            files.key.display(),
            files.roots.display()
        ),
    };
    let svid = Svid::assemble(identity, chain, key, &roots).map_err(unusable)?;
    let now = SystemTime::now();
    if now >= svid.not_after {
        return Err(unusable(format!("expired at {}; replace certificate and key", date(svid.not_after))));
    }
    if now < svid.not_before {
        return Err(unusable(format!("not valid before {}; is this node's clock right?", date(svid.not_before))));
    }
    Ok(svid)
}

fn certificates(action: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, IssueError> {
    let text = contents(action, path)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let all = all.map_err(|e| file_error(action, path, pem_error(&e)))?;
    if all.is_empty() {
        return Err(file_error(action, path, "no PEM block CERTIFICATE in it; write certificates as PEM".into()));
    }
    Ok(all)
}

/// Zeroed when dropped: one of them is a key.
fn contents(action: &'static str, path: &Path) -> Result<Zeroizing<Vec<u8>>, IssueError> {
    let error = |e: std::io::Error| file_error(action, path, format!("{e}; create the file or correct its path"));
    let length = std::fs::metadata(path).map_err(error)?.len();
    if length > MAX_FILE {
        return Err(file_error(action, path, format!("{length} bytes, at most {MAX_FILE} are read")));
    }
    std::fs::read(path).map(Zeroizing::new).map_err(error)
}

fn pem_error(error: &pem::Error) -> String {
    format!("{error}; write it as PEM")
}

fn file_error(action: &'static str, path: &Path, reason: String) -> IssueError {
    IssueError::File { action, path: path.display().to_string(), reason }
}

fn date(time: SystemTime) -> String {
    OffsetDateTime::from(time).format(&Rfc3339).unwrap_or_else(|_| format!("{time:?}"))
}
