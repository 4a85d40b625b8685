//! Files that somebody else writes, such as a mounted Secret.

use std::{
    collections::BTreeSet,
    path::Path,
    time::{Duration, SystemTime},
};

use tokio::time::timeout;
use tracing::warn;
use zeroize::Zeroizing;

use super::{Publish, foreign::put, overlap::Overlap, pause};
use crate::{ca::signer::Signer, identity::Watch};

/// Largest file, bytes.
const MAX_FILE: u64 = 1024 * 1024;

pub(super) async fn run(path: &Path, lifetime: Duration, to: &Publish) {
    let watch =
        Watch::new().map_err(|error| warn!(%error, "files are not watched for changes, but read every minute")).ok();
    let mut overlap = Overlap::new(lifetime);
    let mut failures = 0;
    loop {
        let watched = watch.as_ref().is_some_and(|w| w.set(&BTreeSet::from([path.to_owned()])).is_empty());
        let mut limit = Duration::MAX;
        match read(path).await {
            Ok(signer) => {
                failures = 0;
                overlap.read(signer, SystemTime::now());
            }
            Err(reason) => {
                limit = pause(failures);
                failures += 1;
                warn!(directory = %path.display(), %reason, pause = ?limit, "the signing files cannot be used; what signed before goes on");
            }
        }
        limit = limit.min(put(&mut overlap, to));
        match &watch {
            // Whichever comes first: either way they are read again.
            Some(watch) if watched => drop(timeout(limit, watch.changed()).await),
            _ => tokio::time::sleep(limit).await,
        }
    }
}

async fn read(directory: &Path) -> Result<Signer, String> {
    let read = async |name: &str| {
        let path = directory.join(name);
        let error = |e: std::io::Error| format!("{}: {e}; mount it or correct --issuer-dir", path.display());
        let length = tokio::fs::metadata(&path).await.map_err(error)?.len();
        if length > MAX_FILE {
            return Err(format!("{}: {length} bytes, at most {MAX_FILE} are read", path.display()));
        }
        tokio::fs::read(&path).await.map(Zeroizing::new).map_err(error)
    };
    Signer::of_pem(&read("tls.crt").await?, &read("tls.key").await?, &read("ca.crt").await?)
}
