//! What vanishes, and who claims what another has: neither takes a pod out of the mesh.

use serde_json::{Value, json};

use super::support::{NODE, Scene};
use crate::{
    mesh::{Resolution, Snapshot},
    sources::kubernetes::{attachments::Attached, records::Key, watch::Seen},
};

/// A pod of the mesh on another node.
fn pod(name: &str, ip: &str) -> Value {
    json!({
        "kind": "Pod",
        "metadata": { "namespace": "shop", "name": name, "uid": format!("uid-{name}"),
            "labels": { "underpass.io/mode": "enabled" }, "creationTimestamp": "2026-01-01T00:00:00Z" },
        "spec": { "nodeName": "node-b", "serviceAccountName": name, "containers": [] },
        "status": { "phase": "Running", "podIPs": [{ "ip": ip }] },
    })
}

fn with(mut object: Value, path: &str, value: Value) -> Value {
    let (parent, field) = path.rsplit_once('/').unwrap();
    object.pointer_mut(parent).unwrap()[field] = value;
    object
}

/// Outside the mesh, on a third node, younger: what a kubelet can say of any address.
fn stranger(ip: &str) -> Value {
    let pod = with(pod("stranger", ip), "/metadata/labels", json!({}));
    with(pod, "/metadata/creationTimestamp", json!("2026-06-01T00:00:00Z"))
}

fn service(name: &str, vip: &str) -> Value {
    json!({ "kind": "Service", "metadata": { "namespace": "shop", "name": name },
        "spec": { "clusterIP": vip, "clusterIPs": [vip], "ports": [{ "name": "http", "port": 80 }] } })
}

fn slice(name: &str, pod: &str, ip: &str) -> Value {
    json!({ "kind": "EndpointSlice", "addressType": "IPv4", "ports": [{ "name": "http", "port": 8080 }],
        "metadata": { "namespace": "shop", "name": name, "labels": { "kubernetes.io/service-name": name } },
        "endpoints": [{ "addresses": [ip], "targetRef": { "kind": "Pod", "name": pod } }] })
}

fn at(snapshot: &Snapshot, address: &str) -> String {
    match snapshot.resolve(address.parse().unwrap()) {
        Resolution::Workload(w) => w.key.name.to_string(),
        Resolution::Service(s) => format!("service {}", s.name),
        Resolution::Held(held) => format!("held for {}", held.pod.name),
        Resolution::Unknown => "nobody".into(),
    }
}

/// Who has the address, and how many addresses are disputed.
fn compiled(scene: &mut Scene, address: &str) -> (String, usize) {
    let compiled = scene.compile();
    let told = compiled.problems.iter().filter(|p| p.problem.contains("claims address")).count();
    assert_eq!(told > 0, compiled.disputed > 0, "{:?}", compiled.problems);
    (at(&compiled.snapshot, address), compiled.disputed)
}

/// Every kind has been listed.
fn synced(scene: &mut Scene) {
    for kind in ["Pod", "Namespace", "Node", "Service", "EndpointSlice", "AuthorizationPolicy", "PeerAuthentication"] {
        scene.change(json!({ "kind": kind }), |_| Seen::ListEnds);
    }
}

#[test]
fn a_claim_takes_no_address_from_a_pod_that_has_it() {
    for node in ["node-b", NODE] {
        let mut scene = Scene::new();
        scene.apply(with(pod("victim", "10.0.0.1"), "/spec/nodeName", json!(node)));
        assert_eq!(compiled(&mut scene, "10.0.0.1"), ("victim".into(), 0));
        let younger = with(pod("x", "10.0.0.1"), "/metadata/creationTimestamp", json!("2026-06-01T00:00:00Z"));
        let older = with(pod("x", "10.0.0.1"), "/metadata/creationTimestamp", json!("2025-06-01T00:00:00Z"));
        for claimer in [stranger("10.0.0.1"), younger, older] {
            scene.apply(claimer.clone());
            assert_eq!(compiled(&mut scene, "10.0.0.1"), ("victim".into(), 1), "{node} {claimer}");
            scene.delete(claimer);
            assert_eq!(compiled(&mut scene, "10.0.0.1"), ("victim".into(), 0));
        }
    }
}

#[test]
fn what_was_disputed_stays_so_when_the_settings_change() {
    let mut scene = Scene::new();
    scene.apply(pod("victim", "10.0.0.1"));
    scene.compile();
    scene.apply(with(pod("x", "10.0.0.1"), "/metadata/creationTimestamp", json!("2025-06-01T00:00:00Z")));
    scene.base.settings.capture_all = true;
    assert_eq!(compiled(&mut scene, "10.0.0.1"), ("victim".into(), 1));
}

#[test]
fn who_is_in_the_mesh_has_the_address_when_nobody_had_it_before() {
    let mut scene = Scene::new();
    let older = with(stranger("10.0.0.1"), "/metadata/creationTimestamp", json!("2020-01-01T00:00:00Z"));
    scene.apply(older);
    scene.apply(pod("victim", "10.0.0.1"));
    assert_eq!(compiled(&mut scene, "10.0.0.1"), ("victim".into(), 1), "plaintext would be worse than a refusal");
}

#[test]
fn a_pod_that_ends_yields_to_a_live_one_of_the_mesh_only() {
    let mut scene = Scene::new();
    scene.apply(with(pod("old", "10.0.0.1"), "/metadata/deletionTimestamp", json!("2026-01-02T00:00:00Z")));
    assert_eq!(compiled(&mut scene, "10.0.0.1"), ("old".into(), 0));
    scene.apply(stranger("10.0.0.1"));
    assert_eq!(compiled(&mut scene, "10.0.0.1"), ("old".into(), 1));
    scene.apply(pod("new", "10.0.0.1"));
    assert_eq!(compiled(&mut scene, "10.0.0.1"), ("new".into(), 1));
}

#[test]
fn what_the_cni_plugin_handed_over_counts_more_than_any_status() {
    let mut scene = Scene::new();
    let here = |name: &str, created: &str| {
        let pod = with(pod(name, "10.0.0.1"), "/spec/nodeName", json!(NODE));
        with(pod, "/metadata/creationTimestamp", json!(created))
    };
    scene.apply(here("claims", "2025-01-01T00:00:00Z"));
    scene.apply(here("has", "2026-01-01T00:00:00Z"));
    assert_eq!(compiled(&mut scene, "10.0.0.1"), ("claims".into(), 1));
    let key = Key { namespace: "shop".into(), name: "has".into() };
    let addresses = vec!["10.0.0.1".parse().unwrap()];
    scene.cluster.attach(&key, Attached { uid: Some("uid-has".into()), container: "c".into(), addresses });
    assert_eq!(compiled(&mut scene, "10.0.0.1"), ("has".into(), 1));
}

#[test]
fn services_and_pods_do_not_take_addresses_from_each_other() {
    let mut scene = Scene::new();
    scene.apply(pod("a", "10.0.0.1"));
    scene.apply(service("web", "10.96.0.1"));
    scene.apply(slice("web", "a", "10.0.0.1"));
    assert_eq!(compiled(&mut scene, "10.96.0.1"), ("service web".into(), 0));
    // A kubelet says that its pod has the address of a service.
    scene.apply(pod("x", "10.96.0.1"));
    assert_eq!(compiled(&mut scene, "10.96.0.1"), ("service web".into(), 1));
    scene.delete(pod("x", "10.96.0.1"));
    assert_eq!(compiled(&mut scene, "10.96.0.1"), ("service web".into(), 0));
    // A service says that it has the address of a pod, beside one of its own.
    let mut greedy = service("greedy", "10.96.0.2");
    greedy["spec"]["clusterIPs"] = json!(["10.96.0.2", "10.0.0.1"]);
    scene.apply(greedy);
    scene.apply(slice("greedy", "a", "10.0.0.1"));
    assert_eq!(compiled(&mut scene, "10.0.0.1"), ("a".into(), 1));
    assert_eq!(compiled(&mut scene, "10.96.0.2").0, "service greedy", "the other address stays captured");
    // A pod of the host's network claims nothing.
    scene.apply(with(pod("host", "10.0.0.1"), "/spec/hostNetwork", json!(true)));
    assert_eq!(compiled(&mut scene, "10.0.0.1"), ("a".into(), 1));
}

#[test]
fn a_pod_leaves_by_its_labels_and_only_when_the_api_server_says_so() {
    let mut scene = Scene::new();
    let here = |choice: &str| {
        let pod = with(pod("a", "10.0.0.1"), "/spec/nodeName", json!(NODE));
        with(pod, "/metadata/labels", json!({ "underpass.io/mode": choice }))
    };
    let leaves = |snapshot: &Snapshot| snapshot.departures().includes(None, Some("uid-a"));
    scene.apply(json!({ "kind": "Namespace", "metadata": { "name": "shop" } }));
    scene.apply(here("disabled"));
    assert!(!leaves(&scene.compile().snapshot), "out of a copy");
    synced(&mut scene);
    let snapshot = scene.compile().snapshot;
    assert!(leaves(&snapshot) && snapshot.departures().in_sync);
    scene.apply(here("enabled"));
    assert!(!leaves(&scene.compile().snapshot));
    scene.delete(here("enabled"));
    let snapshot = scene.compile().snapshot;
    assert!(!leaves(&snapshot) && snapshot.workloads().next().is_none(), "a deletion is no decision");
    scene.cluster.leaving = true;
    assert!(leaves(&scene.compile().snapshot), "Underpass is removed");
}

#[test]
fn a_namespace_whose_object_vanished_takes_nobody_out() {
    let mut scene = Scene::new();
    let namespace = |labels: Value| json!({ "kind": "Namespace", "metadata": { "name": "shop", "labels": labels } });
    let unlabelled = |name: &str, ip: &str, node: &str| {
        let pod = with(pod(name, ip), "/metadata/labels", json!({}));
        with(pod, "/spec/nodeName", json!(node))
    };
    let enabled = json!({ "underpass.io/mode": "enabled" });
    scene.apply(namespace(enabled.clone()));
    scene.apply(unlabelled("here", "10.0.0.1", NODE));
    scene.apply(unlabelled("there", "10.0.0.2", "node-b"));
    synced(&mut scene);
    let now = |scene: &mut Scene| {
        let compiled = scene.compile();
        assert_eq!(compiled.due, None, "no time in between, in which plaintext is taken");
        let s = compiled.snapshot;
        (at(&s, "10.0.0.1"), at(&s, "10.0.0.2"), s.departures().includes(None, Some("uid-here")))
    };
    assert_eq!(now(&mut scene), ("here".into(), "there".into(), false));
    scene.delete(namespace(enabled.clone()));
    let (_, there, left) = now(&mut scene);
    assert_eq!((there.as_str(), left), ("there", false), "others dial it as before, and it has not left");
    let local = scene.compile().snapshot.local_workloads().count();
    assert_eq!(local, 0, "its node keeps it");
    scene.apply(namespace(enabled));
    assert_eq!(now(&mut scene), ("here".into(), "there".into(), false));
}
