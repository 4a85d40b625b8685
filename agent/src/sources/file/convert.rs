//! From the schema to the model: everything that one field's type cannot say.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde_saphyr::Spanned;

use super::{
    ConfigError, IssuerConfig, NodeConfig, access_log,
    fields::{Check, mode},
    policies::Policies,
    probes,
    schema::{API_VERSION, Document, Issuer, KIND, Kubernetes, Mesh},
    services::Services,
    workloads::Workloads,
    yaml::quoted,
};
use crate::{
    mesh::{IstioCa, MeshSettings, ModeDefaults, SnapshotBuilder, TrustDomain, check_name},
    sources::kubernetes::KubernetesConfig,
};

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

/// Domain of the cluster's services when `kubernetes.clusterDomain` is absent: kubeadm's default.
const DEFAULT_CLUSTER_DOMAIN: &str = "cluster.local";

/// Checks a document and turns it into a model. `node` wins over the document's.
pub(super) fn node_config(file: &str, document: &Document, node: Option<&str>) -> Result<NodeConfig, ConfigError> {
    let check = Check { file };
    let exactly = |value: &Spanned<String>, field: &str, expected: &str| {
        if value.value == expected {
            return Ok(());
        }
        Err(check.wrong(value, field, format!("{} is not supported; write {expected}", quoted(&value.value))))
    };
    exactly(&document.api_version, "apiVersion", API_VERSION)?;
    exactly(&document.kind, "kind", KIND)?;
    let node = match (node, &document.node) {
        (Some(node), _) => {
            check_name("node", node).map_err(|e| ConfigError(format!("--node: {e}")))?;
            node
        }
        (None, Some(node)) => {
            check.name("node", "node", node)?;
            &node.value
        }
        (None, None) => {
            return Err(ConfigError(format!(
                "{file}: field \"node\" is missing; add it, or give the name with --node or UNDERPASS_NODE"
            )));
        }
    };
    let trust_domain: TrustDomain = check.parsed("trustDomain", &document.trust_domain)?;
    let crl_file = crl_file(check, &document.issuer.value)?;
    let issuer = issuer(check, &document.issuer)?;
    let settings = MeshSettings {
        mode: mode(document.mesh.mode),
        root_namespace: root_namespace(check, &document.mesh)?.into(),
        cidrs: document
            .mesh
            .cidrs
            .iter()
            .enumerate()
            .map(|(i, c)| check.captured_network(&format!("mesh.cidrs[{i}]"), c))
            .collect::<Result<_, _>>()?,
        capture_all: document.mesh.capture_all,
        exclude: check.exclusions("mesh.exclude", &document.mesh.exclude)?,
        plaintext_refusal: document.mesh.plaintext_refusal,
        probes: probes::settings(check, document)?,
        access_log: access_log::settings(check, &document.access_log)?,
    };

    let kubernetes = kubernetes(check, document, &issuer)?;
    let mut builder = SnapshotBuilder::new(node, trust_domain.clone(), settings);
    let modes = modes(check, document)?;
    let mut workloads = Workloads::new(check, node, &trust_domain, &issuer, modes);
    for (i, w) in document.workloads.iter().enumerate() {
        workloads.add(&mut builder, i, w)?;
    }
    workloads.departures(&mut builder);
    let mut services = Services::new(check, &trust_domain, workloads.into_known());
    for (i, s) in document.services.iter().enumerate() {
        services.add(&mut builder, i, s)?;
    }
    let policies = Policies::new(check, root_namespace(check, &document.mesh)?);
    for (i, p) in document.policies.iter().enumerate() {
        policies.add(&mut builder, i, p)?;
    }
    Ok(NodeConfig { snapshot: builder.build(), issuer, crl_file, kubernetes })
}

/// The Kubernetes API as the source of what a file would otherwise list itself.
fn kubernetes(
    check: Check<'_>,
    document: &Document,
    issuer: &IssuerConfig,
) -> Result<Option<KubernetesConfig>, ConfigError> {
    let Some(section) = &document.kubernetes else { return Ok(None) };
    for (name, listed) in [
        ("namespaces", !document.namespaces.is_empty()),
        ("workloads", !document.workloads.is_empty()),
        ("services", !document.services.is_empty()),
        ("policies", !document.policies.is_empty()),
    ] {
        if listed {
            let problem = format!("{name} come from the Kubernetes API; remove {name}, or remove kubernetes");
            return Err(check.wrong(section, "kubernetes", problem));
        }
    }
    if *issuer == IssuerConfig::Files {
        let problem = "issuer.files needs a certificate per workload, which only a file can list; use another issuer";
        return Err(check.wrong(section, "kubernetes", problem));
    }
    let Kubernetes { kubeconfig, cluster_domain } = &section.value;
    if let Some(domain) = cluster_domain {
        check.name("domain", "kubernetes.clusterDomain", domain)?;
    }
    Ok(Some(KubernetesConfig {
        kubeconfig: kubeconfig.as_ref().map(|k| check.path("kubernetes.kubeconfig", k)).transpose()?,
        cluster_domain: cluster_domain.as_ref().map_or(DEFAULT_CLUSTER_DOMAIN, |d| &d.value).to_owned(),
    }))
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

fn crl_file(check: Check<'_>, issuer: &Issuer) -> Result<Option<PathBuf>, ConfigError> {
    let of_files = issuer.files.as_ref().and_then(|files| files.crl_file.as_ref());
    let of_istio = issuer.istio.as_ref().and_then(|istio| istio.crl_file.as_ref());
    let path = |field, file: Option<&Spanned<String>>| file.map(|file| check.path(field, file)).transpose();
    Ok(path("issuer.files.crlFile", of_files)?.or(path("issuer.istio.crlFile", of_istio)?))
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
