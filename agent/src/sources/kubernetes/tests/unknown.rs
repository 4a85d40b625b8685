//! What is not known yet is captured and not dialled.

#![allow(clippy::needless_pass_by_value)] // `json!` written in place reads better than a reference to it

use serde_json::{Value, json};

use super::support::{NODE, Scene};
use crate::mesh::{Protocol, Resolution, Service, Snapshot};

const VIP: &str = "10.96.0.1";

fn shop() -> Scene {
    let mut scene = Scene::new();
    scene.apply(namespace("shop", json!({})));
    scene.apply(service("web", VIP));
    scene
}

fn namespace(name: &str, labels: Value) -> Value {
    json!({ "kind": "Namespace", "metadata": { "name": name, "labels": labels } })
}

fn service(name: &str, vip: &str) -> Value {
    json!({ "kind": "Service", "metadata": { "namespace": "shop", "name": name },
        "spec": { "clusterIP": vip, "clusterIPs": [vip], "ports": [{ "name": "http", "port": 80 }] } })
}

fn pod(name: &str, ips: &[&str], is_in: bool) -> Value {
    let ips: Vec<_> = ips.iter().map(|ip| json!({ "ip": ip })).collect();
    let labels = if is_in { json!({ "underpass.io/mode": "enabled" }) } else { json!({}) };
    json!({ "kind": "Pod",
        "metadata": { "namespace": "shop", "name": name, "uid": format!("uid-{name}"), "labels": labels },
        "spec": { "nodeName": "node-b", "serviceAccountName": name, "containers": [{ "name": "c" }] },
        "status": { "phase": "Running", "podIPs": ips } })
}

fn slice(endpoints: &[Value]) -> Value {
    json!({ "kind": "EndpointSlice", "addressType": "IPv4", "ports": [{ "name": "http", "port": 8080 }],
        "metadata": { "namespace": "shop", "name": "web-1", "labels": { "kubernetes.io/service-name": "web" } },
        "endpoints": endpoints })
}

/// An endpoint that names its pod.
fn endpoint(pod: &str, ip: &str) -> Value {
    json!({ "addresses": [ip], "conditions": { "ready": true },
        "targetRef": { "kind": "Pod", "name": pod, "uid": format!("uid-{pod}") } })
}

/// An endpoint that names nobody.
fn bare(ip: &str) -> Value {
    json!({ "addresses": [ip], "conditions": { "ready": true } })
}

fn without(mut object: Value, pointer: &str, field: &str) -> Value {
    object.pointer_mut(pointer).and_then(Value::as_object_mut).expect("an object").remove(field);
    object
}

fn web(snapshot: &Snapshot) -> Option<std::sync::Arc<Service>> {
    match snapshot.resolve(VIP.parse().unwrap()) {
        Resolution::Service(service) => Some(service),
        _ => None,
    }
}

/// Where connections to the service may go, and for whom they wait.
fn targets(scene: &mut Scene) -> Option<(Vec<String>, Option<String>)> {
    let service = web(&scene.compile().snapshot)?;
    let mut targets: Vec<_> = service
        .endpoints
        .iter()
        .map(|e| {
            let (w, port) = (&e.workload, service.target_port(e, 80).unwrap());
            format!("{} {} {}:{port}", w.protocol, w.identity.service_account(), w.addresses[0])
        })
        .collect();
    targets.sort();
    Some((targets, service.awaited.as_ref().map(ToString::to_string)))
}

fn to(targets: &[&str], awaited: Option<&str>) -> (Vec<String>, Option<String>) {
    (targets.iter().map(|t| (*t).to_owned()).collect(), awaited.map(ToOwned::to_owned))
}

fn held(scene: &mut Scene, ip: &str) -> Option<bool> {
    let snapshot = scene.compile().snapshot;
    let address = ip.parse().unwrap();
    match snapshot.resolve(address) {
        Resolution::Held(held) => {
            assert!(snapshot.captures(address), "an address that is held is captured");
            Some(held.awaited)
        }
        _ => None,
    }
}

#[test]
fn an_endpoint_whose_pod_is_not_known_is_waited_for() {
    let mut scene = shop();
    scene.apply(slice(&[endpoint("a", "10.0.0.1")]));
    assert_eq!(targets(&mut scene), Some(to(&[], Some("Pod shop/a at 10.0.0.1"))));
    scene.apply(pod("a", &[], true));
    assert_eq!(targets(&mut scene), Some(to(&[], Some("Pod shop/a at 10.0.0.1"))), "a pod without an address");
    scene.apply(pod("a", &["10.0.0.9"], true));
    assert_eq!(targets(&mut scene), Some(to(&[], Some("Pod shop/a at 10.0.0.1"))), "a pod with another address");
    scene.apply(pod("a", &["10.0.0.1"], true));
    assert_eq!(targets(&mut scene), Some(to(&["underpass a 10.0.0.1:8080"], None)));
    scene.delete(pod("a", &["10.0.0.1"], true));
    assert_eq!(targets(&mut scene), Some(to(&[], Some("Pod shop/a at 10.0.0.1"))), "gone, and the slice has not heard");
    // One that is known to be outside is kube-proxy's.
    scene.apply(pod("a", &["10.0.0.1"], false));
    assert_eq!(targets(&mut scene), None);
    // Of several, those that are known are used.
    scene.apply(slice(&[endpoint("a", "10.0.0.1"), endpoint("b", "10.0.0.2")]));
    assert_eq!(targets(&mut scene), Some(to(&["plain a 10.0.0.1:8080"], Some("Pod shop/b at 10.0.0.2"))));
}

#[test]
fn a_pod_of_the_same_name_is_another_one() {
    let mut scene = shop();
    scene.apply(pod("a", &["10.0.0.1"], false));
    let mut next = endpoint("a", "10.0.0.1");
    next["targetRef"]["uid"] = json!("uid-next");
    scene.apply(slice(&[next]));
    assert_eq!(targets(&mut scene), Some(to(&[], Some("Pod shop/a at 10.0.0.1"))));
    let mut successor = pod("a", &["10.0.0.1"], true);
    successor["metadata"]["uid"] = json!("uid-next");
    scene.apply(successor);
    assert_eq!(targets(&mut scene), Some(to(&["underpass a 10.0.0.1:8080"], None)));
}

#[test]
fn an_endpoint_that_is_not_ready_yet_captures_its_service() {
    let mut scene = shop();
    scene.apply(pod("old", &["10.0.0.1"], false));
    scene.apply(slice(&[endpoint("old", "10.0.0.1")]));
    assert_eq!(targets(&mut scene), None);
    let mut coming = endpoint("new", "10.0.0.2");
    coming["conditions"]["ready"] = json!(false);
    scene.apply(slice(&[endpoint("old", "10.0.0.1"), coming]));
    assert_eq!(targets(&mut scene), Some(to(&["plain old 10.0.0.1:8080"], None)), "kube-proxy may see it ready first");
    scene.apply(pod("new", &["10.0.0.2"], false));
    assert_eq!(targets(&mut scene), None);
}

#[test]
fn an_endpoint_that_names_no_pod_is_looked_up_by_its_address() {
    let other = json!({ "addresses": ["10.0.0.1"], "targetRef": { "kind": "Node", "name": "n" } });
    let wrong_name = without(endpoint("b", "10.0.0.1"), "/targetRef", "uid");
    for endpoint in [bare("10.0.0.1"), other, wrong_name] {
        let mut scene = shop();
        scene.apply(pod("b", &["10.0.0.2"], false));
        scene.apply(slice(std::slice::from_ref(&endpoint)));
        assert_eq!(targets(&mut scene), None, "nobody in the mesh has the address");
        scene.apply(pod("a", &["10.0.0.1"], true));
        assert_eq!(targets(&mut scene), Some(to(&["underpass a 10.0.0.1:8080"], None)), "{endpoint}");
        scene.apply(pod("a", &["10.0.0.7"], true));
        assert_eq!(targets(&mut scene), None, "{endpoint}");
        scene.apply(pod("a", &["10.0.0.1"], false));
        assert_eq!(targets(&mut scene), None, "{endpoint}");
    }
    // Beside one that is named.
    let mut scene = shop();
    scene.apply(pod("a", &["10.0.0.1"], true));
    scene.apply(pod("b", &["10.0.0.2"], true));
    scene.apply(slice(&[bare("10.0.0.1"), endpoint("b", "10.0.0.2"), bare("192.0.2.9")]));
    let expected = ["plain default 192.0.2.9:8080", "underpass a 10.0.0.1:8080", "underpass b 10.0.0.2:8080"];
    assert_eq!(targets(&mut scene), Some(to(&expected, None)));
}

#[test]
fn an_address_of_a_pod_that_cannot_be_reached_is_nobodys_to_dial() {
    let mut scene = shop();
    let mut broken = pod("a", &["10.0.0.1"], true);
    broken["spec"]["serviceAccountName"] = json!("no account");
    scene.apply(broken);
    assert_eq!(held(&mut scene, "10.0.0.1"), Some(false));
    for endpoint in [endpoint("a", "10.0.0.1"), bare("10.0.0.1")] {
        scene.apply(slice(&[endpoint]));
        assert_eq!(targets(&mut scene), Some(to(&[], None)));
    }
    let plain = &scene.compile().snapshot;
    let from = crate::mesh::WorkloadKey { namespace: "shop".into(), name: "x".into() };
    assert!(!plain.allows_plaintext(&from, "10.0.0.1:8080".parse().unwrap()));
    assert!(!plain.allows_plaintext(&from, "10.96.0.1:80".parse().unwrap()), "a service's address");
    assert!(plain.allows_plaintext(&from, "10.0.0.2:8080".parse().unwrap()));
    scene.apply(pod("a", &["10.0.0.1"], true));
    assert_eq!(held(&mut scene, "10.0.0.1"), None);
    assert_eq!(targets(&mut scene), Some(to(&["underpass a 10.0.0.1:8080"], None)));
    // An address that nobody could dial anyway is not captured: it would be the pods' own loopback.
    scene.apply(pod("b", &["127.0.0.5", "10.0.0.3"], true));
    assert_eq!((held(&mut scene, "127.0.0.5"), held(&mut scene, "10.0.0.3")), (None, Some(false)));
    scene.delete(pod("b", &[], true));
    assert_eq!(held(&mut scene, "10.0.0.3"), None);
}

#[test]
fn a_pod_of_a_namespace_that_is_not_known_may_be_in_the_mesh() {
    let mut scene = shop();
    let mut elsewhere = pod("a", &["10.0.0.1"], false);
    elsewhere["metadata"]["namespace"] = json!("new");
    scene.apply(elsewhere);
    let mut endpoint = endpoint("a", "10.0.0.1");
    endpoint["targetRef"]["namespace"] = json!("new");
    scene.apply(slice(&[endpoint]));
    assert_eq!(held(&mut scene, "10.0.0.1"), Some(true));
    assert_eq!(targets(&mut scene), Some(to(&[], Some("Pod new/a at 10.0.0.1"))));
    scene.apply(namespace("new", json!({ "istio.io/dataplane-mode": "ambient" })));
    assert_eq!(targets(&mut scene), Some(to(&["underpass a 10.0.0.1:8080"], None)));
    scene.apply(namespace("new", json!({})));
    // After the time between two modes.
    let later = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let snapshot = scene.compile_at(later).snapshot;
    assert!(web(&snapshot).is_none() && snapshot.resolve("10.0.0.1".parse().unwrap()).is_unknown());
}

#[test]
fn a_service_without_endpoints_is_captured_where_the_next_one_may_be_in_the_mesh() {
    let mut scene = shop();
    assert_eq!(targets(&mut scene), None, "nothing of the namespace is in the mesh");
    scene.apply(pod("a", &[], true));
    assert_eq!(targets(&mut scene), Some(to(&[], None)), "a pod of the namespace is");
    scene.delete(pod("a", &[], true));
    assert_eq!(targets(&mut scene), None);
    scene.apply(namespace("shop", json!({ "underpass.io/mode": "enabled" })));
    assert_eq!(targets(&mut scene), Some(to(&[], None)), "the namespace is");
    scene.apply(namespace("shop", json!({})));
    assert_eq!(targets(&mut scene), None);
    // One that had an endpoint in the mesh is remembered, until it has others.
    scene.apply(pod("a", &["10.0.0.1"], true));
    scene.apply(slice(&[endpoint("a", "10.0.0.1")]));
    assert_eq!(targets(&mut scene), Some(to(&["underpass a 10.0.0.1:8080"], None)));
    scene.apply(slice(&[]));
    scene.delete(pod("a", &["10.0.0.1"], true));
    assert_eq!(targets(&mut scene), Some(to(&[], None)));
    scene.apply(pod("b", &["10.0.0.2"], false));
    scene.apply(slice(&[endpoint("b", "10.0.0.2")]));
    assert_eq!(targets(&mut scene), None);
    scene.apply(slice(&[]));
    assert_eq!(targets(&mut scene), None);
}

#[test]
fn what_the_nodes_own_pod_is_does_not_matter() {
    let mut scene = shop();
    let mut here = pod("a", &["10.0.0.1"], true);
    here["spec"]["nodeName"] = json!(NODE);
    scene.apply(here);
    scene.apply(slice(&[bare("10.0.0.1")]));
    assert_eq!(targets(&mut scene), Some(to(&["underpass a 10.0.0.1:8080"], None)));
    let snapshot = scene.compile().snapshot;
    assert!(snapshot.workloads().all(|w| w.protocol == Protocol::Underpass));
}
