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
use crate::mesh::{IstioCa, MeshSettings, ModeDefaults, SnapshotBuilder, TrustDomain};

/// Namespace whose policies hold for the whole mesh when `mesh.rootNamespace` is absent: Istio's default.
const DEFAULT_ROOT_NAMESPACE: &str = "istio-system";
/// Lifetime of a certificate when the issuer's `lifetime` is absent.
const DEFAULT_LIFETIME: Duration = Duration::from_hours(24);
/// Shortest lifetime: below it, renewal at half-life is faster than a handshake deadline allows.
const MIN_LIFETIME: Duration = Duration::from_secs(1);
/// Longest lifetime: one year of 365.25 days, as durations are written.
const MAX_LIFETIME: Duration = Duration::from_hours(8766);

/// Name of the cluster when `issuer.istio.clusterId` is absent: Istio's default.
const DEFAULT_CLUSTER: &str = "Kubernetes";
/// Longest name of a cluster, as long as a Kubernetes name.
const MAX_CLUSTER_ID: usize = 253;

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
    let lifetime = |field: &str, value: &Option<Spanned<String>>| {
        value.as_ref().map_or(Ok(DEFAULT_LIFETIME), |t| check.duration(field, t, MIN_LIFETIME, MAX_LIFETIME))
    };
    let Issuer { local, files, istio } = &issuer.value;
    match (local, files, istio) {
        (Some(local), None, None) => Ok(IssuerConfig::Local {
            ca_dir: check.path("issuer.local.caDir", &local.ca_dir)?,
            lifetime: lifetime("issuer.local.lifetime", &local.lifetime)?,
        }),
        (None, Some(_), None) => Ok(IssuerConfig::Files),
        (None, None, Some(istio)) => Ok(IssuerConfig::Istio(IstioCa {
            address: check.parsed("issuer.istio.address", &istio.address)?,
            root_file: check.path("issuer.istio.rootFile", &istio.root_file)?,
            token_file: check.path("issuer.istio.tokenFile", &istio.token_file)?,
            cluster_id: istio.cluster_id.as_ref().map_or(Ok(DEFAULT_CLUSTER.to_owned()), |id| cluster_id(check, id))?,
            lifetime: lifetime("issuer.istio.lifetime", &istio.lifetime)?,
            server_name: match &istio.server_name {
                Some(name) => {
                    check.name("server name", "issuer.istio.serverName", name)?;
                    Some(name.value.clone())
                }
                None => None,
            },
        })),
        (None, None, None) => {
            let problem = "no issuer is given; write one of local: {caDir: ...}, files: {} or istio: {address: ..., rootFile: ..., tokenFile: ...}";
            Err(check.wrong(issuer, "issuer", problem))
        }
        _ => {
            let given = [("local", local.is_some()), ("files", files.is_some()), ("istio", istio.is_some())];
            let given: Vec<_> = given.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
            Err(check.wrong(issuer, "issuer", format!("{} are given; keep one", given.join(" and "))))
        }
    }
}

/// A header's value: what Istio calls a cluster ID is a name chosen by people.
fn cluster_id(check: Check<'_>, id: &Spanned<String>) -> Result<String, ConfigError> {
    let text = &id.value;
    if !text.is_empty() && text.len() <= MAX_CLUSTER_ID && text.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(text.clone());
    }
    let problem = format!(
        "{} must be 1 to {MAX_CLUSTER_ID} printable ASCII characters without spaces, like {DEFAULT_CLUSTER}",
        quoted(text)
    );
    Err(check.wrong(id, "issuer.istio.clusterId", problem))
}
