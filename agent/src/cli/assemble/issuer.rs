//! Where certificates come from.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use tracing::warn;

use crate::{
    identity::{FilesIssuer, Issuer, IstioIssuer, Kept, LocalIssuer, Revocations},
    mesh::{CertificateFiles, Snapshot, SpiffeId, Workload},
    sources::file::{IssuerConfig, NodeConfig},
};

pub(super) type Prepare = Box<dyn Fn(&Snapshot) + Send + Sync>;

/// The issuer, and what it has to see of every snapshot.
pub(super) fn issuer(config: &NodeConfig, run_dir: &Path) -> anyhow::Result<(Arc<dyn Issuer>, Prepare)> {
    match &config.issuer {
        IssuerConfig::Local { ca_dir, lifetime } => {
            let issuer = LocalIssuer::open(ca_dir, &config.snapshot.trust_domain, *lifetime)?;
            Ok((Arc::new(issuer), Box::new(|_| {})))
        }
        IssuerConfig::Istio(ca) => {
            let kept = Kept::open(run_dir).unwrap_or_else(|error| {
                warn!(directory = %run_dir.display(), %error, "certificates are not kept for a restart");
                None
            });
            Ok((Arc::new(IstioIssuer::new(ca.clone())?.keeping(kept)), Box::new(|_| {})))
        }
        IssuerConfig::Files => {
            let issuer = Arc::new(FilesIssuer::new(certificate_files(&config.snapshot))?);
            let configured = Arc::clone(&issuer);
            Ok((issuer, Box::new(move |snapshot| configured.set(certificate_files(snapshot)))))
        }
    }
}

/// Revoked certificates: the configuration's file, else the option's. The embedded authority revokes nothing.
pub(super) fn revocations(config: &NodeConfig, option: Option<&Path>) -> anyhow::Result<Arc<Revocations>> {
    let local = matches!(config.issuer, IssuerConfig::Local { .. });
    let Some(file) = config.crl_file.as_deref().or(option.filter(|file| !file.as_os_str().is_empty())) else {
        return Ok(Arc::default());
    };
    anyhow::ensure!(
        !local,
        "--crl-file (CRL_PATH) {}: the issuer local revokes nothing; take it out, or use another issuer",
        file.display()
    );
    Ok(Arc::new(Revocations::open(file).map_err(anyhow::Error::msg)?))
}

fn certificate_files(snapshot: &Snapshot) -> BTreeMap<SpiffeId, CertificateFiles> {
    let files = |w: &Arc<Workload>| Some((w.identity.clone(), w.local.as_ref()?.files.clone()?));
    snapshot.local_workloads().filter_map(files).collect()
}
