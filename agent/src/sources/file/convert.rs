//! From the schema to the model: everything that one field's type cannot say.

use std::{collections::BTreeMap, time::Duration};

use serde_saphyr::Spanned;

use super::{
    ConfigError, IssuerConfig, NodeConfig, access_log,
    fields::{Check, mode},
    policies::Policies,
    probes,
    schema::{API_VERSION, Document, Issuer, KIND, Mesh},
    services::Services,
    workloads::Workloads,
    yaml::quoted,
};
use crate::mesh::{MeshSettings, ModeDefaults, SnapshotBuilder, TrustDomain};

/// Namespace whose policies hold for the whole mesh when `mesh.rootNamespace` is absent: Istio's default.
const DEFAULT_ROOT_NAMESPACE: &str = "istio-system";
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
        probes: probes::settings(check, document)?,
        access_log: access_log::settings(check, &document.access_log)?,
    };

    let node = &document.node.value;
    let mut builder = SnapshotBuilder::new(node, trust_domain.clone(), settings);
    let modes = modes(check, document)?;
    let mut workloads = Workloads::new(check, node, &trust_domain, &issuer, modes);
    for (i, w) in document.workloads.iter().enumerate() {
        workloads.add(&mut builder, i, w)?;
    }
    let mut services = Services::new(check, &trust_domain, workloads.into_known());
    for (i, s) in document.services.iter().enumerate() {
        services.add(&mut builder, i, s)?;
    }
    let policies = Policies::new(check, root_namespace(check, &document.mesh)?);
    for (i, p) in document.policies.iter().enumerate() {
        policies.add(&mut builder, i, p)?;
    }
    Ok(NodeConfig { snapshot: builder.build(), issuer })
}

/// Modes of workloads that set none.
fn modes(check: Check<'_>, document: &Document) -> Result<ModeDefaults, ConfigError> {
    let mut modes = ModeDefaults { mesh: mode(document.mesh.mode), namespaces: BTreeMap::new() };
    for (i, namespace) in document.namespaces.iter().enumerate() {
        let field = format!("namespaces[{i}].name");
        check.name("namespace", &field, &namespace.name)?;
        let name = namespace.name.value.as_str();
        if modes.namespaces.insert(name.into(), mode(namespace.mode)).is_some() {
            return Err(check.wrong(&namespace.name, &field, format!("namespace {name} is listed twice; remove one")));
        }
    }
    Ok(modes)
}

fn root_namespace<'a>(check: Check<'_>, mesh: &'a Mesh) -> Result<&'a str, ConfigError> {
    let Some(name) = &mesh.root_namespace else { return Ok(DEFAULT_ROOT_NAMESPACE) };
    check.name("namespace", "mesh.rootNamespace", name)?;
    Ok(&name.value)
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
