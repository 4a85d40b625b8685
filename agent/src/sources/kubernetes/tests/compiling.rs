//! What becomes of objects, kind by kind.

#![allow(clippy::needless_pass_by_value)] // `json!` written in place reads better than a reference to it

use serde_json::{Value, json};

use super::support::{NODE, Scene};
use crate::mesh::{InboundMode, ModeSource, PolicyStatus, Protocol, Resolution, Service, Snapshot};

fn pod(name: &str, ip: &str, labels: Value) -> Value {
    json!({
        "kind": "Pod",
        "metadata": { "namespace": "shop", "name": name, "uid": format!("uid-{name}"), "labels": labels,
            "creationTimestamp": "2026-01-01T00:00:00Z" },
        "spec": { "nodeName": "node-b", "serviceAccountName": "web", "containers": [{ "name": "c" }] },
        "status": { "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }] },
    })
}

fn enabled() -> Value {
    json!({ "underpass.io/mode": "enabled" })
}

fn with(mut object: Value, pointer: &str, value: Value) -> Value {
    let (parent, field) = pointer.rsplit_once('/').unwrap();
    object.pointer_mut(parent).unwrap_or_else(|| panic!("no {parent}"))[field] = value;
    object
}

fn service(ip: &str) -> Value {
    json!({
        "kind": "Service",
        "metadata": { "namespace": "shop", "name": "web" },
        "spec": { "type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip],
            "ports": [{ "name": "http", "protocol": "TCP", "port": 80 }, { "name": "dns", "protocol": "UDP", "port": 53 }] },
    })
}

fn slice(endpoints: Value) -> Value {
    json!({
        "kind": "EndpointSlice",
        "metadata": { "namespace": "shop", "name": "web-1", "labels": { "kubernetes.io/service-name": "web" } },
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{ "name": "http", "protocol": "TCP", "port": 8080 }],
    })
}

fn endpoint(pod: &str, ip: &str) -> Value {
    json!({ "addresses": [ip], "conditions": { "ready": true }, "nodeName": "node-b",
        "targetRef": { "kind": "Pod", "namespace": "shop", "name": pod } })
}

/// A scene whose namespace is known, and says nothing about the mesh.
fn shop() -> Scene {
    let mut scene = Scene::new();
    scene.apply(json!({ "kind": "Namespace", "metadata": { "name": "shop" } }));
    scene
}

fn snapshot(scene: &mut Scene) -> Snapshot {
    let compiled = scene.compile();
    assert!(compiled.problems.is_empty(), "{:?}", compiled.problems);
    compiled.snapshot
}

fn at(snapshot: &Snapshot, address: &str) -> Resolution {
    snapshot.resolve(address.parse().unwrap())
}

fn workload_at(snapshot: &Snapshot, address: &str) -> Option<(String, Protocol)> {
    match at(snapshot, address) {
        Resolution::Workload(w) => Some((w.identity.to_string(), w.protocol)),
        _ => None,
    }
}

fn service_at(snapshot: &Snapshot, address: &str) -> Option<std::sync::Arc<Service>> {
    match at(snapshot, address) {
        Resolution::Service(s) => Some(s),
        _ => None,
    }
}

/// Where connections to port 80 of the service may go.
fn targets(snapshot: &Snapshot, vip: &str) -> Vec<String> {
    let Some(service) = service_at(snapshot, vip) else { return Vec::new() };
    let mut targets: Vec<_> = service
        .endpoints
        .iter()
        .filter_map(|e| {
            Some(format!("{} {}:{}", e.workload.protocol, e.workload.addresses[0], service.target_port(e, 80)?))
        })
        .collect();
    targets.sort();
    targets
}

#[test]
fn pods_with_the_label_are_workloads_and_others_are_left_alone() {
    let mut scene = shop();
    scene.apply(pod("in", "10.0.0.1", enabled()));
    scene.apply(pod("ambient", "10.0.0.2", json!({ "istio.io/dataplane-mode": "ambient" })));
    scene.apply(pod("out", "10.0.0.3", json!({})));
    scene.apply(with(pod("host", "192.0.2.9", enabled()), "/spec/hostNetwork", json!(true)));
    scene.apply(with(pod("done", "10.0.0.4", enabled()), "/status/phase", json!("Succeeded")));
    scene.apply(with(
        pod("sidecar", "10.0.0.5", enabled()),
        "/metadata/annotations",
        json!({ "sidecar.istio.io/status": "{}" }),
    ));
    let s = snapshot(&mut scene);
    let identity = "spiffe://td.test/ns/shop/sa/web".to_owned();
    assert_eq!(workload_at(&s, "10.0.0.1"), Some((identity.clone(), Protocol::Underpass)));
    assert_eq!(workload_at(&s, "10.0.0.2"), Some((identity, Protocol::Underpass)));
    for other in ["10.0.0.3", "192.0.2.9", "10.0.0.4", "10.0.0.5"] {
        assert_eq!(workload_at(&s, other), None, "{other}");
    }
}

#[test]
fn a_namespace_brings_its_pods_in_and_a_pod_may_stay_out() {
    let mut scene = Scene::new();
    scene.apply(json!({ "kind": "Namespace", "metadata": { "name": "shop", "labels": enabled() } }));
    scene.apply(pod("a", "10.0.0.1", json!({})));
    scene.apply(pod("b", "10.0.0.2", json!({ "underpass.io/mode": "disabled" })));
    scene.apply(pod("c", "10.0.0.3", json!({ "istio.io/dataplane-mode": "none" })));
    let s = snapshot(&mut scene);
    assert!(workload_at(&s, "10.0.0.1").is_some());
    assert_eq!((workload_at(&s, "10.0.0.2"), workload_at(&s, "10.0.0.3")), (None, None));
}

#[test]
fn an_address_that_two_pods_claim_belongs_to_the_one_that_lives() {
    let mut scene = shop();
    let old = with(pod("old", "10.0.0.1", enabled()), "/metadata/deletionTimestamp", json!("2026-01-02T00:00:00Z"));
    scene.apply(with(old, "/metadata/creationTimestamp", json!("2026-02-01T00:00:00Z")));
    scene.apply(with(pod("new", "10.0.0.1", enabled()), "/spec/serviceAccountName", json!("new")));
    let s = scene.compile().snapshot;
    assert_eq!(workload_at(&s, "10.0.0.1").unwrap().0, "spiffe://td.test/ns/shop/sa/new");
}

#[test]
fn both_families_of_a_pod() {
    let mut scene = Scene::new();
    let ips = json!([{ "ip": "10.0.0.1" }, { "ip": "fd00::1" }]);
    scene.apply(with(pod("a", "10.0.0.1", enabled()), "/status/podIPs", ips));
    let s = snapshot(&mut scene);
    assert!(workload_at(&s, "10.0.0.1").is_some() && workload_at(&s, "fd00::1").is_some());
}

#[test]
fn a_service_with_endpoints_in_the_mesh_is_captured_and_others_are_kube_proxys() {
    let mut scene = shop();
    scene.apply(service("10.96.0.1"));
    assert!(service_at(&snapshot(&mut scene), "10.96.0.1").is_none(), "no endpoints");
    scene.apply(pod("a", "10.0.0.1", json!({})));
    scene.apply(slice(json!([endpoint("a", "10.0.0.1")])));
    assert!(service_at(&snapshot(&mut scene), "10.96.0.1").is_none(), "nothing of the mesh");
    scene.apply(slice(json!([endpoint("a", "10.0.0.1"), endpoint("b", "10.0.0.2"), endpoint("unknown", "10.0.0.3")])));
    assert!(service_at(&snapshot(&mut scene), "10.96.0.1").is_some(), "somebody who may be in the mesh");
    scene.apply(pod("b", "10.0.0.2", enabled()));
    let s = snapshot(&mut scene);
    assert_eq!(&*service_at(&s, "10.96.0.1").unwrap().hostname, "web.shop.svc.cluster.local");
    assert_eq!(
        targets(&s, "10.96.0.1"),
        ["plain 10.0.0.1:8080", "underpass 10.0.0.2:8080"],
        "an unknown pod is nobody"
    );
    assert!(at(&s, "10.0.0.1").is_unknown(), "a pod outside of the mesh is not captured for itself");
    scene.delete(service("10.96.0.1"));
    assert!(service_at(&snapshot(&mut scene), "10.96.0.1").is_none());
}

#[test]
fn services_without_a_virtual_address_have_none_here() {
    let mut scene = Scene::new();
    scene.apply(pod("a", "10.0.0.1", enabled()));
    scene.apply(slice(json!([endpoint("a", "10.0.0.1")])));
    scene.apply(service("None"));
    scene.apply(with(with(service("10.96.0.2"), "/metadata/name", json!("ext")), "/spec/type", json!("ExternalName")));
    assert_eq!(snapshot(&mut scene).services().len(), 0);
}

#[test]
fn endpoints_that_are_not_ready_are_used_only_when_they_end_and_nothing_else_is_there() {
    let conditions = |pod, ip, conditions: Value| with(endpoint(pod, ip), "/conditions", conditions);
    let mut scene = Scene::new();
    scene.apply(service("10.96.0.1"));
    for (name, ip) in [("a", "10.0.0.1"), ("b", "10.0.0.2"), ("c", "10.0.0.3")] {
        scene.apply(pod(name, ip, enabled()));
    }
    let unready = conditions("a", "10.0.0.1", json!({ "ready": false, "serving": false, "terminating": false }));
    let draining = conditions("b", "10.0.0.2", json!({ "ready": false, "serving": true, "terminating": true }));
    scene.apply(slice(json!([unready, draining, endpoint("c", "10.0.0.3")])));
    assert_eq!(targets(&snapshot(&mut scene), "10.96.0.1"), ["underpass 10.0.0.3:8080"]);
    scene.apply(slice(json!([unready, draining])));
    assert_eq!(targets(&snapshot(&mut scene), "10.96.0.1"), ["underpass 10.0.0.2:8080"]);
    scene.apply(slice(json!([unready])));
    assert!(targets(&snapshot(&mut scene), "10.96.0.1").is_empty());
    // publishNotReadyAddresses: the slices then say that everybody is ready; null means ready as well.
    scene.apply(slice(json!([conditions("a", "10.0.0.1", json!({}))])));
    assert_eq!(targets(&snapshot(&mut scene), "10.96.0.1"), ["underpass 10.0.0.1:8080"]);
}

/// Only when asked for, and only where the configuration lists none.
#[test]
fn the_nodes_addresses_open_nothing_by_themselves() {
    let mut scene = Scene::new();
    scene.apply(json!({ "kind": "Node", "metadata": { "name": NODE },
        "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.1" }, { "type": "Hostname", "address": "a" }] } }));
    let address = |text: &str| text.parse::<std::net::IpAddr>().unwrap();
    assert!(snapshot(&mut scene).settings.probes.node_addresses.is_empty());
    scene.base.settings.probes.from_node_addresses = true;
    assert_eq!(snapshot(&mut scene).settings.probes.node_addresses, [address("192.0.2.1")]);
    scene.base.settings.probes.node_addresses = vec![address("192.0.2.9")];
    assert_eq!(snapshot(&mut scene).settings.probes.node_addresses, [address("192.0.2.9")]);
    scene.base.settings.probes.from_node_addresses = false;
    assert_eq!(snapshot(&mut scene).settings.probes.node_addresses, [address("192.0.2.9")]);
}

#[test]
fn traffic_policies_and_hints() {
    let mut scene = Scene::new();
    scene.apply(json!({ "kind": "Node", "metadata": { "name": NODE, "labels": { "topology.kubernetes.io/zone": "z1" } },
        "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.1" }, { "type": "Hostname", "address": "a" }] } }));
    scene.apply(service("10.96.0.1"));
    for (name, ip) in [("a", "10.0.0.1"), ("b", "10.0.0.2")] {
        scene.apply(pod(name, ip, enabled()));
    }
    let zone = |e: Value, z: &str| with(e, "/hints", json!({ "forZones": [{ "name": z }] }));
    let (a, b) = (endpoint("a", "10.0.0.1"), endpoint("b", "10.0.0.2"));
    scene.apply(slice(json!([zone(a.clone(), "z1"), zone(b.clone(), "z2")])));
    let s = snapshot(&mut scene);
    assert_eq!(targets(&s, "10.96.0.1"), ["underpass 10.0.0.1:8080"]);
    scene.apply(slice(json!([zone(a.clone(), "z1"), b.clone()])));
    assert_eq!(targets(&snapshot(&mut scene), "10.96.0.1").len(), 2, "an endpoint without hints turns them off");
    scene.apply(slice(json!([zone(a.clone(), "z3"), zone(b.clone(), "z2")])));
    assert_eq!(targets(&snapshot(&mut scene), "10.96.0.1").len(), 2, "nothing for this zone");

    scene.apply(with(service("10.96.0.1"), "/spec/internalTrafficPolicy", json!("Local")));
    assert!(targets(&snapshot(&mut scene), "10.96.0.1").is_empty(), "none on this node");
    scene.apply(slice(json!([a, with(b, "/nodeName", json!(NODE))])));
    assert_eq!(targets(&snapshot(&mut scene), "10.96.0.1"), ["underpass 10.0.0.2:8080"]);
}

#[test]
fn named_ports_may_differ_between_slices() {
    let mut scene = Scene::new();
    scene.apply(service("10.96.0.1"));
    scene.apply(pod("a", "10.0.0.1", enabled()));
    scene.apply(pod("b", "10.0.0.2", enabled()));
    scene.apply(slice(json!([endpoint("a", "10.0.0.1")])));
    let other = with(slice(json!([endpoint("b", "10.0.0.2")])), "/metadata/name", json!("web-2"));
    scene.apply(with(other.clone(), "/ports/0/port", json!(9090)));
    assert_eq!(targets(&snapshot(&mut scene), "10.96.0.1"), ["underpass 10.0.0.1:8080", "underpass 10.0.0.2:9090"]);
    scene.apply(with(other, "/ports", json!([])));
    assert_eq!(targets(&snapshot(&mut scene), "10.96.0.1"), ["underpass 10.0.0.1:8080"], "a port that is not there");
}

#[test]
fn modes_come_from_the_narrowest_and_oldest() {
    let mut scene = Scene::new();
    let authentication = |namespace: &str, name: &str, day: u32, spec: Value| {
        json!({ "kind": "PeerAuthentication", "metadata": { "namespace": namespace, "name": name,
            "creationTimestamp": format!("2026-01-{day:02}T00:00:00Z") }, "spec": spec })
    };
    let strict = json!({ "mtls": { "mode": "STRICT" } });
    let here = with(
        pod("a", "10.0.0.1", json!({ "underpass.io/mode": "enabled", "app": "a" })),
        "/spec/nodeName",
        json!(NODE),
    );
    scene.apply(here);
    let mode = |scene: &mut Scene| {
        let s = scene.compile().snapshot;
        let w = std::sync::Arc::clone(s.workload_at("10.0.0.1".parse().unwrap()).unwrap());
        (w.mode, s.workload_policy(&w.key).mode_set_by, w.port_modes.clone())
    };
    assert_eq!(mode(&mut scene).0, InboundMode::Permissive);
    scene.apply(authentication("istio-system", "default", 1, strict.clone()));
    assert_eq!(mode(&mut scene), (InboundMode::Strict, ModeSource::Mesh, vec![]));
    scene.apply(authentication("shop", "old", 2, json!({ "mtls": { "mode": "PERMISSIVE" } })));
    scene.apply(authentication("shop", "young", 3, strict.clone()));
    assert_eq!(mode(&mut scene), (InboundMode::Permissive, ModeSource::Namespace, vec![]));
    scene.apply(authentication(
        "shop",
        "a",
        4,
        json!({ "selector": { "matchLabels": { "app": "a" } }, "mtls": { "mode": "STRICT" },
            "portLevelMtls": { "9090": { "mode": "DISABLE" }, "8080": { "mode": "STRICT" } } }),
    ));
    let (of, set_by, ports) = mode(&mut scene);
    assert_eq!((of, set_by), (InboundMode::Strict, ModeSource::Workload));
    assert_eq!(ports.iter().map(|p| (p.port, p.mode)).collect::<Vec<_>>(), [(9090, InboundMode::Permissive)]);
    scene.apply(authentication("shop", "old", 2, json!({ "mtls": { "mode": "SOMETIMES" } })));
    scene.delete(authentication("shop", "a", 4, json!({})));
    assert_eq!(mode(&mut scene).0, InboundMode::Strict, "what cannot be read restricts");
    let problems = scene.compile().problems;
    assert!(
        problems.iter().any(|p| p.object == "PeerAuthentication shop/old" && p.problem.contains("SOMETIMES")),
        "{problems:?}"
    );
}

#[test]
fn policies_are_read_as_istio_writes_them() {
    let mut scene = Scene::new();
    let policy = |name: &str, spec: Value| json!({ "kind": "AuthorizationPolicy", "metadata": { "namespace": "shop", "name": name }, "spec": spec });
    scene.apply(policy(
        "good",
        json!({ "selector": { "matchLabels": { "app": "a" } }, "action": "ALLOW",
        "rules": [{ "from": [{ "source": { "principals": ["td.test/ns/shop/sa/web"] } }],
            "to": [{ "operation": { "ports": ["8080"] } }] }] }),
    ));
    scene.apply(policy("http", json!({ "rules": [{ "to": [{ "operation": { "methods": ["GET"] } }] }] })));
    scene.apply(policy("empty", Value::Null));
    scene.apply(policy("waypoint", json!({ "targetRefs": [{ "kind": "Gateway", "name": "w" }], "action": "DENY" })));
    scene.apply(policy(
        "bad",
        json!({ "selector": { "matchLabels": { "app": "a" } },
        "rules": [{ "to": [{ "operation": { "ports": ["http"] } }] }] }),
    ));
    let compiled = scene.compile();
    let status = |name: &str| {
        let found = compiled.snapshot.policies().find(|p| *p.key.name == *name);
        found.map(|p| (p.status(), p.selector.0.len()))
    };
    assert_eq!(status("good"), Some((PolicyStatus::Active, 1)));
    assert_eq!(status("empty"), Some((PolicyStatus::Active, 0)));
    assert_eq!(status("http"), Some((PolicyStatus::Partial { ignored: vec!["methods".into()] }, 0)));
    assert_eq!(status("waypoint"), None);
    let Some((PolicyStatus::Invalid { reason }, 1)) = status("bad") else { panic!("{:?}", status("bad")) };
    assert!(reason.contains("rules[0].to[0].operation.ports[0]") && reason.contains("\"http\" is no port"), "{reason}");
    let named: Vec<_> = compiled.problems.iter().map(|p| p.object.as_str()).collect();
    assert_eq!(named, ["AuthorizationPolicy shop/bad", "AuthorizationPolicy shop/waypoint"]);
}

#[test]
fn what_is_wrong_is_said_and_takes_nothing_else_with_it() {
    let mut scene = Scene::new();
    let here = with(pod("a", "10.0.0.1", enabled()), "/spec/nodeName", json!(NODE));
    let annotations =
        json!({ "underpass.io/exclude-outbound-ports": "5432,x", "underpass.io/exclude-inbound-ports": "9090" });
    scene.apply(with(here, "/metadata/annotations", annotations));
    scene.apply(pod("loop", "127.0.0.5", enabled()));
    scene.apply(pod("b", "10.0.0.2", enabled()));
    let compiled = scene.compile();
    assert!(!compiled.complete, "no process of pod a exists");
    let said = |object: &str, text: &str| {
        let found = compiled.problems.iter().any(|p| p.object == object && p.problem.contains(text));
        assert!(found, "{object} {text}: {:?}", compiled.problems);
    };
    said("Pod shop/a", "\"x\": it is no port");
    said("Pod shop/a", "processes were not found");
    said("Pod shop/loop", "loopback");
    assert!(workload_at(&compiled.snapshot, "10.0.0.2").is_some());
    assert!(workload_at(&compiled.snapshot, "10.0.0.1").is_some(), "known to others, although not captured yet");
}

#[test]
fn an_unchanged_pod_is_the_same_workload() {
    let mut scene = Scene::new();
    scene.apply(pod("a", "10.0.0.1", enabled()));
    let first = snapshot(&mut scene);
    assert!(!scene.apply(with(pod("a", "10.0.0.1", enabled()), "/metadata/resourceVersion", json!("7"))));
    let second = snapshot(&mut scene);
    let of = |s: &Snapshot| std::sync::Arc::as_ptr(s.workload_at("10.0.0.1".parse().unwrap()).unwrap());
    assert_eq!(of(&first), of(&second));
    assert!(first.says_the_same(&second));
}
