//! Certificates and keys on the node's tmpfs, for an agent that starts again while the authority is away.
//!
//! One file (0600) per identity in a directory (0700) below the run directory. Nothing is written to a directory on anything
//! but memory: a key must not reach a disk. What is read is checked as if a stranger had written it.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, OpenOptions, Permissions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nix::{
    libc::O_NOFOLLOW,
    sys::statfs::{FsType, TMPFS_MAGIC, statfs},
    unistd::geteuid,
};
use ring::digest::{SHA256, digest};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;
use tracing::{debug, info, warn};
use zeroize::Zeroizing;

use super::Svid;
use crate::{mesh::SpiffeId, sys::file::removed};

/// Directory below the run directory.
const DIRECTORY: &str = "certificates";
/// Version of the format; files in another one are removed.
const FORMAT: u32 = 1;
/// Largest file, bytes: a chain and a few roots take some ten thousand.
const MAX_FILE: u64 = 1024 * 1024;
/// Most certificates in a chain, or roots, of a file.
const MAX_CERTIFICATES: usize = 64;
/// More than the names and the identity in a file take, bytes.
const MAX_REST: usize = 4096;
/// The other file system in memory (`linux/magic.h`); it is never swapped.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// The directory.
#[derive(Debug, Clone)]
pub struct Kept(PathBuf);

/// What is kept of one identity. Everything in it is DER in base 64.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File<'a> {
    format: u32,
    identity: String,
    /// Who issued it, by [`digest`]: an authority that was replaced is asked again at once.
    authority: String,
    chain: Vec<String>,
    roots: Vec<String>,
    /// Borrowed, so that no copy of it is left behind.
    key: &'a str,
}

/// What was found.
pub struct Recalled {
    /// Valid now, and fit to be used.
    pub svid: Svid,
    /// It came from this authority as it is now, so it need not be renewed before its time.
    pub current: bool,
}

impl Kept {
    /// Below `run_dir`. `None` where that is on a disk, which is said once.
    pub fn open(run_dir: &Path) -> io::Result<Option<Self>> {
        let directory = run_dir.join(DIRECTORY);
        DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        let on = statfs(&directory)?.filesystem_type();
        if on != TMPFS_MAGIC && on != RAMFS_MAGIC {
            fs::remove_dir_all(&directory)?;
            info!(
                directory = %directory.display(),
                "it is not on a tmpfs, so keys are not kept: an agent that restarts while the authority is away has none"
            );
            return Ok(None);
        }
        Self::on(directory).map(Some)
    }

    /// In this directory, wherever it is.
    pub(crate) fn on(directory: PathBuf) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        // A symbolic link would lead to where no key may be.
        let meta = fs::symlink_metadata(&directory)?;
        if !meta.is_dir() || meta.uid() != geteuid().as_raw() {
            return Err(io::Error::other("it is no directory of this user's own; remove it"));
        }
        fs::set_permissions(&directory, Permissions::from_mode(0o700))?;
        Ok(Self(directory))
    }

    /// Keeps what was issued by `authority`. Not being able to is no reason not to use it.
    pub(super) fn keep(
        &self,
        identity: &SpiffeId,
        authority: &[u8],
        chain: &[CertificateDer<'_>],
        roots: &[CertificateDer<'_>],
        key: &[u8],
    ) {
        let encode = |all: &[CertificateDer<'_>]| all.iter().map(|der| STANDARD.encode(der)).collect();
        let key = Zeroizing::new(STANDARD.encode(key));
        let file = File {
            format: FORMAT,
            identity: identity.to_string(),
            authority: hex(authority),
            chain: encode(chain),
            roots: encode(roots),
            key: &key,
        };
        let write = || -> io::Result<()> {
            // With room for all of it: growing would leave parts of the key behind.
            let length =
                file.chain.iter().chain(&file.roots).map(|text| text.len() + 3).sum::<usize>() + file.key.len();
            let mut bytes = Zeroizing::new(Vec::with_capacity(length + MAX_REST));
            serde_json::to_writer(&mut *bytes, &file)?;
            let mut to = NamedTempFile::with_prefix_in(".", &self.0)?;
            to.write_all(&bytes)?;
            to.persist(self.file(identity))?;
            Ok(())
        };
        if let Err(error) = write() {
            warn!(%identity, directory = %self.0.display(), %error, "the certificate is not kept for a restart");
        }
    }

    /// What is kept of the identity, if it can be used at `now`. Anything else is removed.
    pub(super) fn recall(&self, identity: &SpiffeId, authority: &[u8], now: SystemTime) -> Option<Recalled> {
        let path = self.file(identity);
        match read(&path, identity, authority, now) {
            Ok(recalled) => {
                debug!(%identity, serial = recalled.svid.serial, "kept by an earlier agent");
                Some(recalled)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                warn!(%identity, file = %path.display(), %error, "the kept certificate is not used, and is removed");
                self.forget(identity);
                None
            }
        }
    }

    /// Removes what is kept of the identity.
    pub(super) fn forget(&self, identity: &SpiffeId) {
        remove(&self.file(identity));
    }

    /// Removes everything but what is kept of these.
    pub(super) fn retain(&self, wanted: &BTreeSet<SpiffeId>) {
        let wanted: BTreeSet<PathBuf> = wanted.iter().map(|identity| self.file(identity)).collect();
        for entry in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            if !wanted.contains(&entry.path()) {
                remove(&entry.path());
            }
        }
    }

    fn file(&self, identity: &SpiffeId) -> PathBuf {
        // An identity may be longer than a file's name.
        self.0.join(hex(identity.to_string().as_bytes()))
    }
}

/// Removes everything that is kept below the run directory.
pub fn remove_all(run_dir: &Path) -> io::Result<()> {
    removed(fs::remove_dir_all(run_dir.join(DIRECTORY)))
}

fn remove(path: &Path) {
    if let Err(error) = removed(fs::remove_file(path)) {
        warn!(file = %path.display(), %error, "a kept certificate cannot be removed");
    }
}

fn read(path: &Path, identity: &SpiffeId, authority: &[u8], now: SystemTime) -> io::Result<Recalled> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    let file = OpenOptions::new().read(true).custom_flags(O_NOFOLLOW).open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() || meta.uid() != geteuid().as_raw() || meta.mode() & 0o077 != 0 {
        return Err(invalid("it is no file that only this user can read".into()));
    }
    if meta.len() > MAX_FILE {
        return Err(invalid(format!("{} bytes, at most {MAX_FILE} are read", meta.len())));
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(meta.len()).unwrap_or_default() + 1));
    file.take(meta.len()).read_to_end(&mut bytes)?;
    parse(&bytes, identity, authority, now).map_err(invalid)
}

/// Reads a file's bytes: whose it is, whether the parts belong to each other, lead to the roots, and are valid at `now`.
///
/// # Errors
/// What is wrong with them.
pub fn parse(bytes: &[u8], identity: &SpiffeId, authority: &[u8], now: SystemTime) -> Result<Recalled, String> {
    let file: File<'_> = serde_json::from_slice(bytes).map_err(|e| format!("not of format {FORMAT}: {e}"))?;
    if file.format != FORMAT {
        return Err(format!("format {}, and only {FORMAT} is read", file.format));
    }
    let decode = |all: &[String]| -> Result<Vec<CertificateDer<'static>>, String> {
        if all.len() > MAX_CERTIFICATES {
            return Err(format!("more than {MAX_CERTIFICATES} certificates"));
        }
        all.iter().map(|text| STANDARD.decode(text).map(Into::into).map_err(|e| e.to_string())).collect()
    };
    if file.identity != identity.to_string() {
        return Err(format!("it is of {}", file.identity));
    }
    let (chain, roots) = (decode(&file.chain)?, decode(&file.roots)?);
    let key = STANDARD.decode(file.key).map_err(|_| "its key is not in base 64".to_owned())?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
    let svid = Svid::assemble(identity, chain, key, &roots)?;
    if !svid.valid_at(now) {
        return Err("it has ended, or not begun".into());
    }
    svid.verify(now)?;
    Ok(Recalled { svid, current: file.authority == hex(authority) })
}

/// SHA-256, in hexadecimal digits.
fn hex(of: &[u8]) -> String {
    let digest = digest(&SHA256, of);
    digest.as_ref().iter().fold(String::with_capacity(64), |mut hex, byte| {
        for half in [byte >> 4, byte & 15] {
            hex.push(char::from_digit(half.into(), 16).unwrap_or_default());
        }
        hex
    })
}
