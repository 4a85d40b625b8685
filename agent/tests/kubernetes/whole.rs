//! Everything together, as it is installed: agents that learn the mesh from the API and have certificates from `underpass ca`.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use testbed::{Process, addresses::pod_v4};

use crate::{
    ca::{MANIFEST, NAMESPACE, user},
    mesh::{MARKER, Mesh, SOON, app, assert_encrypted, at, serve},
    world::{World, eventually},
};

const NAME: &str = "underpass-ca.underpass-system.svc";
const PORT: u16 = 15012;

/// Starts the authority on node a.
fn authority(world: &World) -> Result<Process> {
    let mut command = world.bed.node("a").command(testbed::underpass_path()?);
    command.args(["ca", "--namespace", NAMESPACE, "--listen", &format!("0.0.0.0:{PORT}"), "--health-addr", "off"]);
    command.args(["--dns-name", NAME]).env("KUBECONFIG", world.plane.kubeconfig(&user())?);
    let process = Process::spawn(&mut command)?;
    process.wait_line("serving certificate", SOON)?;
    Ok(process)
}

#[test]
fn labels_and_an_authority_are_enough() -> Result<()> {
    let world = World::new("kwhole")?;
    for node in ["a", "b"] {
        world.plane.register(world.bed.node(node))?;
    }
    world.plane.kubectl(&["create", "namespace", NAMESPACE])?;
    world.plane.kubectl(&["create", "serviceaccount", "underpass", "--namespace", NAMESPACE])?;
    world.plane.apply(MANIFEST)?;
    for node in ["a", "b"] {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": format!("agent-{node}"), "namespace": NAMESPACE },
            "spec": { "nodeName": node, "serviceAccountName": "underpass", "automountServiceAccountToken": false,
                "hostNetwork": true, "containers": [{ "name": "agent", "image": "i" }] },
        });
        world.plane.apply(&pod.to_string())?;
        world.plane.set_pod_running(NAMESPACE, &format!("agent-{node}"), node, &[])?;
    }
    let authority_process = authority(&world)?;
    let roots = eventually(SOON, || {
        let published = world.plane.get(&["configmap", "underpass-ca-root", "--namespace", NAMESPACE])?;
        Ok(published["data"]["ca.crt"].as_str().context("roots are published")?.to_owned())
    })?;
    let directory = world.bed.dir().to_owned();
    let root_file = directory.join("root.crt");
    fs::write(&root_file, roots)?;
    let address = format!("https://{}:{PORT}", pod_v4(0, world.bed.node("a").index()));
    let tokens: Vec<_> = ["a", "b"]
        .into_iter()
        .map(|node| {
            let token = world.plane.token_of_pod(NAMESPACE, "underpass", &format!("agent-{node}"), "underpass-ca")?;
            let file = directory.join(format!("token-{node}"));
            fs::write(&file, token)?;
            Ok((node, file))
        })
        .collect::<Result<_>>()?;
    let in_memory = Tmpfs::mount(world.bed.node("a").dir("agent/run")?)?;
    let mut mesh = Mesh::with_issuer(world, |node| {
        let (_, token) = tokens.iter().find(|(of, _)| *of == node).context("a token")?;
        Ok(json!({ "istio": { "address": address, "rootFile": root_file, "tokenFile": token, "serverName": NAME } }))
    })?;

    // It is dropped before the testbed, whose directory it is in.
    let _in_memory = in_memory;

    mesh.label(&["namespace", "shop", "underpass.io/mode=enabled"])?;
    let client = mesh.run("a", "client", &json!({}))?;
    let server = mesh.run("b", "server", &json!({}))?;
    let _serves = serve(&server.pod, 8080)?;
    mesh.wait_in_mesh(&server, true)?;
    let to = at(server.pod.ipv4(), 8080);
    let sniffer = mesh.sniff()?;
    eventually(SOON, || app(&client.pod, &["request", &to, "--line", MARKER]).map(drop))?;
    assert_encrypted(&sniffer.stop()?)?;
    let certificates = mesh.a.ask(&["certificates"])?;
    ensure!(certificates["source"] == "istio", "{certificates}");
    ensure!(certificates.to_string().contains("spiffe://cluster.local/ns/shop/sa/default"), "{certificates}");

    // Without the authority what is there goes on; a new identity has to wait for it, and gets it when it is back.
    drop(authority_process);
    app(&client.pod, &["request", &to])?;
    mesh.world.plane.kubectl(&["create", "serviceaccount", "late", "--namespace=shop"])?;
    let late = mesh.run_as("a", "late", "late")?;
    mesh.wait_enrolled(&late, true)?;
    ensure!(app(&late.pod, &["request", &to, "--timeout", "2"]).is_err(), "there is no certificate for it");

    // Also an agent that is killed meanwhile: its certificates are kept in the node's memory.
    mesh.a.kill()?;
    mesh.a.restart()?;
    mesh.wait_enrolled(&client, true)?;
    let sniffer = mesh.sniff()?;
    app(&client.pod, &["request", &to, "--line", MARKER])?;
    assert_encrypted(&sniffer.stop()?)?;
    ensure!(app(&late.pod, &["request", &to, "--timeout", "2"]).is_err(), "nothing was ever kept for it");
    let _authority = authority(&mesh.world)?;
    eventually(SOON, || app(&late.pod, &["request", &to]).map(drop))
}

/// A tmpfs as `/run` is one on a node.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: PathBuf) -> Result<Self> {
        nix::mount::mount(Some("tmpfs"), &at, Some("tmpfs"), nix::mount::MsFlags::empty(), Some("mode=700"))?;
        Ok(Self(at))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH).expect("it is mounted");
    }
}
