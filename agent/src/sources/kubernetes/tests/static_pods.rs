//! Pods that their kubelet runs by itself.

use std::{net::IpAddr, sync::Arc};

use serde_json::{Value, json};

use super::support::{NODE, Scene};
use crate::{
    mesh::{Protocol, Resolution, Snapshot},
    sources::kubernetes::{attachments::Attached, records::Key},
};

const HASH: &str = "0123456789abcdef0123456789abcdef";

/// A pod of namespace `shop`, whose label asks for everybody in it.
fn pod(name: &str, ip: &str, node: &str) -> Value {
    json!({
        "kind": "Pod", "metadata": { "namespace": "shop", "name": name, "uid": format!("uid-{name}") },
        "spec": { "nodeName": node, "serviceAccountName": "web" },
        "status": { "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }] },
    })
}

fn mirror(mut pod: Value) -> Value {
    pod["metadata"]["annotations"] = json!({ "kubernetes.io/config.mirror": HASH, "kubernetes.io/config.hash": HASH });
    pod
}

fn nameless(mut pod: Value) -> Value {
    pod["spec"].as_object_mut().unwrap().remove("serviceAccountName");
    pod
}

fn scene() -> Scene {
    let mut scene = Scene::new();
    let labels = json!({ "underpass.io/mode": "enabled" });
    scene.apply(json!({ "kind": "Namespace", "metadata": { "name": "shop", "labels": labels } }));
    scene
}

fn is_workload(snapshot: &Snapshot, address: &str) -> bool {
    matches!(snapshot.resolve(address.parse::<IpAddr>().unwrap()), Resolution::Workload(_))
}

#[test]
fn they_are_outside_of_the_mesh_and_their_own_node_says_so() {
    for node in ["node-b", NODE] {
        let mut scene = scene();
        scene.apply(pod("in", "10.0.0.1", "node-b"));
        scene.apply(mirror(pod("named", "10.0.0.2", node)));
        scene.apply(mirror(nameless(pod("mirror", "10.0.0.3", node))));
        scene.apply(nameless(pod("nameless", "10.0.0.4", node)));
        let mut owned = pod("owned", "10.0.0.5", node);
        owned["metadata"]["ownerReferences"] =
            json!([{ "apiVersion": "v1", "kind": "Node", "name": node, "uid": "n" }]);
        scene.apply(owned);
        let compiled = scene.compile();
        assert!(is_workload(&compiled.snapshot, "10.0.0.1"), "the control");
        for address in ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"] {
            assert!(!is_workload(&compiled.snapshot, address), "{address} on {node}");
        }
        let mut told: Vec<_> = compiled.problems.iter().map(|p| (p.object.as_str(), p.problem.as_str())).collect();
        told.sort_unstable();
        if node != NODE {
            assert_eq!(told, [], "other nodes have their own agents");
            continue;
        }
        let objects: Vec<_> = told.iter().map(|(object, _)| *object).collect();
        assert_eq!(objects, ["Pod shop/mirror", "Pod shop/named", "Pod shop/nameless", "Pod shop/owned"]);
        for (object, problem) in told {
            let why = if object == "Pod shop/nameless" {
                "without serviceAccountName"
            } else {
                "static pods have no identity"
            };
            assert!(problem.contains("outside of the mesh") && problem.contains(why), "{object}: {problem}");
        }
        assert!(compiled.complete, "nobody looks for their processes");
    }
}

#[test]
fn one_that_is_not_meant_to_be_in_the_mesh_is_no_problem() {
    let mut scene = scene();
    let mut out = mirror(pod("out", "10.0.0.2", NODE));
    out["metadata"]["labels"] = json!({ "underpass.io/mode": "disabled" });
    scene.apply(out);
    let mut host = mirror(pod("host", "192.0.2.1", NODE));
    host["spec"]["hostNetwork"] = json!(true);
    scene.apply(host);
    let compiled = scene.compile();
    assert!(compiled.problems.is_empty(), "{:?}", compiled.problems);
}

/// It is dialled as any other pod outside of the mesh, never by the tunnel.
#[test]
fn as_an_endpoint_it_is_dialled_in_plaintext() {
    let mut scene = scene();
    scene.apply(pod("in", "10.0.0.1", "node-b"));
    scene.apply(mirror(nameless(pod("m", "10.0.0.2", "node-b"))));
    scene.apply(json!({ "kind": "Service", "metadata": { "namespace": "shop", "name": "web" },
        "spec": { "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "ports": [{ "name": "http", "port": 80 }] } }));
    let endpoint = |name: &str, ip: &str| {
        json!({ "addresses": [ip], "conditions": { "ready": true },
            "targetRef": { "kind": "Pod", "namespace": "shop", "name": name } })
    };
    scene.apply(json!({ "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": { "namespace": "shop", "name": "web-1", "labels": { "kubernetes.io/service-name": "web" } },
        "endpoints": [endpoint("in", "10.0.0.1"), endpoint("m", "10.0.0.2")],
        "ports": [{ "name": "http", "port": 8080 }] }));
    let snapshot = scene.compile().snapshot;
    let Resolution::Service(service) = snapshot.resolve("10.96.0.1".parse().unwrap()) else { panic!("no service") };
    let mut endpoints: Vec<_> =
        service.endpoints.iter().map(|e| (e.workload.addresses[0].to_string(), e.workload.protocol)).collect();
    endpoints.sort_unstable_by_key(|(address, _)| address.clone());
    assert_eq!(endpoints, [("10.0.0.1".into(), Protocol::Underpass), ("10.0.0.2".into(), Protocol::Plain)]);
}

/// What the CNI plugin hands over names the kubelet's UID, which the mirror pod has as an annotation.
#[test]
fn a_sandbox_is_matched_by_the_hash_of_the_manifest() {
    let mut scene = scene();
    scene.apply(mirror(nameless(pod("m", "10.0.0.2", NODE))));
    scene.apply(pod("in", "10.0.0.1", NODE));
    let sandbox = |uid: &str| Attached { uid: Some(uid.to_owned()), container: "c".into(), addresses: Vec::new() };
    let record = |name: &str| {
        let key = Key { namespace: "shop".into(), name: name.into() };
        Arc::clone(scene.cluster.pods.get(&key).expect("the pod"))
    };
    assert!(sandbox(HASH).is(&record("m")) && sandbox("uid-m").is(&record("m")));
    assert!(!sandbox("another").is(&record("m")));
    assert!(!sandbox(HASH).is(&record("in")));
    // The annotation means nothing on a pod that is no static one.
    let mut forged = pod("forged", "10.0.0.3", NODE);
    forged["metadata"]["annotations"] = json!({ "kubernetes.io/config.hash": HASH });
    scene.apply(forged);
    let key = Key { namespace: "shop".into(), name: "forged".into() };
    let forged = Arc::clone(scene.cluster.pods.get(&key).expect("the pod"));
    assert!(!sandbox(HASH).is(&forged) && is_workload(&scene.compile().snapshot, "10.0.0.3"));
}
