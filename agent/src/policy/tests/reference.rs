//! Istio's semantics, written down a second time: on the text of the policies, without any index, sharing nothing with
//! the code under test. Slow and obvious.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use serde_json::{Value, json};

/// Name of a field, and its values.
pub(super) type Fields = BTreeMap<&'static str, Vec<String>>;

#[derive(Clone, Debug)]
pub(super) struct RawPolicy {
    pub(super) namespace: &'static str,
    pub(super) action: &'static str,
    pub(super) dry_run: bool,
    pub(super) labels: Vec<(&'static str, &'static str)>,
    pub(super) rules: Vec<RawRule>,
}

#[derive(Clone, Debug)]
pub(super) struct RawRule {
    pub(super) from: Vec<Fields>,
    pub(super) to: Vec<Fields>,
    pub(super) when: Vec<RawCondition>,
}

#[derive(Clone, Debug)]
pub(super) struct RawCondition {
    pub(super) key: &'static str,
    pub(super) values: Vec<String>,
    pub(super) not_values: Vec<String>,
}

#[derive(Clone, Debug)]
pub(super) struct RawWorkload {
    pub(super) namespace: &'static str,
    pub(super) labels: Vec<(&'static str, &'static str)>,
}

#[derive(Clone, Debug)]
pub(super) struct Connection {
    /// Trust domain, namespace, service account.
    pub(super) peer: Option<(&'static str, &'static str, &'static str)>,
    pub(super) source: IpAddr,
    pub(super) destination: SocketAddr,
}

/// Is the connection allowed, by the enforced policies or by all of them?
pub(super) fn allowed(
    policies: &[RawPolicy],
    workload: &RawWorkload,
    connection: &Connection,
    with_dry_run: bool,
) -> bool {
    let selecting: Vec<_> =
        policies.iter().filter(|p| selects(p, workload)).filter(|p| with_dry_run || !p.dry_run).collect();
    if selecting.iter().any(|p| p.action == "CUSTOM") {
        return false;
    }
    if selecting.iter().any(|p| p.action == "DENY" && policy_matches(p, connection)) {
        return false;
    }
    let allows: Vec<_> = selecting.iter().filter(|p| p.action == "ALLOW").collect();
    allows.is_empty() || allows.iter().any(|p| policy_matches(p, connection))
}

pub(super) fn selects(policy: &RawPolicy, workload: &RawWorkload) -> bool {
    (policy.namespace == "istio-system" || policy.namespace == workload.namespace)
        && policy.labels.iter().all(|label| workload.labels.contains(label))
}

fn policy_matches(policy: &RawPolicy, connection: &Connection) -> bool {
    policy.rules.iter().any(|rule| rule_matches(policy, rule, connection))
}

fn rule_matches(policy: &RawPolicy, rule: &RawRule, connection: &Connection) -> bool {
    let uses_http = rule.from.iter().chain(&rule.to).any(|fields| fields.keys().any(|f| is_http(f)))
        || rule.when.iter().any(|c| is_http(c.key));
    if uses_http && policy.action == "ALLOW" {
        return false;
    }
    let all = |fields: &Fields| {
        fields.iter().filter(|(f, _)| !is_http(f)).all(|(field, values)| {
            let (property, negated) = property(field);
            let any = values.iter().any(|v| value_matches(property, v, policy.namespace, connection));
            any != negated
        })
    };
    let from = rule.from.is_empty() || rule.from.iter().any(all);
    let to = rule.to.is_empty() || rule.to.iter().any(all);
    let when = rule.when.iter().filter(|c| !is_http(c.key)).all(|c| {
        let any = |values: &[String]| values.iter().any(|v| value_matches(c.key, v, policy.namespace, connection));
        (c.values.is_empty() || any(&c.values)) && !any(&c.not_values)
    });
    from && to && when
}

fn is_http(field: &str) -> bool {
    matches!(field, "methods" | "notMethods" | "paths" | "hosts" | "requestPrincipals" | "notRemoteIpBlocks")
        || field.starts_with("request.")
}

fn property(field: &str) -> (&str, bool) {
    match field {
        "principals" => ("source.principal", false),
        "notPrincipals" => ("source.principal", true),
        "namespaces" => ("source.namespace", false),
        "notNamespaces" => ("source.namespace", true),
        "serviceAccounts" => ("source.serviceAccount", false),
        "notServiceAccounts" => ("source.serviceAccount", true),
        "ipBlocks" => ("source.ip", false),
        "notIpBlocks" => ("source.ip", true),
        "ports" => ("destination.port", false),
        "notPorts" => ("destination.port", true),
        other => panic!("field {other}"),
    }
}

fn value_matches(property: &str, value: &str, policy_namespace: &str, connection: &Connection) -> bool {
    match (property, connection.peer) {
        ("source.ip", _) => in_block(value, connection.source),
        ("destination.ip", _) => in_block(value, connection.destination.ip()),
        ("destination.port", _) => value == connection.destination.port().to_string(),
        (_, None) => false,
        ("source.principal", Some((td, ns, sa))) => string_matches(value, &format!("{td}/ns/{ns}/sa/{sa}")),
        ("source.namespace", Some((_, ns, _))) => string_matches(value, ns),
        ("source.serviceAccount", Some((_, ns, sa))) => {
            let full = if value.contains('/') { value.to_owned() } else { format!("{policy_namespace}/{value}") };
            full == format!("{ns}/{sa}")
        }
        other => panic!("property {other:?}"),
    }
}

fn string_matches(pattern: &str, value: &str) -> bool {
    let (pattern, value): (Vec<char>, Vec<char>) = (pattern.chars().collect(), value.chars().collect());
    match (pattern.as_slice(), value.as_slice()) {
        (['*'], value) => !value.is_empty(),
        (['*', end @ ..], value) => value.len() >= end.len() && value[value.len() - end.len()..] == *end,
        ([start @ .., '*'], value) => value.len() >= start.len() && value[..start.len()] == *start,
        (pattern, value) => pattern == value,
    }
}

/// Compares bit by bit, IPv4 as 32 bits and everything else as 128. `::ffff:a.b.c.d` and `a.b.c.d` are one address; a
/// block that is wider than all mapped addresses is a block of IPv6.
fn in_block(block: &str, address: IpAddr) -> bool {
    let (network, length) = match block.split_once('/') {
        Some((network, length)) => (bits(network.parse().unwrap()), length.parse::<usize>().unwrap()),
        None => (bits(block.parse().unwrap()), usize::MAX),
    };
    let length = length.min(network.len());
    let mapped = bits("::ffff:0:0".parse().unwrap())[..96].to_vec();
    let unmapped = |bits: Vec<bool>| if bits.len() == 128 && bits[..96] == mapped { bits[96..].to_vec() } else { bits };
    let (network, length) = if network.len() == 128 && length >= 96 && network[..96] == mapped {
        (network[96..].to_vec(), length - 96)
    } else {
        (network, length)
    };
    let address = unmapped(bits(address));
    network.len() == address.len() && network[..length] == address[..length]
}

fn bits(address: IpAddr) -> Vec<bool> {
    let bytes = match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    };
    bytes.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1 == 1)).collect()
}

/// The document for policies and workloads; the workloads are called `w0`, `w1` and so on, with the addresses `10.1.0.N`
/// and `fd01::N`.
pub(super) fn document(policies: &[RawPolicy], workloads: &[RawWorkload]) -> String {
    let labels =
        |labels: &[(&str, &str)]| -> Value { labels.iter().map(|(k, v)| ((*k).to_owned(), Value::from(*v))).collect() };
    let workloads: Vec<_> = workloads
        .iter()
        .enumerate()
        .map(|(i, w)| {
            json!({
                "name": format!("w{i}"), "namespace": w.namespace, "labels": labels(&w.labels),
                "addresses": [format!("10.1.0.{i}"), format!("fd01::{i}")], "enroll": { "netns": format!("/n/{i}") },
            })
        })
        .collect();
    let policies: Vec<_> = policies
        .iter()
        .enumerate()
        .map(|(i, p)| {
            json!({
                "name": format!("p{i}"), "namespace": p.namespace, "action": p.action, "dryRun": p.dry_run,
                "selector": { "matchLabels": labels(&p.labels) },
                "rules": p.rules.iter().map(rule).collect::<Vec<_>>(),
            })
        })
        .collect();
    json!({
        "apiVersion": "underpass.io/v1alpha1", "kind": "NodeConfig", "node": "a", "trustDomain": "cluster.local",
        "issuer": { "local": { "caDir": "/ca" } }, "workloads": workloads, "policies": policies,
    })
    .to_string()
}

fn rule(rule: &RawRule) -> Value {
    let mut out = serde_json::Map::new();
    if !rule.from.is_empty() {
        out.insert("from".into(), rule.from.iter().map(|f| json!({ "source": f })).collect());
    }
    if !rule.to.is_empty() {
        out.insert("to".into(), rule.to.iter().map(|f| json!({ "operation": f })).collect());
    }
    let condition = |c: &RawCondition| {
        let mut out = json!({ "key": c.key });
        if !c.values.is_empty() {
            out["values"] = json!(c.values);
        }
        if !c.not_values.is_empty() {
            out["notValues"] = json!(c.not_values);
        }
        out
    };
    if !rule.when.is_empty() {
        out.insert("when".into(), rule.when.iter().map(condition).collect());
    }
    out.into()
}
