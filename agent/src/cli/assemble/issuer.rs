//! Where certificates come from.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    identity::{FilesIssuer, Issuer, IstioIssuer, LocalIssuer},
    mesh::{CertificateFiles, Snapshot, SpiffeId, Workload},
    sources::file::{IssuerConfig, NodeConfig},
};

pub(super) type Prepare = Box<dyn Fn(&Snapshot) + Send + Sync>;

/// The issuer, and what it has to see of every snapshot.
pub(super) fn issuer(config: &NodeConfig) -> anyhow::Result<(Arc<dyn Issuer>, Prepare)> {
    match &config.issuer {
        IssuerConfig::Local { ca_dir, lifetime } => {
            let issuer = LocalIssuer::open(ca_dir, &config.snapshot.trust_domain, *lifetime)?;
            Ok((Arc::new(issuer), Box::new(|_| {})))
        }
        IssuerConfig::Istio(ca) => Ok((Arc::new(IstioIssuer::new(ca.clone())?), Box::new(|_| {}))),
        IssuerConfig::Files => {
            let issuer = Arc::new(FilesIssuer::new(certificate_files(&config.snapshot))?);
            let configured = Arc::clone(&issuer);
            Ok((issuer, Box::new(move |snapshot| configured.set(certificate_files(snapshot)))))
        }
    }
}

fn certificate_files(snapshot: &Snapshot) -> BTreeMap<SpiffeId, CertificateFiles> {
    let files = |w: &Arc<Workload>| Some((w.identity.clone(), w.local.as_ref()?.files.clone()?));
    snapshot.local_workloads().filter_map(files).collect()
}
