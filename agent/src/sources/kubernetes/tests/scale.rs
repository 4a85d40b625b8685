//! What a large cluster costs. A measurement: `cargo test -p underpass --release --lib kubernetes::tests::scale -- --ignored --nocapture`.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::support::{NODE, Scene};

/// Pods of the cluster, all in the mesh.
const PODS: usize = 50_000;
/// Of these on this node.
const LOCAL: usize = 1_000;
/// Endpoints of a service.
const PER_SERVICE: usize = 10;

fn address(i: usize) -> String {
    format!("10.{}.{}.{}", 1 + i / 62_500, (i / 250) % 250, 1 + i % 250)
}

fn pod(i: usize) -> Value {
    let node = if i < LOCAL { NODE.to_owned() } else { format!("node-{}", i % 200) };
    json!({
        "kind": "Pod",
        "metadata": { "namespace": format!("ns-{}", i % 100), "name": format!("web-{i}-6d4b75cb6d-x7k2p"),
            "uid": format!("8d2f6f0e-{i:012}"), "labels": { "app": format!("app-{}", i % 500),
            "underpass.io/mode": "enabled", "pod-template-hash": "6d4b75cb6d" } },
        "spec": { "nodeName": node, "serviceAccountName": format!("sa-{}", i % 50) },
        "status": { "phase": "Running", "podIP": address(i), "podIPs": [{ "ip": address(i) }] },
    })
}

/// Of all pods `i` with the same `i % SERVICES`, so that one namespace has them.
fn slice(service: usize, services: usize) -> Value {
    let endpoints = (0..PER_SERVICE).map(|k| {
        let i = service + k * services;
        json!({ "addresses": [address(i)], "conditions": { "ready": true },
            "targetRef": { "kind": "Pod", "namespace": format!("ns-{}", i % 100), "name": format!("web-{i}-6d4b75cb6d-x7k2p") } })
    });
    json!({
        "kind": "EndpointSlice",
        "metadata": { "namespace": format!("ns-{}", service % 100), "name": format!("s-{service}-abcde"),
            "labels": { "kubernetes.io/service-name": format!("s-{service}") } },
        "addressType": "IPv4", "endpoints": endpoints.collect::<Vec<_>>(),
        "ports": [{ "name": "http", "port": 8080 }],
    })
}

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[test]
#[ignore = "a measurement, see the module"]
fn fifty_thousand_endpoints() {
    let before = resident();
    let mut scene = Scene::new();
    for i in 0..PODS {
        scene.apply(pod(i));
    }
    let services = PODS / PER_SERVICE;
    for s in 0..services {
        let ip = format!("172.{}.{}.{}", 16 + s / 62_500, (s / 250) % 250, 1 + s % 250);
        scene.apply(json!({ "kind": "Service",
            "metadata": { "namespace": format!("ns-{}", s % 100), "name": format!("s-{s}") },
            "spec": { "clusterIP": ip, "clusterIPs": [ip], "ports": [{ "name": "http", "port": 80 }] } }));
        scene.apply(slice(s, services));
    }
    let known = resident();
    let first = Instant::now();
    let mut last = scene.compile().snapshot;
    let first = first.elapsed();
    assert_eq!((last.workloads().count(), last.services().len()), (PODS, services));
    let mut passes = Vec::new();
    for round in 0..20 {
        let mut moved = pod(LOCAL + round);
        moved["status"]["podIPs"] = json!([{ "ip": format!("10.200.0.{}", 1 + round) }]);
        moved["status"]["podIP"] = moved["status"]["podIPs"][0]["ip"].clone();
        let began = Instant::now();
        assert!(scene.apply(moved));
        let next = scene.compile().snapshot;
        assert!(!last.says_the_same(&next));
        last = next;
        passes.push(began.elapsed());
    }
    passes.sort();
    let (median, worst) = (passes[passes.len() / 2], *passes.last().unwrap_or(&Duration::ZERO));
    println!(
        "{PODS} pods, {services} services: first {first:?}, then per change {median:?} (worst {worst:?}); records {} MiB, with a snapshot {} MiB",
        known - before,
        resident() - before
    );
}
