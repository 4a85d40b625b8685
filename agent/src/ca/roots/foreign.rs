//! A Secret that somebody else writes.

use std::time::{Duration, SystemTime};

use tracing::warn;

use super::{
    MAX_SLEEP, Publish,
    overlap::Overlap,
    pause,
    secret::{SecretError, Secrets, next},
};
use crate::ca::signer::Signer;

pub(super) async fn run(secrets: &Secrets, lifetime: Duration, to: &Publish) {
    let mut changes = secrets.changes();
    let mut overlap = Overlap::new(lifetime);
    let mut failures = 0;
    loop {
        let read = read(secrets).await.map(|signer| overlap.read(signer, SystemTime::now()));
        let retry = if let Err(error) = read {
            let pause = pause(failures);
            failures += 1;
            warn!(%error, ?pause, "the signing Secret cannot be used; what signed before goes on");
            pause
        } else {
            failures = 0;
            MAX_SLEEP
        };
        let limit = put(&mut overlap, to).min(retry);
        next(&mut changes, limit).await;
    }
}

/// Publishes what signs now; returns how long that holds.
pub(super) fn put(overlap: &mut Overlap, to: &Publish) -> Duration {
    let now = SystemTime::now();
    match overlap.at(now) {
        Ok(None) => MAX_SLEEP,
        Ok(Some((signer, until))) => {
            to.put(signer);
            until.map_or(MAX_SLEEP, |until| until.duration_since(now).unwrap_or_default()).min(MAX_SLEEP)
        }
        Err(reason) => {
            warn!(%reason, "the signing key cannot be used");
            MAX_SLEEP
        }
    }
}

async fn read(secrets: &Secrets) -> Result<Signer, SecretError> {
    let secret = secrets.get().await?;
    let secret = secret.ok_or_else(|| secrets.content("it is missing; whoever is to write it has not done so yet"))?;
    let data = secret.data.unwrap_or_default();
    let part = |name: &str| {
        let value = data.get(name).map(|v| v.0.as_slice()).filter(|v| !v.is_empty());
        value.ok_or_else(|| {
            secrets.content(format!(
                "{name} is missing; tls.crt, tls.key and ca.crt are needed, as cert-manager writes them"
            ))
        })
    };
    Signer::of_pem(part("tls.crt")?, part("tls.key")?, part("ca.crt")?).map_err(|e| secrets.content(e))
}
