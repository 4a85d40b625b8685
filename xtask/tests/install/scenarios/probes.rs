//! Kubelets ask pods how they are, in plaintext, also those that take none from others.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::cni::{delete, ready};
use crate::{
    manifests::{self, PORT},
    wait::{eventually, throughout},
    world::{READY, World},
};

/// The kinds of Istio's that Underpass reads.
const CRDS: &str = include_str!("../../../testbed/src/kube/crds/istio.yaml");
/// Longer than a pod with a probe that fails lives: [`FAILURES`] times a second.
const PROBED: Duration = Duration::from_secs(8);
const FAILURES: u32 = 3;
/// Port of busybox' server, which speaks HTTP.
const HTTP: u16 = 8081;

/// What a pod is asked, by its name. Kubernetes 1.20 has no probes that speak gRPC: there, servers are asked by a program of their own image, which
/// is a probe of the kind `exec` that dials the pod's own loopback.
fn probes() -> [(&'static str, Value); 3] {
    let request = format!("127.0.0.1:{PORT}");
    [
        (
            "asked-by-exec",
            json!({ "exec": { "command": ["/usr/bin/testbed-app", "request", request, "--timeout", "5"] } }),
        ),
        ("asked-by-http", json!({ "httpGet": { "path": "/", "port": HTTP } })),
        ("asked-by-tcp", json!({ "tcpSocket": { "port": PORT } })),
    ]
}

/// Pods with every kind of probe get ready and stay alive under STRICT; others cannot reach them in plaintext, pods of the mesh can.
pub(crate) fn of_strict_pods(world: &mut World) -> Result<()> {
    world.cluster.apply(CRDS)?;
    world.cluster.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"])?;
    world.cluster.apply(
        &json!({
            "apiVersion": "security.istio.io/v1beta1", "kind": "PeerAuthentication",
            "metadata": { "name": "default", "namespace": "shop" },
            "spec": { "mtls": { "mode": "STRICT" } },
        })
        .to_string(),
    )?;
    let [first, second] = world.node_names()?;
    let mut pods = Vec::new();
    for ((name, mut probe), node) in probes().into_iter().zip([&first, &second, &first]) {
        for (field, value) in [("periodSeconds", 1), ("timeoutSeconds", 10), ("failureThreshold", FAILURES)] {
            probe[field] = json!(value);
        }
        let mut pod = manifests::pod("shop", name, node, &json!({ "app": name }), &manifests::echo());
        let containers = &mut pod["spec"]["containers"];
        if name == "asked-by-http" {
            containers[0] = json!({
                "name": "app", "image": "localhost/busybox:1", "imagePullPolicy": "Never",
                "args": ["httpd", "-f", "-p", HTTP.to_string(), "-h", "/etc"],
            });
            // It has no page for `/`, so it is asked for a file that the kubelet makes.
            probe["httpGet"]["path"] = json!("/hosts");
        }
        containers[0]["readinessProbe"] = probe.clone();
        containers[0]["livenessProbe"] = probe;
        pods.push(pod);
    }
    world.cluster.apply(&manifests::list(&pods))?;
    let names = probes().map(|(name, _)| format!("shop/{name}"));
    for name in &names {
        eventually("a pod with probes", READY, || ready(world, name))?;
    }
    // The control: what is no probe does not get through.
    eventually("STRICT pods", READY, || {
        for server in ["shop/asked-by-tcp", "shop/far"] {
            ensure!(!reaches(world, "plain/outsider", server)?, "{server} takes plaintext");
            ensure!(reaches(world, "shop/client", server)?, "{server} cannot be reached through the mesh");
        }
        Ok(())
    })?;
    throughout("pods with probes", PROBED, || {
        for name in &names {
            ready(world, name)?;
            let restarts = &world.pod(name)?["status"]["containerStatuses"][0]["restartCount"];
            ensure!(restarts == 0, "{name} was restarted");
        }
        Ok(())
    })?;
    names.iter().try_for_each(|name| delete(world, name))?;
    world.cluster.kubectl(&["delete", "peerauthentication", "default", "--namespace=shop"])?;
    eventually("PERMISSIVE pods", READY, || {
        ensure!(reaches(world, "plain/outsider", "shop/far")?, "shop/far takes no plaintext");
        Ok(())
    })
}

/// Whether a pod gets an answer of another one's echo server.
fn reaches(world: &World, from: &str, to: &str) -> Result<bool> {
    let (namespace, pod) = from.split_once('/').expect("a pod is called NAMESPACE/NAME here");
    let (namespace, address) = (format!("--namespace={namespace}"), world.address(to)?);
    let exec = ["exec", &namespace, pod, "--", "testbed-app", "request", &address, "--timeout", "3"];
    Ok(world.cluster.try_kubectl(&exec)?.status.success())
}
