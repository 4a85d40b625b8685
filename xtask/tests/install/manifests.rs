//! What the tests put into the cluster.

use serde_json::{Value, json};

/// The image with `testbed-app`.
pub(crate) const APP: &str = "localhost/testbed-app:1";
/// Port of the echo server.
pub(crate) const PORT: u16 = 8080;

/// A namespace.
pub(crate) fn namespace(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } })
}

/// A pod on a node that runs `testbed-app` with arguments.
pub(crate) fn pod(namespace: &str, name: &str, node: &str, labels: &Value, arguments: &[&str]) -> Value {
    let mut spec = app(arguments);
    spec["nodeName"] = json!(node);
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name, "namespace": namespace, "labels": labels },
        "spec": spec,
    })
}

/// What a pod is that runs `testbed-app`. It goes on serving until it is killed, a second after it was told to end: so do those that end orderly.
pub(crate) fn app(arguments: &[&str]) -> Value {
    json!({
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": false,
        "containers": [{ "name": "app", "image": APP, "imagePullPolicy": "Never", "args": arguments }],
    })
}

/// Arguments of an echo server.
pub(crate) fn echo() -> [&'static str; 2] {
    ["serve", "[::]:8080"]
}

/// A service for pods with the label `app`.
pub(crate) fn service(namespace: &str, name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": name, "namespace": namespace },
        "spec": { "selector": { "app": name }, "ports": [{ "port": PORT }] },
    })
}

/// Many objects as one.
pub(crate) fn list(items: &[Value]) -> String {
    json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string()
}
