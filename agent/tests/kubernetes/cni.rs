//! The agent and the CNI plugin, called as a container runtime calls it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testbed::{Pod, Process};

use crate::{
    mesh::{MARKER, Mesh, SOON, app, assert_encrypted, assert_plaintext, at, sandbox, serve},
    world::{World, eventually},
};

const NAMESPACE: &str = "underpass-system";
const NOTICE: &str = "underpass-uninstall";
/// What a node has before, as flannel and many others write it.
const NETWORK: &str = r#"{ "cniVersion": "0.3.1", "name": "pods", "plugins": [{ "type": "bridge", "bridge": "cni0" }, { "type": "portmap" }] }"#;
/// What the chart adds to the agent's rights for the notice.
const RULES: &str = r#"
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: { name: underpass-agent, namespace: underpass-system }
rules:
  - { apiGroups: [""], resources: [configmaps], resourceNames: [underpass-uninstall], verbs: [get, list, watch] }
---
apiVersion: v1
kind: ConfigMap
metadata: { name: underpass-uninstall, namespace: underpass-system }
"#;

/// Two nodes whose agents keep the plugin installed, and a namespace `shop` that is in the mesh.
struct Nodes {
    mesh: Mesh,
}

/// A plugin that has been started, and what it will be given.
struct Plugin {
    process: Process,
    config: String,
}

/// A plugin that is at work.
struct Asked {
    process: Process,
    began: Instant,
}

/// What a plugin said.
struct Said {
    ok: bool,
    value: Value,
    took: Duration,
}

impl Nodes {
    fn new(label: &str) -> Result<Self> {
        let world = World::new(label)?;
        world.plane.kubectl(&["create", "namespace", NAMESPACE])?;
        world.plane.apply(RULES)?;
        let user = format!("--user={}", crate::mesh::AGENT);
        let namespace = format!("--namespace={NAMESPACE}");
        world.plane.kubectl(&["create", "rolebinding", "agent", "--role=underpass-agent", &user, &namespace])?;
        for node in ["a", "b"] {
            for directory in ["bin", "net.d"] {
                fs::create_dir_all(world.bed.node(node).dir("cni")?.join(directory))?;
            }
            fs::write(world.bed.node(node).dir("cni")?.join("net.d/10-flannel.conflist"), NETWORK)?;
        }
        let issuer = json!({ "local": { "caDir": world.bed.dir().join("ca") } });
        let directories: Vec<_> =
            ["a", "b"].into_iter().map(|n| Ok((n, world.bed.node(n).dir("cni")?))).collect::<Result<_>>()?;
        let mesh = Mesh::with(
            world,
            |_| Ok(issuer.clone()),
            |node| {
                let (_, cni) = directories.iter().find(|(of, _)| *of == node).context("a node")?;
                let options = [
                    "--cni".to_owned(),
                    format!("--cni-bin-dir={}", cni.join("bin").display()),
                    format!("--cni-conf-dir={}", cni.join("net.d").display()),
                    format!("--namespace={NAMESPACE}"),
                    format!("--uninstall-configmap={NAMESPACE}/{NOTICE}"),
                ];
                Ok(options.to_vec())
            },
        )?;
        mesh.label(&["namespace", "shop", "underpass.io/mode=enabled"])?;
        let nodes = Self { mesh };
        for node in ["a", "b"] {
            eventually(SOON, || nodes.entry(node).map(drop))?;
            nodes.wait_projected(node, "shop", "held")?;
        }
        Ok(nodes)
    }

    fn directory(&self, node: &str) -> Result<PathBuf> {
        self.mesh.world.bed.node(node).dir("cni")
    }

    fn conflist(&self, node: &str) -> Result<PathBuf> {
        Ok(self.directory(node)?.join("net.d/10-flannel.conflist"))
    }

    /// The plugin's entry, which has to be the last of three.
    fn entry(&self, node: &str) -> Result<Value> {
        let list: Value = serde_json::from_slice(&fs::read(self.conflist(node)?)?)?;
        let plugins = list["plugins"].as_array().context("plugins")?;
        ensure!(plugins.len() == 3 && plugins[2]["type"] == "underpass-cni", "{list}");
        Ok(plugins[2].clone())
    }

    /// Waits until the plugin would do that without an agent.
    fn wait_projected(&self, node: &str, namespace: &str, treatment: &str) -> Result<()> {
        let file = self.mesh.agent(node).run_dir()?.join("cni/enrolment.json");
        eventually(SOON, || {
            let projection: Value = serde_json::from_slice(&fs::read(&file)?)?;
            ensure!(projection["namespaces"][namespace] == treatment, "{projection}");
            Ok(())
        })
    }

    /// A pod that is bound to the node and that no process runs in yet; its uid.
    fn bind(&self, pod: &Pod, namespace: &str) -> Result<String> {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": pod.name(), "namespace": namespace },
            "spec": { "nodeName": pod.node().name(), "automountServiceAccountToken": false,
                "containers": [{ "name": "main", "image": "none" }] },
        });
        let plane = &self.mesh.world.plane;
        plane.apply(&object.to_string())?;
        let uid = plane.get(&["pod", pod.name(), "--namespace", namespace])?["metadata"]["uid"].clone();
        Ok(uid.as_str().context("a uid")?.to_owned())
    }

    /// Starts the plugin that is installed on the pod's node. It waits for its configuration.
    fn start(&self, command: &str, pod: &Pod, namespace: &str, uid: &str, container: &str) -> Result<Plugin> {
        let node = pod.node().name();
        let program = self.directory(node)?.join("bin/underpass-cni");
        let mut entry = self.entry(node)?;
        // CHECK came with 0.4.0.
        let version = if command == "CHECK" { "1.0.0" } else { "0.3.1" };
        entry["cniVersion"] = json!(version);
        entry["name"] = json!("pods");
        entry["prevResult"] = json!({
            "cniVersion": version,
            "interfaces": [{ "name": "eth0", "sandbox": netns(pod) }],
            "ips": [
                { "version": "4", "interface": 0, "address": format!("{}/24", pod.ipv4()) },
                { "version": "6", "interface": 0, "address": format!("{}/64", pod.ipv6()) },
            ],
        });
        let mut plugin = pod.node().command(program);
        plugin.stdin(Stdio::piped());
        plugin.env("CNI_COMMAND", command).env("CNI_CONTAINERID", container).env("CNI_IFNAME", "eth0");
        plugin.env("CNI_NETNS", netns(pod)).env("CNI_PATH", self.directory(node)?.join("bin"));
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={container};K8S_POD_UID={uid}",
            pod.name()
        );
        let process = Process::spawn(plugin.env("CNI_ARGS", args))?;
        Ok(Plugin { process, config: entry.to_string() })
    }

    fn call(&self, command: &str, pod: &Pod, namespace: &str, uid: &str, container: &str) -> Result<Said> {
        self.start(command, pod, namespace, uid, container)?.asked()?.said()
    }
}

impl Plugin {
    /// Gives it the configuration, as soon as it is the plugin: what starts it in the node's network takes longer than itself.
    fn asked(mut self) -> Result<Asked> {
        let name = format!("/proc/{}/comm", self.process.pid());
        eventually(SOON, || {
            ensure!(fs::read_to_string(&name)?.trim_end() == "underpass-cni", "it is being started");
            Ok(())
        })?;
        let began = Instant::now();
        self.process.write_stdin(self.config.as_bytes())?;
        self.process.close_stdin();
        Ok(Asked { process: self.process, began })
    }
}

impl Asked {
    /// Its answer.
    fn said(self) -> Result<Said> {
        let output = self.process.output(SOON)?;
        let took = self.began.elapsed();
        let value = if output.stdout.trim().is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&output.stdout).with_context(|| format!("{}{}", output.stdout, output.stderr))?
        };
        Ok(Said { ok: output.status.success(), value, took })
    }
}

fn netns(pod: &Pod) -> PathBuf {
    Path::new("/run/netns").join(pod.namespace().name())
}

#[test]
fn a_pod_is_captured_before_its_first_process() -> Result<()> {
    let nodes = Nodes::new("kcni")?;
    let mesh = &nodes.mesh;
    let server = mesh.run("b", "server", &json!({}))?;
    let _serves = serve(&server.pod, 8080)?;
    mesh.wait_in_mesh(&server, true)?;
    mesh.wait_enrolled(&server, true)?;
    let to = at(server.pod.ipv4(), 8080);
    let bed = &mesh.world.bed;

    let client = bed.node("a").pod("client")?;
    let uid = nodes.bind(&client, "shop")?;
    let sniffer = mesh.sniff()?;
    let said = nodes.call("ADD", &client, "shop", &uid, "c1")?;
    ensure!(said.ok && said.value["ips"][0]["address"] == format!("{}/24", client.ipv4()), "{}", said.value);
    // The very first thing that it does, without a cgroup of its own: it has no process that the agent could have found.
    app(&client, &["request", &to, "--line", MARKER])?;
    assert_encrypted(&sniffer.stop()?)?;
    let said = nodes.call("CHECK", &client, "shop", &uid, "c1")?;
    ensure!(said.ok, "{}", said.value);

    // A pod outside of the mesh starts, too, and stays outside.
    mesh.world.plane.kubectl(&["create", "namespace", "free"])?;
    let other = bed.node("a").pod("other")?;
    let other_uid = nodes.bind(&other, "free")?;
    let said = nodes.call("ADD", &other, "free", &other_uid, "c2")?;
    ensure!(said.ok, "{}", said.value);
    let sniffer = mesh.sniff()?;
    app(&other, &["request", &to, "--line", MARKER])?;
    assert_plaintext(&sniffer.stop()?)?;

    // Gone: several times, without a namespace, before or after the object.
    for _ in 0..2 {
        ensure!(nodes.call("DEL", &client, "shop", &uid, "c1")?.ok);
    }
    // The sandbox is said to be gone, and its namespace is still there: closed, not open.
    mesh.a.wait_status(SOON, |s| Ok(s["pods"].to_string().contains(r#""state":"kept""#))).map(drop)
}

/// The pods that a kubelet runs by itself: outside of the mesh, and never held up, whatever their namespace says.
#[test]
fn static_pods_start_at_once_and_stay_outside() -> Result<()> {
    let mut nodes = Nodes::new("kcnistat")?;
    let server = nodes.mesh.run("b", "server", &json!({}))?;
    let _serves = serve(&server.pod, 8080)?;
    nodes.mesh.wait_in_mesh(&server, true)?;
    nodes.mesh.wait_enrolled(&server, true)?;
    let node = nodes.mesh.world.bed.node("a");
    let (etcd, own) = (node.pod("etcda")?, node.pod("owna")?);
    // The one's UID is the sum of its manifest, the other's is in its manifest.
    let (hash, set) = ("0123456789abcdef0123456789abcdef", "7a2f3d5c-0000-4000-8000-00000000000a");

    // Before the API server has heard of it.
    let said = nodes.call("ADD", &etcd, "shop", hash, "c1")?;
    ensure!(said.ok && said.took < Duration::from_secs(5), "{} after {:?}", said.value, said.took);
    for (pod, uid) in [(&etcd, hash), (&own, set)] {
        nodes.mesh.world.plane.mirror_pod("shop", pod.name(), "a", uid)?;
        nodes.mesh.world.plane.set_pod_running("shop", pod.name(), "a", &[pod.ipv4().into(), pod.ipv6().into()])?;
    }
    let said = nodes.call("ADD", &own, "shop", set, "c2")?;
    ensure!(said.ok && said.took < Duration::from_secs(5), "{} after {:?}", said.value, said.took);
    ensure!(nodes.call("CHECK", &own, "shop", set, "c2")?.ok && nodes.call("CHECK", &etcd, "shop", hash, "c1")?.ok);
    let told = |status: &Value| {
        let problems = status["cluster"]["problems"].to_string();
        let said = |pod: &Pod| problems.contains(&format!("Pod shop/{}", pod.name()));
        Ok(said(&etcd) && said(&own) && problems.contains("static pods have no identity"))
    };
    let status = nodes.mesh.a.wait_status(SOON, told)?;
    for pod in [&etcd, &own] {
        ensure!(!status["pods"].to_string().contains(&format!("shop/{}", pod.name())), "{status}");
        let sniffer = nodes.mesh.sniff()?;
        app(pod, &["request", &at(server.pod.ipv4(), 8080), "--line", MARKER])?;
        assert_plaintext(&sniffer.stop()?)?;
    }
    // Others do not dial it by the tunnel.
    let client = nodes.mesh.run("b", "client", &json!({}))?;
    nodes.mesh.wait_enrolled(&client, true)?;
    let _etcd_serves = serve(&etcd, 2379)?;
    app(&client.pod, &["request", &at(etcd.ipv4(), 2379)])?;

    nodes.mesh.a.kill()?;
    ensure!(nodes.call("ADD", &etcd, "shop", hash, "c3")?.ok, "without an agent");
    Ok(())
}

#[test]
fn without_an_agent_pods_of_the_mesh_do_not_start_and_others_do() -> Result<()> {
    let mut nodes = Nodes::new("kcnidown")?;
    nodes.mesh.world.plane.kubectl(&["create", "namespace", "free"])?;
    nodes.wait_projected("a", "free", "free")?;
    let client = nodes.mesh.world.bed.node("a").pod("client")?;
    let uid = nodes.bind(&client, "shop")?;
    nodes.mesh.a.kill()?;
    let said = nodes.call("ADD", &client, "shop", &uid, "c1")?;
    ensure!(!said.ok && said.value["code"] == 11, "{}", said.value);
    let message = said.value.to_string();
    ensure!(message.contains("shop/client") && message.contains("agent"), "{message}");
    // The runtime cleans up after a failed ADD.
    ensure!(nodes.call("DEL", &client, "shop", &uid, "c1")?.ok);
    for (namespace, container) in [("free", "c2"), ("kube-system", "c3"), (NAMESPACE, "c4")] {
        let said = nodes.call("ADD", &client, namespace, "u", container)?;
        ensure!(said.ok, "{namespace}: {}", said.value);
    }
    let said = nodes.call("ADD", &client, "unheard-of", "u", "c5")?;
    ensure!(!said.ok, "a namespace that nobody knows: {}", said.value);

    // The agent is back: the kubelet's next try succeeds.
    nodes.mesh.a.restart()?;
    let said = eventually(SOON, || {
        let said = nodes.call("ADD", &client, "shop", &uid, "c6")?;
        ensure!(said.ok, "{}", said.value);
        Ok(said)
    })?;
    ensure!(said.value["ips"].is_array());
    nodes.mesh.a.wait_status(SOON, |s| Ok(s["pods"].to_string().contains("shop/client"))).map(drop)
}

#[test]
fn a_pod_between_add_and_its_first_process_survives_the_agents_death() -> Result<()> {
    let mut nodes = Nodes::new("kcnikill")?;
    let server = nodes.mesh.run("b", "server", &json!({}))?;
    let _serves = serve(&server.pod, 8080)?;
    nodes.mesh.wait_in_mesh(&server, true)?;
    nodes.mesh.wait_enrolled(&server, true)?;
    let to = at(server.pod.ipv4(), 8080);
    let client = nodes.mesh.world.bed.node("a").pod("client")?;
    let uid = nodes.bind(&client, "shop")?;
    ensure!(nodes.call("ADD", &client, "shop", &uid, "c1")?.ok);
    nodes.mesh.a.kill()?;
    nodes.mesh.a.restart()?;
    nodes.mesh.a.wait_status(SOON, crate::mesh::in_sync)?;
    nodes.mesh.a.wait_status(SOON, |s| Ok(s["pods"].to_string().contains("shop/client")))?;
    let released = "a kept pod is released";
    ensure!(!nodes.mesh.a.log().contains(released), "there was a moment without capture:\n{}", nodes.mesh.a.log());
    let sniffer = nodes.mesh.sniff()?;
    app(&client, &["request", &to, "--line", MARKER])?;
    assert_encrypted(&sniffer.stop()?)?;

    // An agent that dies while a pod is held: the pod does not start.
    let late = nodes.mesh.world.bed.node("a").pod("late")?;
    let held = nodes.start("ADD", &late, "shop", "not-yet-known", "c2")?.asked()?;
    let attachments = nodes.mesh.a.run_dir()?.join("cni/attachments/c2");
    eventually(SOON, || fs::metadata(&attachments).map(drop).context("the request has come"))?;
    nodes.mesh.a.kill()?;
    let said = held.said()?;
    ensure!(!said.ok && said.value["code"] == 11, "{}", said.value);
    ensure!(nodes.call("DEL", &late, "shop", "not-yet-known", "c2")?.ok, "also without an agent");
    nodes.mesh.a.restart()?;
    let uid = nodes.bind(&late, "shop")?;
    let said = eventually(SOON, || {
        let said = nodes.call("ADD", &late, "shop", &uid, "c3")?;
        ensure!(said.ok, "{}", said.value);
        Ok(said)
    })?;
    ensure!(said.took < SOON);
    app(&late, &["request", &to]).map(drop)
}

#[test]
fn the_plugin_stays_installed_until_underpass_is_removed() -> Result<()> {
    let nodes = Nodes::new("kcniend")?;
    let mesh = &nodes.mesh;
    // Its owner writes the file anew, as an upgrade of the network does; somebody else removes the program.
    fs::write(nodes.conflist("a")?, NETWORK)?;
    eventually(SOON, || nodes.entry("a").map(drop))?;
    fs::remove_file(nodes.directory("a")?.join("bin/underpass-cni"))?;
    eventually(SOON, || fs::metadata(nodes.directory("a")?.join("bin/underpass-cni")).map(drop).context("gone"))?;

    let client = mesh.run("a", "client", &json!({}))?;
    let server = mesh.run("b", "server", &json!({}))?;
    let _serves = serve(&server.pod, 8080)?;
    mesh.wait_in_mesh(&server, true)?;
    mesh.wait_enrolled(&client, true)?;
    mesh.wait_enrolled(&server, true)?;
    let to = at(server.pod.ipv4(), 8080);
    app(&client.pod, &["request", &to])?;
    let steady = client.pod.app(&["steady", &to, "--rate", "50", "--timeout", "10"])?;
    steady.wait_json("first", SOON)?;
    let patch = r#"{"data":{"uninstall":"now"}}"#;
    let namespace = format!("--namespace={NAMESPACE}");
    mesh.world.plane.kubectl(&["patch", "configmap", NOTICE, &namespace, "--type=merge", "--patch", patch])?;
    for (agent, node) in [(&mesh.a, "a"), (&mesh.b, "b")] {
        agent.wait_log("nothing of Underpass is left on this node", SOON)?;
        let before: Value = serde_json::from_str(NETWORK)?;
        let now: Value = serde_json::from_slice(&fs::read(nodes.conflist(node)?)?)?;
        ensure!(now == before, "{now}");
        ensure!(!nodes.directory(node)?.join("bin/underpass-cni").exists());
        ensure!(!agent.pin_root().exists(), "pins are left in {}", agent.pin_root().display());
        ensure!(!agent.run_dir()?.join("cni").exists());
    }
    for pod in [&client.pod, &server.pod] {
        let rules = pod.check(&["ip", "rule"])?;
        ensure!(!rules.contains("0x539"), "{rules}");
        let links = pod.check(&["tc", "qdisc", "show"])?;
        ensure!(!links.contains("clsact"), "{links}");
    }
    let report = steady.output(SOON)?.last_json()?;
    ensure!(report["failed"] == 0, "connections were lost on the way out: {report}");
    let sniffer = mesh.sniff()?;
    app(&client.pod, &["request", &to, "--line", MARKER])?;
    assert_plaintext(&sniffer.stop()?)
}

/// What being held adds to a pod's start. Run with `--ignored --nocapture`, the release agent, on a quiet machine.
#[test]
#[ignore = "measures"]
fn how_long_a_pod_is_held() -> Result<()> {
    const PODS: usize = 100;
    let nodes = Nodes::new("kcnitime")?;
    let bed = &nodes.mesh.world.bed;
    let mut times = Vec::new();
    let mut alone = Vec::new();
    let mut kept = Vec::new();
    for n in 0..PODS {
        let pod = bed.node("a").pod(&format!("p{n}"))?;
        let uid = nodes.bind(&pod, "shop")?;
        // A kubelet needs longer than this between seeing the pod and calling the plugins.
        nodes.mesh.a.wait_status(SOON, |s| Ok(s["cluster"]["kinds"][0]["objects"].as_u64() > Some(n as u64)))?;
        let said = nodes.call("ADD", &pod, "shop", &uid, &format!("c{n}"))?;
        ensure!(said.ok, "{}", said.value);
        times.push(said.took);
        let said = nodes.call("VERSION", &pod, "shop", &uid, &format!("c{n}"))?;
        alone.push(said.took);
        let process = sandbox(&pod, &uid)?;
        kept.push((pod, process));
    }
    for (what, times) in [("ADD", &mut times), ("VERSION (the process alone)", &mut alone)] {
        times.sort_unstable();
        let at = |percent: usize| times[(PODS - 1) * percent / 100];
        println!("{what}: median {:?}, p90 {:?}, p99 {:?}, longest {:?}", at(50), at(90), at(99), at(100));
    }
    drop(kept);
    Ok(())
}
