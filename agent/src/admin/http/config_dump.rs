//! `/config_dump`: what the agent knows, in the shape that `istioctl ztunnel-config` reads (its field names are those of
//! `istioctl/pkg/writer/ztunnel/configdump/api.go` in istio/istio). Certificates without keys.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use ipnet::IpNet;
use serde::Serialize;
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};

use super::View;
use crate::{
    identity::Svid,
    mesh::{
        Action, Condition, LATEST_REVISION, Policy, Protocol, Rule, Service, ServiceAccount, Snapshot, SpiffeId,
        StringMatch, Values, Workload, WorkloadKey,
    },
    proxy::{PodState, PodStatus},
    relay::{Connection, DataPath, Direction},
};

/// Most live connections in a dump, the oldest ones.
const MAX_CONNECTIONS: usize = 10_000;

/// The document.
pub(super) fn render(view: &View) -> String {
    let mesh = view.mesh.load();
    let connections = view.table.oldest(MAX_CONNECTIONS);
    let workloads: BTreeMap<_, _> = mesh.workloads().map(|w| (&w.key, w)).collect();
    let dump = Dump {
        workloads: workloads.values().map(|w| workload(&mesh, w)).collect(),
        services: mesh.services().iter().map(|s| service(s)).collect(),
        policies: mesh.policies().map(|p| policy(p)).collect(),
        certificates: certificates(view),
        workload_state: states(&mesh, &connections),
        kept_pods: kept(view),
        version: env!("CARGO_PKG_VERSION"),
        node: &mesh.node,
        trust_domain: mesh.trust_domain.as_str(),
        generation: mesh.generation,
    };
    serde_json::to_string_pretty(&dump).unwrap_or_else(|e| unreachable!("maps have keys that are strings: {e}"))
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Dump<'a> {
    workloads: Vec<WorkloadDump<'a>>,
    services: Vec<ServiceDump<'a>>,
    policies: Vec<PolicyDump<'a>>,
    certificates: Vec<CertificatesDump>,
    workload_state: BTreeMap<String, StateDump<'a>>,
    kept_pods: Vec<KeptDump>,
    version: &'a str,
    node: &'a str,
    trust_domain: &'a str,
    generation: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WorkloadDump<'a> {
    uid: String,
    workload_ips: Vec<String>,
    protocol: &'a str,
    name: &'a str,
    namespace: &'a str,
    service_account: &'a str,
    workload_name: &'a str,
    workload_type: &'a str,
    canonical_name: &'a str,
    canonical_revision: &'a str,
    cluster_id: &'a str,
    trust_domain: &'a str,
    node: &'a str,
    status: &'a str,
    hostname: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    authorization_policies: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceDump<'a> {
    name: &'a str,
    namespace: &'a str,
    hostname: &'a str,
    vips: Vec<String>,
    ports: BTreeMap<String, u16>,
    endpoints: BTreeMap<String, EndpointDump>,
    ip_families: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EndpointDump {
    workload_uid: String,
    service: String,
    port: BTreeMap<String, u16>,
}

/// A pod that vanished without leaving the mesh; ztunnel has no such thing.
#[derive(Serialize)]
struct KeptDump {
    workload: String,
    netns: String,
    reason: &'static str,
    detail: String,
}

#[derive(Serialize)]
struct PolicyDump<'a> {
    name: &'a str,
    namespace: &'a str,
    scope: &'a str,
    action: &'a str,
    /// Rules, of which one must match; in each, clauses that all must; in each, matches of which one must.
    rules: Vec<Vec<Vec<MatchDump>>>,
}

#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct MatchDump {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    namespaces: Vec<StringDump>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_namespaces: Vec<StringDump>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    principals: Vec<StringDump>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_principals: Vec<StringDump>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    source_ips: Vec<IpNet>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_source_ips: Vec<IpNet>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    destination_ips: Vec<IpNet>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_destination_ips: Vec<IpNet>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    destination_ports: Vec<u16>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_destination_ports: Vec<u16>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    service_accounts: Vec<AccountDump>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_service_accounts: Vec<AccountDump>,
}

/// One field, named as the way it matches.
#[derive(Serialize)]
enum StringDump {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    Presence(Present),
}

#[derive(Serialize)]
struct Present {}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct AccountDump {
    namespace: Arc<str>,
    service_account: Arc<str>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CertificatesDump {
    identity: String,
    state: String,
    cert_chain: Vec<CertificateDump>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CertificateDump {
    /// PEM in base64.
    pem: String,
    /// Decimal.
    serial_number: String,
    /// RFC 3339.
    valid_from: String,
    /// RFC 3339.
    expiration_time: String,
}

#[derive(Serialize)]
struct StateDump<'a> {
    state: &'a str,
    connections: ConnectionsDump,
    info: InfoDump<'a>,
}

#[derive(Default, Serialize)]
struct ConnectionsDump {
    inbound: Vec<ConnectionDump>,
    outbound: Vec<ConnectionDump>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ConnectionDump {
    src: String,
    original_dst: String,
    actual_dst: String,
    protocol: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct InfoDump<'a> {
    name: &'a str,
    namespace: &'a str,
    trust_domain: &'a str,
    service_account: &'a str,
}

fn uid(key: &WorkloadKey) -> String {
    format!("Kubernetes//Pod/{key}")
}

fn workload<'a>(mesh: &'a Snapshot, w: &'a Workload) -> WorkloadDump<'a> {
    let policies = &mesh.workload_policy(&w.key).policies;
    WorkloadDump {
        uid: uid(&w.key),
        workload_ips: w.addresses.iter().map(ToString::to_string).collect(),
        protocol: match w.protocol {
            Protocol::Underpass => "UNDERPASS",
            Protocol::Plain => "TCP",
        },
        name: &w.key.name,
        namespace: &w.key.namespace,
        service_account: w.identity.service_account(),
        workload_name: &w.key.name,
        workload_type: "pod",
        canonical_name: mesh.canonical_name(&w.key).unwrap_or(&w.key.name),
        canonical_revision: mesh.canonical_revision(&w.key).map_or(LATEST_REVISION, |revision| revision),
        cluster_id: "Kubernetes",
        trust_domain: w.identity.trust_domain().as_str(),
        node: &w.node,
        status: "Healthy",
        hostname: "",
        authorization_policies: policies.iter().map(ToString::to_string).collect(),
    }
}

fn service(s: &Service) -> ServiceDump<'_> {
    let ports = |list: &[crate::mesh::ServicePort]| {
        list.iter().map(|p| (p.port.to_string(), p.target_port)).collect::<BTreeMap<_, _>>()
    };
    let endpoint = |e: &crate::mesh::Endpoint| {
        let mut port = ports(&s.ports);
        port.extend(ports(&e.ports));
        let uid = uid(&e.workload.key);
        (uid.clone(), EndpointDump { workload_uid: uid, service: format!("{}/{}", s.namespace, s.hostname), port })
    };
    let (v4, v6) = (s.vips.iter().any(std::net::IpAddr::is_ipv4), s.vips.iter().any(std::net::IpAddr::is_ipv6));
    ServiceDump {
        name: &s.name,
        namespace: &s.namespace,
        hostname: &s.hostname,
        // The part before the slash is the network, of which there is one.
        vips: s.vips.iter().map(|vip| format!("/{vip}")).collect(),
        ports: ports(&s.ports),
        endpoints: s.endpoints.iter().map(endpoint).collect(),
        ip_families: match (v4, v6) {
            (true, true) => "Dual",
            (false, true) => "IPv6",
            _ => "IPv4",
        },
    }
}

fn policy(p: &Policy) -> PolicyDump<'_> {
    PolicyDump {
        name: &p.key.name,
        namespace: &p.key.namespace,
        scope: match p.reach() {
            "mesh" => "Global",
            "namespace" => "Namespace",
            _ => "WorkloadSelector",
        },
        action: match p.action {
            Action::Allow => "Allow",
            Action::Deny => "Deny",
            Action::Audit => "Audit",
            Action::Custom => "Custom",
        },
        rules: p.rules.iter().map(rule).collect(),
    }
}

fn rule(rule: &Rule) -> Vec<Vec<MatchDump>> {
    let mut clauses = Vec::new();
    if !rule.from.is_empty() {
        clauses.push(
            rule.from
                .iter()
                .map(|source| {
                    let mut m = MatchDump::default();
                    strings(&source.principals, &mut m.principals, &mut m.not_principals);
                    strings(&source.namespaces, &mut m.namespaces, &mut m.not_namespaces);
                    accounts(&source.service_accounts, &mut m);
                    copied(&source.ip_blocks, &mut m.source_ips, &mut m.not_source_ips);
                    m
                })
                .collect(),
        );
    }
    if !rule.to.is_empty() {
        let ports = |operation: &crate::mesh::Operation| {
            let mut m = MatchDump::default();
            copied(&operation.ports, &mut m.destination_ports, &mut m.not_destination_ports);
            m
        };
        clauses.push(rule.to.iter().map(ports).collect());
    }
    clauses.extend(rule.when.iter().map(|condition| vec![condition_match(condition)]));
    clauses
}

fn condition_match(condition: &Condition) -> MatchDump {
    let mut m = MatchDump::default();
    match condition {
        Condition::SourceIp(v) => copied(v, &mut m.source_ips, &mut m.not_source_ips),
        Condition::SourceNamespace(v) => strings(v, &mut m.namespaces, &mut m.not_namespaces),
        Condition::SourcePrincipal(v) => strings(v, &mut m.principals, &mut m.not_principals),
        Condition::SourceServiceAccount(v) => accounts(v, &mut m),
        Condition::DestinationIp(v) => copied(v, &mut m.destination_ips, &mut m.not_destination_ips),
        Condition::DestinationPort(v) => copied(v, &mut m.destination_ports, &mut m.not_destination_ports),
    }
    m
}

fn copied<T: Copy>(values: &Values<T>, any: &mut Vec<T>, none: &mut Vec<T>) {
    any.clone_from(&values.any_of);
    none.clone_from(&values.none_of);
}

fn strings(values: &Values<StringMatch>, any: &mut Vec<StringDump>, none: &mut Vec<StringDump>) {
    let dump = |m: &StringMatch| match m {
        StringMatch::Exact(text) => StringDump::Exact(Arc::clone(text)),
        StringMatch::Prefix(text) => StringDump::Prefix(Arc::clone(text)),
        StringMatch::Suffix(text) => StringDump::Suffix(Arc::clone(text)),
        StringMatch::Present => StringDump::Presence(Present {}),
    };
    any.extend(values.any_of.iter().map(dump));
    none.extend(values.none_of.iter().map(dump));
}

fn accounts(values: &Values<ServiceAccount>, m: &mut MatchDump) {
    let dump =
        |a: &ServiceAccount| AccountDump { namespace: Arc::clone(&a.namespace), service_account: Arc::clone(&a.name) };
    m.service_accounts.extend(values.any_of.iter().map(dump));
    m.not_service_accounts.extend(values.none_of.iter().map(dump));
}

fn certificates(view: &View) -> Vec<CertificatesDump> {
    let (wanted, current, now) = (view.certificates.wanted(), view.certificates.all(), SystemTime::now());
    let dump = |identity: &SpiffeId| {
        let svid = current.get(identity);
        let state = match svid {
            Some(svid) if svid.valid_at(now) => "Available".to_owned(),
            Some(_) => "Unavailable: the certificate is not valid now".to_owned(),
            None => "Unavailable: none has been issued".to_owned(),
        };
        CertificatesDump { identity: identity.to_string(), state, cert_chain: svid.map_or_else(Vec::new, |s| chain(s)) }
    };
    wanted.iter().map(dump).collect()
}

fn chain(svid: &Svid) -> Vec<CertificateDump> {
    let dump = |der: &rustls_pki_types::CertificateDer<'_>| {
        let pem = pem::encode(&pem::Pem::new("CERTIFICATE", der.to_vec()));
        // It was parsed when it was issued; an intermediate may have dates that no calendar has.
        let (_, parsed) = X509Certificate::from_der(der).ok()?;
        let time = |t: x509_parser::time::ASN1Time| {
            let since = std::time::Duration::from_secs(u64::try_from(t.timestamp()).unwrap_or(0));
            humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + since).to_string()
        };
        Some(CertificateDump {
            pem: BASE64_STANDARD.encode(pem),
            serial_number: parsed.serial.to_string(),
            valid_from: time(parsed.validity.not_before),
            expiration_time: time(parsed.validity.not_after),
        })
    };
    svid.certified.cert.iter().filter_map(dump).collect()
}

fn kept(view: &View) -> Vec<KeptDump> {
    let pods = view.node.pods();
    let dump = |pod: &PodStatus| match pod.state {
        PodState::Kept { reason, .. } => Some(KeptDump {
            workload: pod.key.to_string(),
            netns: pod.netns.display().to_string(),
            reason: reason.as_str(),
            detail: reason.to_string(),
        }),
        PodState::Enrolled { .. } | PodState::Refused { .. } => None,
    };
    pods.iter().filter_map(dump).collect()
}

fn states<'a>(mesh: &'a Snapshot, connections: &[Arc<Connection>]) -> BTreeMap<String, StateDump<'a>> {
    let mut states: BTreeMap<String, StateDump<'a>> = mesh
        .local_workloads()
        .map(|w| {
            let info = InfoDump {
                name: &w.key.name,
                namespace: &w.key.namespace,
                trust_domain: w.identity.trust_domain().as_str(),
                service_account: w.identity.service_account(),
            };
            (uid(&w.key), StateDump { state: "Up", connections: ConnectionsDump::default(), info })
        })
        .collect();
    for connection in connections {
        let what = &connection.what;
        // A pod that has left the mesh may still have connections; there is nowhere to tell of them.
        let Some(state) = states.get_mut(&uid(&what.workload)) else { continue };
        let list = match what.direction {
            Direction::Inbound => &mut state.connections.inbound,
            Direction::Outbound => &mut state.connections.outbound,
        };
        list.push(ConnectionDump {
            src: what.source.to_string(),
            original_dst: what.original_destination.to_string(),
            actual_dst: what.upstream.to_string(),
            protocol: if what.data_path == DataPath::Plain { "TCP" } else { "UNDERPASS" },
        });
    }
    states
}
