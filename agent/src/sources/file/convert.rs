//! From the schema to the model: everything that one field's type cannot say.

use std::time::Duration;

use serde_saphyr::Spanned;

use super::{
    ConfigError, IssuerConfig, NodeConfig,
    fields::Check,
    schema::{API_VERSION, Document, Issuer, KIND},
    services::Services,
    workloads::Workloads,
    yaml::quoted,
};
use crate::mesh::{MeshSettings, SnapshotBuilder, TrustDomain};

/// Lifetime of a certificate when `issuer.local.lifetime` is absent.
const DEFAULT_LIFETIME: Duration = Duration::from_hours(24);
/// Shortest lifetime: below it, renewal at half-life is faster than a handshake deadline allows.
const MIN_LIFETIME: Duration = Duration::from_secs(1);
/// Longest lifetime: one year of 365.25 days, as durations are written.
const MAX_LIFETIME: Duration = Duration::from_hours(8766);

/// Checks a document and turns it into a model.
pub(super) fn node_config(file: &str, document: &Document) -> Result<NodeConfig, ConfigError> {
    let check = Check { file };
    let exactly = |value: &Spanned<String>, field: &str, expected: &str| {
        if value.value == expected {
            return Ok(());
        }
        Err(check.wrong(value, field, format!("{} is not supported; write {expected}", quoted(&value.value))))
    };
    exactly(&document.api_version, "apiVersion", API_VERSION)?;
    exactly(&document.kind, "kind", KIND)?;
    check.name("node", "node", &document.node)?;
    let trust_domain: TrustDomain = check.parsed("trustDomain", &document.trust_domain)?;
    let issuer = issuer(check, &document.issuer)?;
    let settings = MeshSettings {
        cidrs: document
            .mesh
            .cidrs
            .iter()
            .enumerate()
            .map(|(i, c)| check.captured_network(&format!("mesh.cidrs[{i}]"), c))
            .collect::<Result<_, _>>()?,
        capture_all: document.mesh.capture_all,
        exclude: check.exclusions("mesh.exclude", &document.mesh.exclude)?,
    };

    let node = &document.node.value;
    let mut builder = SnapshotBuilder::new(node, trust_domain.clone(), settings);
    let mut workloads = Workloads::new(check, node, &trust_domain, &issuer, document.mesh.mode);
    for (i, w) in document.workloads.iter().enumerate() {
        workloads.add(&mut builder, i, w)?;
    }
    let mut services = Services::new(check, &trust_domain, workloads.into_known());
    for (i, s) in document.services.iter().enumerate() {
        services.add(&mut builder, i, s)?;
    }
    Ok(NodeConfig { snapshot: builder.build(), issuer })
}

fn issuer(check: Check<'_>, issuer: &Spanned<Issuer>) -> Result<IssuerConfig, ConfigError> {
    match (&issuer.value.local, &issuer.value.files) {
        (Some(local), None) => Ok(IssuerConfig::Local {
            ca_dir: check.path("issuer.local.caDir", &local.ca_dir)?,
            lifetime: local.lifetime.as_ref().map_or(Ok(DEFAULT_LIFETIME), |t| {
                check.duration("issuer.local.lifetime", t, MIN_LIFETIME, MAX_LIFETIME)
            })?,
        }),
        (None, Some(_)) => Ok(IssuerConfig::Files),
        (None, None) => {
            Err(check.wrong(issuer, "issuer", "no issuer is given; write one of local: {caDir: ...} or files: {}"))
        }
        (Some(_), Some(_)) => Err(check.wrong(issuer, "issuer", "local and files are both given; keep one")),
    }
}
