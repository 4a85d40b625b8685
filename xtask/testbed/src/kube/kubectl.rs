//! What tests do with the API, most of it through kubectl.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{control_plane::ControlPlane, pki::User};
use crate::{
    addresses::{pod_v4, pod_v6},
    node::Node,
    process::{Output, Process},
};

/// How long a command may take.
const WITHIN: Duration = Duration::from_mins(2);

/// The custom resources of Istio that Underpass reads.
const CRDS: &str = include_str!("crds/istio.yaml");

impl ControlPlane {
    /// Runs kubectl as the administrator; its standard output, or an error with what it said.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.kubectl_spawn(arguments)?.output(WITHIN)?.success()
    }

    /// Starts kubectl as the administrator, for a command that goes on such as `get --watch`.
    pub fn kubectl_spawn(&self, arguments: &[&str]) -> Result<Process> {
        self.spawn(self.admin(), arguments)
    }

    /// Runs kubectl as `user`, with `input` on its standard input. The result may be a failure.
    pub fn kubectl_as(&self, user: &User, arguments: &[&str], input: &str) -> Result<Output> {
        let config = self.kubeconfig(user)?;
        let mut process = self.spawn(&config, arguments)?;
        process.write_stdin(input.as_bytes())?;
        process.output(WITHIN)
    }

    /// Creates or changes what `manifests` (YAML or JSON) describe.
    pub fn apply(&self, manifests: &str) -> Result<String> {
        self.with_input(&["apply", "--filename=-"], manifests)
    }

    /// One object or a list as JSON: `get(&["pods", "--namespace=shop"])`.
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.kubectl(&[&["get", "--output=json"], arguments].concat())?;
        serde_json::from_str(&text).with_context(|| format!("kubectl get {} printed: {text}", arguments.join(" ")))
    }

    /// What the API answers to a GET.
    pub fn get_raw(&self, path: &str) -> Result<Value> {
        let text = self.kubectl(&["get", "--raw", path])?;
        serde_json::from_str(&text).with_context(|| format!("{path} answered: {text}"))
    }

    /// Sends a POST with a JSON body; the answer.
    pub fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let text = self.with_input(&["create", "--raw", path, "--filename=-"], &body.to_string())?;
        serde_json::from_str(&text).with_context(|| format!("{path} answered: {text}"))
    }

    /// Makes the API server know Istio's `AuthorizationPolicy` and `PeerAuthentication`, and waits until it serves them.
    pub fn install_crds(&self) -> Result<()> {
        self.apply(CRDS)?;
        let wait = ["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"];
        self.kubectl(&wait).map(drop)
    }

    /// A token of a service account (`TokenRequest`) for `audiences`; none: for the API itself. The API's shortest lifetime is 600 s.
    pub fn token(&self, namespace: &str, account: &str, audiences: &[&str], lifetime: Duration) -> Result<String> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let body = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": { "audiences": audiences, "expirationSeconds": lifetime.as_secs() },
        });
        let answer = self.post(&path, &body)?;
        let token = answer["status"]["token"].as_str();
        token.map(str::to_owned).with_context(|| format!("no token for {namespace}/{account} in the answer"))
    }

    /// A token as a kubelet asks for on behalf of a pod, bound to that pod. Valid for an hour.
    pub fn token_of_pod(&self, namespace: &str, account: &str, pod: &str, audience: &str) -> Result<String> {
        let object = self.get_raw(&format!("/api/v1/namespaces/{namespace}/pods/{pod}"))?;
        let bound = json!({ "kind": "Pod", "apiVersion": "v1", "name": pod, "uid": object["metadata"]["uid"] });
        let spec = json!({ "audiences": [audience], "expirationSeconds": 3600, "boundObjectRef": bound });
        let body = json!({ "kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "spec": spec });
        let answer = self.post(&format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"), &body)?;
        let token = answer["status"]["token"].as_str();
        token.map(str::to_owned).with_context(|| format!("no token for pod {namespace}/{pod} in the answer"))
    }

    /// What the API says of a token for `audiences` (`TokenReview`): the answer's `status`.
    pub fn review(&self, token: &str, audiences: &[&str]) -> Result<Value> {
        let body = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": { "token": token, "audiences": audiences },
        });
        Ok(self.post("/apis/authentication.k8s.io/v1/tokenreviews", &body)?["status"].take())
    }

    /// Creates the `Node` object of a testbed's node, ready, with its addresses on the wire between the nodes.
    pub fn register(&self, node: &Node) -> Result<()> {
        let (name, index) = (node.name(), node.index());
        self.apply(&json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name } }).to_string())?;
        let addresses = json!([
            { "type": "Hostname", "address": name },
            { "type": "InternalIP", "address": pod_v4(0, index) },
            { "type": "InternalIP", "address": pod_v6(0, index) },
        ]);
        self.set_status(&format!("/api/v1/nodes/{name}"), |status| {
            status["addresses"] = addresses.clone();
            status["conditions"] = json!([{ "type": "Ready", "status": "True", "reason": "Testbed" }]);
        })
    }

    /// Says of a pod that it runs on `node` and is ready, as a kubelet would. Without `addresses` it keeps those that it has.
    pub fn set_pod_running(
        &self,
        namespace: &str,
        pod: &str,
        node: &str,
        addresses: &[std::net::IpAddr],
    ) -> Result<()> {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}");
        if self.get_raw(&path)?["spec"]["nodeName"].is_null() {
            let target = json!({ "apiVersion": "v1", "kind": "Node", "name": node });
            let metadata = json!({ "name": pod, "namespace": namespace });
            let binding = json!({ "apiVersion": "v1", "kind": "Binding", "metadata": metadata, "target": target });
            self.post(&format!("{path}/binding"), &binding)?;
        }
        self.set_status(&path, |status| {
            status["phase"] = json!("Running");
            let ready = |kind| json!({ "type": kind, "status": "True" });
            let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"].map(ready);
            status["conditions"] = json!(conditions);
            if let Some(first) = addresses.first() {
                status["podIP"] = json!(first);
                status["podIPs"] = addresses.iter().map(|ip| json!({ "ip": ip })).collect();
            }
        })
    }

    /// Creates a mirror pod as the kubelet of `node` does it for a static pod, which it calls `uid` itself. The API server lets
    /// a kubelet do this in every namespace.
    pub fn mirror_pod(&self, namespace: &str, pod: &str, node: &str, uid: &str) -> Result<()> {
        let owner = self.get_raw(&format!("/api/v1/nodes/{node}"))?["metadata"]["uid"].clone();
        let annotations = json!({ "kubernetes.io/config.mirror": uid, "kubernetes.io/config.hash": uid,
            "kubernetes.io/config.source": "file", "kubernetes.io/config.seen": "2026-01-01T00:00:00Z" });
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": pod, "namespace": namespace, "annotations": annotations,
                "ownerReferences": [{ "apiVersion": "v1", "kind": "Node", "name": node, "uid": owner, "controller": true }] },
            "spec": { "nodeName": node, "containers": [{ "name": "main", "image": "none" }] },
        });
        let arguments = ["create", "--filename=-"];
        self.kubectl_as(&User::node(node), &arguments, &object.to_string())?.success().map(drop)
    }

    /// Replaces the status of the object at `path` by what `change` makes of it. Controllers write
    /// objects, too: who was faster is read once more.
    pub fn set_status(&self, path: &str, mut change: impl FnMut(&mut Value)) -> Result<()> {
        const TRIES: usize = 10;
        let url = format!("{path}/status");
        let mut tries = 0;
        loop {
            tries += 1;
            let mut object = self.get_raw(path)?;
            change(&mut object["status"]);
            match self.with_input(&["replace", "--raw", &url, "--filename=-"], &object.to_string()) {
                Err(error) if tries < TRIES && format!("{error:#}").contains("(Conflict)") => {}
                done => return done.map(drop),
            }
        }
    }

    fn with_input(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut process = self.kubectl_spawn(arguments)?;
        process.write_stdin(input.as_bytes())?;
        process.output(WITHIN)?.success()
    }

    fn spawn(&self, config: &std::path::Path, arguments: &[&str]) -> Result<Process> {
        let mut command = self.command(&self.parts().program("kubectl")?);
        // Its cache of what the server knows, which is other for every control plane.
        let environment = BTreeMap::from([("HOME", self.directory()), ("KUBECONFIG", config)]);
        Process::spawn(command.envs(environment).args(arguments))
    }
}
