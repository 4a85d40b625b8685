//! Where the signing key comes from, and how it changes while the server runs.

mod directory;
mod foreign;
mod managed;
mod overlap;
mod secret;

use std::{path::PathBuf, sync::Arc, time::Duration};

use kube::Client;
use tokio::sync::watch;
use tracing::info;

use super::signer::{Current, Signer};
use crate::identity::authority::Rules;

/// First and longest pause after a failure.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(1));
/// Longest time for one request to the API server.
const API_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest sleep: due times are wall-clock times, and the wall clock may be set.
const MAX_SLEEP: Duration = Duration::from_mins(1);

/// Where the root comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootSource {
    /// A Secret that the replicas fill and rotate themselves.
    Managed {
        /// Its name, in the server's own namespace.
        secret: String,
    },
    /// A Secret that somebody else writes, such as cert-manager: `tls.crt`, `tls.key`, `ca.crt`.
    Foreign {
        /// Its name, in the server's own namespace.
        secret: String,
    },
    /// Files of the same names.
    Directory {
        /// The directory.
        path: PathBuf,
    },
}

/// Keeps `current` what `source` says, until it is dropped.
pub(super) async fn run(
    source: RootSource,
    client: Client,
    namespace: &str,
    rules: Rules,
    current: watch::Sender<Current>,
) {
    let to = Publish(current);
    match source {
        RootSource::Managed { secret } => {
            managed::run(&secret::Secrets::new(client, namespace, &secret), rules, &to).await;
        }
        RootSource::Foreign { secret } => {
            foreign::run(&secret::Secrets::new(client, namespace, &secret), rules.lifetime, &to).await;
        }
        RootSource::Directory { path } => directory::run(&path, rules.lifetime, &to).await,
    }
}

/// Where a signer goes to.
struct Publish(watch::Sender<Current>);

impl Publish {
    /// From now on this one signs. Nothing happens when that is so already.
    fn put(&self, signer: Signer) {
        let changed = self.0.send_if_modified(|current| {
            let same = current.as_ref().is_some_and(|old| old.same(&signer));
            if !same {
                *current = Some(Arc::new(signer));
            }
            !same
        });
        if changed && let Some(signer) = self.0.borrow().as_ref() {
            let until = humantime::format_rfc3339_seconds(signer.not_after());
            info!(roots = signer.roots().len(), %until, "signing");
        }
    }
}

/// Pause after this many failures in a row.
fn pause(failures: u32) -> Duration {
    RETRY.0.saturating_mul(1 << failures.min(16)).min(RETRY.1)
}
