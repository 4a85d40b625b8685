//! From objects to records.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use kube::api::ObjectMeta;

use super::{
    annotations::excluded,
    names::{DRY_RUN, HOSTNAME, ISTIO_MODE, MODE, Names, SERVICE_NAME, SIDECAR, ZONE},
    objects::{Configured, Container, Endpoint, EndpointSlice, Namespace, Node, NumberOrName, Pod, Service},
    records::{
        Choice, ConfiguredRecord, EndpointRecord, Fingerprint, Key, NamespaceRecord, NodeRecord, PodRecord,
        ServiceRecord, SliceRecord, Unvouched,
    },
};
use crate::{mesh::APPLICATION_LABELS, pod_identity};

/// Turns objects into records. An object that is of no use (a pod that has ended, a service without an address) becomes `None`,
/// as if it were gone.
#[derive(Debug)]
pub(super) struct Reader {
    node: Arc<str>,
    names: Names,
}

impl Reader {
    /// For the node of this name.
    pub(super) fn new(node: &str) -> Self {
        Self { node: node.into(), names: Names::default() }
    }

    /// Forgets names that no record uses any more.
    pub(super) fn prune(&mut self) {
        self.names.prune();
    }

    pub(super) fn key(&mut self, meta: &ObjectMeta) -> Key {
        Key {
            namespace: self.names.get(meta.namespace.as_deref().unwrap_or_default()),
            name: meta.name.as_deref().unwrap_or_default().into(),
        }
    }

    pub(super) fn pod(&mut self, pod: &Pod) -> Option<PodRecord> {
        if matches!(pod.status.phase.as_deref(), Some("Succeeded" | "Failed")) {
            return None;
        }
        let node = pod.spec.node_name.as_deref().filter(|n| !n.is_empty()).map(|n| self.names.get(n));
        let own = node.as_deref() == Some(&*self.node);
        let empty = BTreeMap::new();
        let (labels, annotations) =
            (pod.metadata.labels.as_ref().unwrap_or(&empty), pod.metadata.annotations.as_ref().unwrap_or(&empty));
        // Exclusions concern the pod's own node only.
        let (exclude, problems) = if own { excluded(annotations) } else { Default::default() };
        let kept = |name: &str| own || APPLICATION_LABELS.contains(&name);
        let listed = pod.status.pod_ips.iter().map(|ip| ip.ip.as_str());
        let account = pod_identity::account(&pod.metadata, pod.spec.service_account_name.as_deref());
        Some(PodRecord {
            uid: pod.metadata.uid.as_deref().unwrap_or_default().into(),
            service_account: self.names.get(account.unwrap_or_default()),
            unvouched: account
                .err()
                .map(|why| Box::new(Unvouched { why, uid: pod_identity::static_uid(&pod.metadata).map(Into::into) })),
            labels: labels
                .iter()
                .filter(|(name, _)| kept(name))
                .map(|(name, value)| (self.names.get(name), self.names.get(value)))
                .collect(),
            choice: choice(labels),
            occupied: annotations.contains_key(SIDECAR),
            host_network: pod.spec.host_network.unwrap_or_default(),
            terminating: pod.metadata.deletion_timestamp.is_some(),
            addresses: addresses(pod.status.pod_ip.as_deref().into_iter().chain(listed)),
            created: created(&pod.metadata),
            exclude,
            probe_ports: if own { probe_ports(pod) } else { Vec::new() },
            problems,
            node,
        })
    }

    pub(super) fn namespace(namespace: &Namespace) -> NamespaceRecord {
        let empty = BTreeMap::new();
        let (exclude, problems) = excluded(namespace.metadata.annotations.as_ref().unwrap_or(&empty));
        NamespaceRecord { choice: namespace.metadata.labels.as_ref().and_then(choice), exclude, problems }
    }

    pub(super) fn node(&mut self, node: &Node) -> NodeRecord {
        let labels = node.metadata.labels.as_ref();
        // Host names are no addresses and drop out.
        let listed = node.status.addresses.iter().filter(|a| a.kind.ends_with("IP"));
        NodeRecord {
            addresses: addresses(listed.map(|a| a.address.as_str())),
            zone: labels.and_then(|l| l.get(ZONE)).map(|z| self.names.get(z)),
        }
    }

    pub(super) fn service(&mut self, service: &Service) -> Option<ServiceRecord> {
        let spec = &service.spec;
        if spec.kind.as_deref() == Some("ExternalName") {
            return None;
        }
        // "None" marks a headless service, whose name resolves to its pods' own addresses.
        let vips = addresses(spec.cluster_ip.as_deref().into_iter().chain(spec.cluster_ips.iter().map(String::as_str)));
        if vips.is_empty() {
            return None;
        }
        let tcp = spec.ports.iter().filter(|p| is_tcp(p.protocol.as_deref()));
        Some(ServiceRecord {
            vips,
            ports: tcp
                .filter_map(|p| Some((self.names.get(p.name.as_deref().unwrap_or_default()), port(p.port)?)))
                .collect(),
            local_only: spec.internal_traffic_policy.as_deref() == Some("Local"),
        })
    }

    pub(super) fn slice(&mut self, slice: &EndpointSlice) -> Option<SliceRecord> {
        let service = slice.metadata.labels.as_ref()?.get(SERVICE_NAME)?;
        if slice.address_type == "FQDN" {
            return None;
        }
        let namespace = slice.metadata.namespace.as_deref().unwrap_or_default();
        let tcp = slice.ports.iter().filter(|p| is_tcp(p.protocol.as_deref()));
        Some(SliceRecord {
            service: self.names.get(service),
            ports: tcp
                .filter_map(|p| Some((self.names.get(p.name.as_deref().unwrap_or_default()), port(p.port?)?)))
                .collect(),
            endpoints: slice.endpoints.iter().filter_map(|e| self.endpoint(namespace, e)).collect(),
        })
    }

    fn endpoint(&mut self, namespace: &str, endpoint: &Endpoint) -> Option<EndpointRecord> {
        // All addresses of an endpoint mean the same place; clients use the first (EndpointSlice API).
        let address = *addresses(endpoint.addresses.iter().map(String::as_str)).first()?;
        let pod = endpoint.target_ref.as_ref().filter(|t| t.kind.as_deref() == Some("Pod"));
        let pod = pod.and_then(|t| {
            let namespace = t.namespace.as_deref().filter(|n| !n.is_empty()).unwrap_or(namespace);
            Some(Key { namespace: self.names.get(namespace), name: t.name.as_deref()?.into() })
        });
        let uid = endpoint.target_ref.as_ref().and_then(|t| t.uid.as_deref()).filter(|uid| !uid.is_empty());
        let uid = uid.filter(|_| pod.is_some()).map(Fingerprint::of);
        let node = endpoint.node_name.as_ref().or_else(|| endpoint.topology.as_ref()?.get(HOSTNAME));
        let (conditions, hints) = (&endpoint.conditions, endpoint.hints.as_ref());
        let mut names = |list: &[super::objects::Named]| list.iter().map(|n| self.names.get(&n.name)).collect();
        Some(EndpointRecord {
            address,
            pod,
            uid,
            ready: conditions.ready.unwrap_or(true),
            draining: conditions.serving.unwrap_or_default() && conditions.terminating.unwrap_or_default(),
            zones: hints.map(|h| names(&h.for_zones)).unwrap_or_default(),
            nodes: hints.map(|h| names(&h.for_nodes)).unwrap_or_default(),
            node: node.map(|n| self.names.get(n)),
        })
    }

    pub(super) fn configured(object: &Configured) -> ConfiguredRecord {
        let annotations = object.metadata.annotations.as_ref();
        let spec = object.spec.as_ref().map_or_else(|| "{}".to_owned(), ToString::to_string);
        ConfiguredRecord {
            created: created(&object.metadata),
            dry_run: annotations.and_then(|a| a.get(DRY_RUN)).is_some_and(|v| v == "true"),
            spec: spec.into(),
        }
    }
}

/// What the labels of a namespace or a pod say. Underpass' own label wins over Istio's; values that mean nothing say nothing.
fn choice(labels: &BTreeMap<String, String>) -> Option<Choice> {
    let own = labels.get(MODE).and_then(|v| match v.as_str() {
        "enabled" => Some(Choice::In),
        "disabled" => Some(Choice::Out),
        _ => None,
    });
    own.or_else(|| {
        labels.get(ISTIO_MODE).and_then(|v| match v.as_str() {
            "ambient" => Some(Choice::In),
            "none" => Some(Choice::Out),
            _ => None,
        })
    })
}

/// What parses, each once, in order.
fn addresses<'a>(texts: impl Iterator<Item = &'a str>) -> Vec<IpAddr> {
    let mut out = Vec::new();
    for address in texts.filter_map(|t| t.parse::<IpAddr>().ok()) {
        let address = address.to_canonical();
        if !out.contains(&address) {
            out.push(address);
        }
    }
    out
}

fn created(meta: &ObjectMeta) -> i64 {
    meta.creation_timestamp.as_ref().map_or(0, |t| t.0.as_second())
}

/// TCP is what a port without a protocol has.
fn is_tcp(protocol: Option<&str>) -> bool {
    protocol.is_none_or(|p| p == "TCP")
}

fn port(number: i64) -> Option<u16> {
    u16::try_from(number).ok().filter(|p| *p > 0)
}

/// Ports that the kubelet connects to: of probes and lifecycle hooks. Ephemeral containers can have
/// neither.
fn probe_ports(pod: &Pod) -> Vec<u16> {
    let mut ports = Vec::new();
    for container in pod.spec.containers.iter().chain(&pod.spec.init_containers) {
        let probes = [&container.liveness_probe, &container.readiness_probe, &container.startup_probe];
        let hooks = container.lifecycle.iter().flat_map(|l| [&l.post_start, &l.pre_stop]);
        let handlers = probes.into_iter().chain(hooks).flatten().flat_map(|p| [&p.http_get, &p.tcp_socket, &p.grpc]);
        for handler in handlers.flatten().filter(|h| h.host.as_ref().is_none_or(String::is_empty)) {
            let number = handler.port.as_ref().and_then(|p| container_port(container, p));
            if let Some(number) = number.filter(|n| !ports.contains(n)) {
                ports.push(number);
            }
        }
    }
    ports.sort_unstable();
    ports
}

#[cfg(test)]
#[test]
fn ports_of_probes_and_hooks() {
    let handler = |kind: &str, port: serde_json::Value| serde_json::json!({ kind: { "port": port } });
    let ports = serde_json::json!([{ "name": "http", "containerPort": 8080 }, { "name": "other", "containerPort": 9 }]);
    let pod = serde_json::json!({ "spec": {
        "containers": [
            {
                "ports": ports,
                "livenessProbe": handler("httpGet", "http".into()),
                "readinessProbe": handler("grpc", 8081.into()),
                "startupProbe": { "exec": { "command": ["true"] } },
                "lifecycle": {
                    "postStart": handler("httpGet", "8082".into()),
                    "preStop": handler("tcpSocket", 8083.into()),
                },
            },
            // A name is one of the container's own; another host is not the pod.
            { "livenessProbe": handler("tcpSocket", "http".into()), "lifecycle": { "preStop": { "sleep": { "seconds": 1 } } } },
            { "livenessProbe": { "httpGet": { "host": "example.org", "port": 8084 } }, "lifecycle": null },
            { "readinessProbe": handler("tcpSocket", 0.into()), "lifecycle": {} },
        ],
        "initContainers": [{ "restartPolicy": "Always", "startupProbe": handler("tcpSocket", 8085.into()) }],
        "ephemeralContainers": [{ "livenessProbe": handler("tcpSocket", 8086.into()) }],
    } });
    assert_eq!(probe_ports(&serde_json::from_value(pod).unwrap()), [8080, 8081, 8082, 8083, 8085]);
}

fn container_port(container: &Container, port_of: &NumberOrName) -> Option<u16> {
    match port_of {
        NumberOrName::Number(number) => port(*number),
        NumberOrName::Name(name) => {
            let named = container.ports.iter().find(|p| p.name.as_ref() == Some(name));
            named.and_then(|p| port(p.container_port)).or_else(|| name.parse().ok().filter(|p| *p > 0))
        }
    }
}
