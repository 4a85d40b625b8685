//! The document as written: names, shapes and positions. What the values mean is checked in `convert`.
//!
//! Scalars that can be wrong in more ways than their YAML type are kept as positioned strings, so that the message
//! can quote them.

mod policy;

use serde::Deserialize;
use serde_saphyr::Spanned;

use crate::mesh::PlaintextRefusal;

pub(super) use policy::{Action, Condition, Labels, Operation, Policy, Rule, Source, Strings};

/// The only accepted `apiVersion`.
pub(super) const API_VERSION: &str = "underpass.io/v1alpha1";
/// The only accepted `kind`.
pub(super) const KIND: &str = "NodeConfig";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Document {
    pub(super) api_version: Spanned<String>,
    pub(super) kind: Spanned<String>,
    pub(super) node: Option<Spanned<String>>,
    pub(super) trust_domain: Spanned<String>,
    pub(super) issuer: Spanned<Issuer>,
    pub(super) kubernetes: Option<Spanned<Kubernetes>>,
    #[serde(default)]
    pub(super) mesh: Mesh,
    #[serde(default)]
    pub(super) probes: Probes,
    #[serde(default)]
    pub(super) access_log: AccessLog,
    #[serde(default)]
    pub(super) namespaces: Vec<Namespace>,
    #[serde(default)]
    pub(super) workloads: Vec<Spanned<Workload>>,
    #[serde(default)]
    pub(super) services: Vec<Spanned<Service>>,
    #[serde(default)]
    pub(super) policies: Vec<Spanned<Policy>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Issuer {
    pub(super) local: Option<LocalIssuer>,
    pub(super) files: Option<FilesIssuer>,
    pub(super) istio: Option<IstioIssuer>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct LocalIssuer {
    pub(super) ca_dir: Spanned<String>,
    pub(super) lifetime: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct FilesIssuer {
    pub(super) crl_file: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct IstioIssuer {
    pub(super) address: Spanned<String>,
    pub(super) root_file: Spanned<String>,
    pub(super) token_file: Spanned<String>,
    pub(super) cluster_id: Option<Spanned<String>>,
    pub(super) lifetime: Option<Spanned<String>>,
    pub(super) server_name: Option<Spanned<String>>,
    pub(super) crl_file: Option<Spanned<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Kubernetes {
    pub(super) kubeconfig: Option<Spanned<String>>,
    pub(super) cluster_domain: Option<Spanned<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Mesh {
    pub(super) mode: Mode,
    pub(super) root_namespace: Option<Spanned<String>>,
    pub(super) capture_all: bool,
    pub(super) cidrs: Vec<Spanned<String>>,
    pub(super) exclude: Exclude,
    pub(super) plaintext_refusal: PlaintextRefusal,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Probes {
    pub(super) cgroups: Vec<Spanned<String>>,
    pub(super) node_addresses: Vec<Spanned<String>>,
    pub(super) from_node_addresses: Option<Spanned<bool>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct AccessLog {
    pub(super) enabled: Option<bool>,
    pub(super) sample: Option<Spanned<f64>>,
    pub(super) namespaces: Vec<NamespaceLog>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NamespaceLog {
    pub(super) name: Spanned<String>,
    pub(super) enabled: Option<bool>,
    pub(super) sample: Option<Spanned<f64>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Namespace {
    pub(super) name: Spanned<String>,
    pub(super) mode: Mode,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Exclude {
    pub(super) outbound_ports: Vec<Spanned<u16>>,
    #[serde(rename = "outboundCIDRs")]
    pub(super) outbound_cidrs: Vec<Spanned<String>>,
    pub(super) inbound_ports: Vec<Spanned<u16>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Mode {
    #[default]
    Permissive,
    Strict,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Protocol {
    #[default]
    Underpass,
    Plain,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Workload {
    pub(super) name: Spanned<String>,
    pub(super) namespace: Spanned<String>,
    pub(super) service_account: Option<Spanned<String>>,
    pub(super) trust_domain: Option<Spanned<String>>,
    pub(super) node: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) labels: Labels,
    #[serde(default)]
    pub(super) addresses: Vec<Spanned<String>>,
    #[serde(default)]
    pub(super) protocol: Protocol,
    pub(super) mode: Option<Spanned<Mode>>,
    #[serde(default)]
    pub(super) ports: Vec<WorkloadPort>,
    pub(super) enroll: Option<Spanned<Enroll>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WorkloadPort {
    pub(super) port: Spanned<u16>,
    pub(super) mode: Mode,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Enroll {
    pub(super) netns: Spanned<String>,
    pub(super) cgroup: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) capture_all: bool,
    #[serde(default)]
    pub(super) exclude: Exclude,
    #[serde(default)]
    pub(super) probe_ports: Vec<Spanned<u16>>,
    pub(super) certificate: Option<Spanned<Certificate>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(clippy::struct_field_names)] // the names of the document
pub(super) struct Certificate {
    pub(super) certificate: Spanned<String>,
    pub(super) key: Spanned<String>,
    pub(super) roots: Spanned<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Service {
    pub(super) name: Spanned<String>,
    pub(super) namespace: Spanned<String>,
    pub(super) hostname: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) vips: Vec<Spanned<String>>,
    pub(super) ports: Spanned<Vec<ServicePort>>,
    #[serde(default)]
    pub(super) endpoints: Vec<Endpoint>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ServicePort {
    pub(super) port: Spanned<u16>,
    pub(super) target_port: Option<Spanned<u16>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Endpoint {
    pub(super) workload: Spanned<String>,
    #[serde(default)]
    pub(super) ports: Vec<ServicePort>,
}
