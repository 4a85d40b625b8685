//! `underpass ca` as it is installed: the real program, the real API server, and the Role that comes with it.

use std::{fs, net::SocketAddr, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testbed::{
    Process,
    kube::{ControlPlane, User},
};
use underpass::{
    identity::{Issuer as _, IstioIssuer, Svid},
    mesh::{IstioCa, SpiffeId},
};

use super::world::{World, eventually};

pub const NAMESPACE: &str = "underpass-system";
/// What the chart installs.
pub const MANIFEST: &str = include_str!("../../../charts/underpass/files/rbac/ca.yaml");
/// An answer about a token is believed for 30 s, and the API server itself remembers it for ten.
const FORGOTTEN: Duration = Duration::from_secs(75);
const SOON: Duration = Duration::from_secs(30);

/// Two nodes with an agent each; web runs on a, db on b.
struct Mesh {
    world: World,
    directory: tempfile::TempDir,
}

/// A running replica. Killed when it goes out of scope.
struct Replica {
    process: Process,
    address: SocketAddr,
}

impl Mesh {
    fn new(label: &str) -> Result<Self> {
        let world = World::new(label)?;
        let plane = &world.plane;
        for node in ["a", "b"] {
            plane.register(world.bed.node(node))?;
        }
        for (namespace, accounts) in [(NAMESPACE, &["underpass", "other"][..]), ("shop", &["web", "db"])] {
            plane.kubectl(&["create", "namespace", namespace])?;
            for account in accounts {
                plane.kubectl(&["create", "serviceaccount", account, "--namespace", namespace])?;
            }
        }
        plane.apply(MANIFEST)?;
        let mesh = Self { world, directory: tempfile::tempdir()? };
        for node in ["a", "b"] {
            mesh.pod(NAMESPACE, &format!("agent-{node}"), "underpass", node)?;
        }
        mesh.pod("shop", "web", "web", "a")?;
        mesh.pod("shop", "db", "db", "b")?;
        Ok(mesh)
    }

    fn plane(&self) -> &ControlPlane {
        &self.world.plane
    }

    /// A running pod.
    fn pod(&self, namespace: &str, name: &str, account: &str, node: &str) -> Result<()> {
        // Without a token of its own: the controllers may not have made one yet.
        let spec = json!({
            "nodeName": node, "serviceAccountName": account, "automountServiceAccountToken": false,
            "containers": [{ "name": "c", "image": "i" }],
        });
        let metadata = json!({ "name": name, "namespace": namespace });
        let pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec });
        self.plane().apply(&pod.to_string())?;
        self.plane().set_pod_running(namespace, name, node, &[])
    }

    /// A token as the kubelet asks for: bound to a pod.
    fn token(&self, account: &str, pod: &str, audience: &str) -> Result<String> {
        self.plane().token_of_pod(NAMESPACE, account, pod, audience)
    }

    /// The program, as the user that its `ServiceAccount` is.
    fn replica(&self, arguments: &[&str]) -> Result<Replica> {
        let config = self.plane().kubeconfig_here(&user())?;
        let mut command = Command::new(testbed::underpass_path()?);
        command.args(["ca", "--namespace", NAMESPACE, "--listen", "127.0.0.1:0", "--health-addr", "off"]);
        command.args(["--dns-name", "underpass-ca.underpass-system.svc"]).args(arguments);
        let process = Process::spawn(command.env("KUBECONFIG", config))?;
        let line = process.wait_line("running version=", SOON)?;
        let address = line.split("listen=").nth(1).and_then(|rest| rest.split_whitespace().next());
        let address = address.map(|a| a.trim_matches('"')).context("an address in the log")?.parse()?;
        process.wait_line("serving certificate", SOON)?;
        Ok(Replica { process, address })
    }

    /// The published roots, PEM.
    fn roots(&self) -> Result<String> {
        let published = self.plane().get(&["configmap", "underpass-ca-root", "--namespace", NAMESPACE])?;
        Ok(published["data"]["ca.crt"].as_str().context("roots are published")?.to_owned())
    }

    fn file(&self, name: &str, content: &str) -> Result<PathBuf> {
        let path = self.directory.path().join(name);
        fs::write(&path, content)?;
        Ok(path)
    }

    /// What the agent does, with this token.
    fn issue(&self, replica: &Replica, token: &str, identity: &str) -> Result<Svid> {
        let identity: SpiffeId = format!("spiffe://cluster.local/ns/{identity}").parse()?;
        let issuer = IstioIssuer::new(IstioCa {
            address: format!("https://{}", replica.address).parse()?,
            root_file: self.file("ca.crt", &eventually(SOON, || self.roots())?)?,
            token_file: self.file("token", token)?,
            cluster_id: "Kubernetes".into(),
            lifetime: Duration::from_hours(1),
            server_name: Some("underpass-ca.underpass-system.svc".into()),
        })?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(issuer.issue(&identity))?)
    }

    fn refused(&self, replica: &Replica, token: &str, identity: &str, said: &str) -> Result<()> {
        let error = self.issue(replica, token, identity).err().context("it was signed")?.to_string();
        ensure!(error.contains(said), "{said:?} is not in: {error}");
        Ok(())
    }
}

/// RBAC takes a client certificate with a `ServiceAccount`'s name for the `ServiceAccount`.
pub fn user() -> User {
    User::new("system:serviceaccount:underpass-system:underpass-ca")
}

#[test]
fn agents_get_identities_of_pods_on_their_node() -> Result<()> {
    let mesh = Mesh::new("casign")?;
    let replica = mesh.replica(&[])?;
    let (a, b) =
        (mesh.token("underpass", "agent-a", "underpass-ca")?, mesh.token("underpass", "agent-b", "underpass-ca")?);
    let svid = mesh.issue(&replica, &a, "shop/sa/web")?;
    ensure!(svid.identity.to_string() == "spiffe://cluster.local/ns/shop/sa/web");
    mesh.issue(&replica, &b, "shop/sa/db")?;
    mesh.refused(&replica, &a, "shop/sa/db", "runs on node a")?;
    mesh.refused(&replica, &b, "shop/sa/web", "runs on node b")?;
    replica.process.wait_line("underpass::audit: signed", SOON)?;

    let audience = mesh.token("underpass", "agent-a", "istio-ca")?;
    mesh.refused(&replica, &audience, "shop/sa/web", "the token is not accepted")?;
    mesh.pod(NAMESPACE, "other", "other", "a")?;
    let account = mesh.token("other", "other", "underpass-ca")?;
    mesh.refused(&replica, &account, "shop/sa/web", "is no ServiceAccount of an agent")?;
    let unbound = mesh.plane().token(NAMESPACE, "underpass", &["underpass-ca"], Duration::from_mins(10))?;
    mesh.refused(&replica, &unbound, "shop/sa/web", "bound to no pod")?;

    // A pod that comes is signed for at once, whether the watch has told of it or not; one that goes is not for long.
    mesh.plane().kubectl(&["create", "serviceaccount", "late", "--namespace=shop"])?;
    mesh.refused(&replica, &a, "shop/sa/late", "runs on node a")?;
    mesh.pod("shop", "late", "late", "a")?;
    mesh.issue(&replica, &a, "shop/sa/late")?;
    mesh.plane().kubectl(&["delete", "pod", "late", "--namespace=shop", "--grace-period=0", "--force"])?;
    eventually(SOON, || mesh.refused(&replica, &a, "shop/sa/late", "runs on node a"))?;

    // Nor is an agent whose pod is gone.
    let delete = ["delete", "pod", "agent-a", "--namespace", NAMESPACE, "--grace-period=0", "--force"];
    mesh.plane().kubectl(&delete)?;
    eventually(FORGOTTEN, || mesh.refused(&replica, &a, "shop/sa/web", "the token is not accepted"))?;
    mesh.issue(&replica, &b, "shop/sa/db").map(drop)
}

/// A kubelet's credentials are enough for a pod object in every namespace, and it is worth nothing.
#[test]
fn a_mirror_pod_is_worth_no_identity() -> Result<()> {
    let mesh = Mesh::new("camirror")?;
    mesh.plane().kubectl(&["create", "namespace", "payments"])?;
    let replica = mesh.replica(&[])?;
    let token = mesh.token("underpass", "agent-a", "underpass-ca")?;
    mesh.refused(&replica, &token, "payments/sa/default", "runs on node a")?;
    mesh.plane().mirror_pod("payments", "m-a", "a", "0123456789abcdef0123456789abcdef")?;
    mesh.plane().set_pod_running("payments", "m-a", "a", &[])?;
    mesh.refused(&replica, &token, "payments/sa/default", "static pods have no identity")?;
    replica.process.wait_line("reason=\"static-pod\"", SOON)?;
    mesh.pod("payments", "real", "default", "a")?;
    mesh.issue(&replica, &token, "payments/sa/default").map(drop)
}

#[test]
fn replicas_share_a_root_and_rotate_it() -> Result<()> {
    let mesh = Mesh::new("caroot")?;
    let token = mesh.token("underpass", "agent-a", "underpass-ca")?;
    let (one, two) = (mesh.replica(&["--lifetime", "10s"])?, mesh.replica(&["--lifetime", "10s"])?);
    let (first, other) = (mesh.issue(&one, &token, "shop/sa/web")?, mesh.issue(&two, &token, "shop/sa/web")?);
    ensure!(first.roots_id == other.roots_id && first.roots.len() == 1);

    let annotate = ["annotate", "secret", "underpass-ca", "underpass.io/rotate-root=now", "--namespace", NAMESPACE];
    mesh.plane().kubectl(&annotate)?;
    eventually(SOON, || {
        let roots = mesh.roots()?.matches("BEGIN CERTIFICATE").count();
        ensure!(roots == 2, "{roots} roots");
        Ok(())
    })?;
    let secret = mesh.plane().get(&["secret", "underpass-ca", "--namespace", NAMESPACE])?;
    ensure!(secret["metadata"]["annotations"]["underpass.io/rotate-root"] == Value::Null);
    let new = eventually(SOON, || {
        let (one, two) = (mesh.issue(&one, &token, "shop/sa/web")?, mesh.issue(&two, &token, "shop/sa/web")?);
        let issuers = [&one, &two].map(|svid| svid.describe().issuer);
        ensure!(issuers[0] == issuers[1] && issuers[0] != first.describe().issuer, "{issuers:?}");
        Ok(one)
    })?;
    ensure!(new.roots.len() == 2, "the old root is still trusted");
    eventually(Duration::from_mins(1), || {
        let svid = mesh.issue(&two, &token, "shop/sa/web")?;
        ensure!(svid.roots.len() == 1 && svid.describe().issuer == new.describe().issuer);
        Ok(())
    })
}

/// What the Role allows was all that the other tests needed; here is what it does not allow.
#[test]
fn the_role_is_minimal() -> Result<()> {
    let mesh = Mesh::new("carbac")?;
    let plane = mesh.plane();
    plane.kubectl(&["create", "secret", "generic", "another", "--namespace", NAMESPACE])?;
    plane.kubectl(&["create", "configmap", "another", "--namespace", NAMESPACE])?;
    let can = |arguments: &[&str]| -> Result<bool> {
        let output = plane.kubectl_as(&user(), &[&["auth", "can-i"], arguments].concat(), "")?;
        match output.stdout.trim() {
            "yes" => Ok(true),
            "no" => Ok(false),
            _ => anyhow::bail!("{output:?}"),
        }
    };
    let own = ["--namespace", NAMESPACE];
    let allowed: &[&[&str]] = &[
        &["create", "tokenreviews.authentication.k8s.io"],
        &["list", "pods", "--all-namespaces"],
        &["watch", "pods", "--all-namespaces"],
        &["get", "pods", own[0], own[1]],
        &["get", "secrets/underpass-ca", own[0], own[1]],
        &["list", "secrets/underpass-ca", own[0], own[1]],
        &["watch", "secrets/underpass-ca", own[0], own[1]],
        &["update", "secrets/underpass-ca", own[0], own[1]],
        &["get", "configmaps/underpass-ca-root", own[0], own[1]],
        &["patch", "configmaps/underpass-ca-root", own[0], own[1]],
    ];
    for arguments in allowed {
        ensure!(can(arguments)?, "must be allowed: {arguments:?}");
    }

    let mut denied: Vec<Vec<&str>> = Vec::new();
    let verbs = ["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"];
    for verb in verbs {
        // Of the objects that it has, the other verbs.
        for (object, needed) in [
            ("secrets/underpass-ca", &["get", "list", "watch", "update"][..]),
            ("configmaps/underpass-ca-root", &["get", "patch"]),
            ("pods", &["get", "list", "watch"]),
        ] {
            if !needed.contains(&verb) {
                denied.push(vec![verb, object, own[0], own[1]]);
            }
        }
        for object in ["secrets/another", "secrets", "configmaps/another", "configmaps", "serviceaccounts", "roles"] {
            denied.push(vec![verb, object, own[0], own[1]]);
        }
        for object in ["secrets", "configmaps", "nodes", "namespaces", "clusterroles", "certificatesigningrequests"] {
            denied.push(vec![verb, object, "--all-namespaces"]);
        }
    }
    denied.push(vec!["get", "pods", "--namespace", "shop"]);
    denied.push(vec!["create", "serviceaccounts/underpass", "--subresource=token", own[0], own[1]]);
    denied.push(vec!["create", "pods/agent-a", "--subresource=exec", own[0], own[1]]);
    denied.push(vec!["create", "pods/agent-a", "--subresource=binding", own[0], own[1]]);
    denied.push(vec!["update", "pods/agent-a", "--subresource=status", own[0], own[1]]);
    denied.push(vec!["impersonate", "serviceaccounts", own[0], own[1]]);
    denied.push(vec!["escalate", "roles", own[0], own[1]]);
    denied.push(vec!["bind", "roles", own[0], own[1]]);
    denied.push(vec!["create", "subjectaccessreviews.authorization.k8s.io"]);
    for arguments in &denied {
        ensure!(!can(arguments)?, "must be denied: {arguments:?}");
    }

    // What it says is what it does.
    for arguments in [
        &["get", "secret", "another", own[0], own[1]][..],
        &["get", "secrets", own[0], own[1]],
        &["delete", "secret", "underpass-ca", own[0], own[1]],
        &["create", "secret", "generic", "mine", own[0], own[1]],
        &["create", "configmap", "mine", own[0], own[1]],
        &["get", "pod", "web", "--namespace", "shop"],
        &["delete", "pod", "agent-a", own[0], own[1]],
    ] {
        let output = plane.kubectl_as(&user(), arguments, "")?;
        ensure!(!output.status.success() && output.stderr.contains("Forbidden"), "{arguments:?}: {output:?}");
    }
    Ok(())
}
