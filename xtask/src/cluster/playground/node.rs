//! A node: containerd, kubelet and kube-proxy in a network namespace, with mounts of their own.

use std::{
    fmt::Write as _,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::json;
use testbed::{
    addresses::PODS_V4,
    kube::{User, arguments},
};

use super::{
    cgroups,
    control::{Control, Kubectl, text, words},
    dns, images, mount_points, network,
    place::{NODES, Place},
    programs::{Inside, Stage, making},
    record::Record,
};

/// Where the programs of a node expect their files, as on a real one, and where those are below the node's directory. What is in `/run` is each
/// node's own, too, and gone when the node starts anew.
const PLACES: [(&str, &str); 7] = [
    ("/var/lib/kubelet", "kubelet"),
    ("/var/lib/underpass", "underpass"),
    ("/var/lib/cni", "cni-state"),
    ("/var/log/pods", "log-pods"),
    ("/var/log/containers", "log-containers"),
    ("/etc/cni/net.d", "cni"),
    ("/opt/cni/bin", "cni-bin"),
];
/// Sockets, also those of the shims, and the file systems of containers.
const RUN: &str = "/run/containerd";
const SOCKET: &str = "unix:///run/containerd/containerd.sock";
/// Kernel parameters that a kubelet insists on (`protectKernelDefaults`), as files that only its own mounts have: the machine's stay.
const PARAMETERS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];
/// Plugins that are on a node.
const PLUGINS: [&str; 4] = ["bridge", "host-local", "loopback", "portmap"];
/// Names under which the one program for iptables is called.
const IPTABLES: [&str; 6] =
    ["iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"];
/// Who is asked for names, on the node itself and in pods that have the node's.
const RESOLVER: &str = "resolv.conf";
const POD_RESOLVER: &str = "pods.resolv.conf";
/// Who the kubelet and kube-proxy are.
const KUBELET_CONFIG: &str = "kubelet.kubeconfig";
const PROXY_CONFIG: &str = "kube-proxy.kubeconfig";
const START: Duration = Duration::from_mins(2);

/// A node.
pub(super) struct Node {
    name: &'static str,
    index: u8,
    directory: PathBuf,
}

/// Makes the machine's directories that nodes mount theirs on, and links for all nodes.
pub(super) fn prepare(stage: &mut Stage<'_>) -> Result<()> {
    let _making = making();
    mount_points::claim(stage, &PLACES.map(|(place, _)| place))?;
    let bin = stage.place.file("bin");
    fs::create_dir_all(&bin).with_context(|| format!("creating {}", bin.display()))?;
    let xtables = stage.parts.join("xtables");
    let links = IPTABLES.map(|name| (name, "xtables-nft-multi")).into_iter().chain([("conntrack", "conntrack")]);
    for (name, to) in links {
        symlink(xtables.join(to), bin.join(name)).with_context(|| format!("linking {name}"))?;
    }
    Ok(())
}

impl Node {
    /// All nodes, whether they are there or not.
    pub(super) fn all(place: &Place) -> impl Iterator<Item = Self> {
        (0..).zip(NODES).map(|(index, name)| Self { name, index, directory: place.file(name) })
    }

    /// The node with this name.
    pub(super) fn named(place: &Place, name: &str) -> Result<Self> {
        let found = Self::all(place).find(|node| node.name == name);
        found.with_context(|| format!("there is no node {name:?}, but {}", NODES.join(" and ")))
    }

    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// From 0.
    pub(super) fn index(&self) -> u8 {
        self.index
    }

    /// Makes its files.
    pub(super) fn create(&self, place: &Place, parts: &Path, control: &Control) -> Result<()> {
        for name in PLACES.iter().map(|(_, name)| *name).chain(["containerd", "parameters"]) {
            fs::create_dir_all(self.file(name)).with_context(|| format!("creating {}", self.file(name).display()))?;
        }
        for plugin in PLUGINS {
            let to = self.file("cni-bin").join(plugin);
            fs::copy(parts.join("cni").join(plugin), &to).with_context(|| format!("copying to {}", to.display()))?;
        }
        for (user, file) in [(User::node(self.name), KUBELET_CONFIG), (User::new("system:kube-proxy"), PROXY_CONFIG)] {
            // With the mode of the original: only root reads it.
            let config = control.pki.kubeconfig(&user, &arguments::url(), "nodes")?;
            fs::copy(config, self.file(file)).with_context(|| format!("writing {}", self.file(file).display()))?;
        }
        for (file, content) in [
            ("containerd.toml", self.containerd(&parts.join("bin/runc"))),
            ("kubelet.yaml", self.kubelet(place, &control.pki.file("ca.crt"))),
            ("proxy.yaml", self.proxy(&self.file(PROXY_CONFIG))),
            ("cni/10-bridge.conflist", self.network()),
            // The machine's own servers cannot be reached, and the kubelet asks for those of clouds when it starts.
            (RESOLVER, format!("nameserver {}\n", network::api())),
            // For pods that do not want the cluster's names.
            (POD_RESOLVER, String::new()),
            ("mounts", self.mounts()?),
        ] {
            fs::write(self.file(file), content).with_context(|| format!("writing {}", self.file(file).display()))?;
        }
        Ok(())
    }

    /// Starts containerd, then kubelet and kube-proxy.
    pub(super) fn start(&self, stage: &mut Stage<'_>, images: &[PathBuf]) -> Result<()> {
        let (containerd, config, mounts) =
            (stage.part("containerd"), self.file("containerd.toml"), self.file("mounts"));
        let command = ["unshare", "--mount", "sh", text(&mounts), text(&containerd), "--config", text(&config)];
        let pid = stage.start(&self.program("containerd"), Inside::NewNode(self.name), &command)?;
        let inside = Inside::Node(self.name, pid);
        let ctr = stage.part("ctr");
        // Without the socket, `ctr` waits for ten seconds before it looks again.
        let socket = PathBuf::from(format!("/proc/{pid}/root{RUN}/containerd.sock"));
        let answers = || socket.exists().then(|| stage.output(inside, &[text(&ctr), "version"])).transpose();
        stage.wait(&format!("containerd of {}", self.name), START, answers)?;
        self.import(stage, images)?;
        let arguments = [
            format!("--config={}", self.file("kubelet.yaml").display()),
            format!("--kubeconfig={}", self.file(KUBELET_CONFIG).display()),
            "--root-dir=/var/lib/kubelet".into(),
            "--cert-dir=/var/lib/kubelet/pki".into(),
            format!("--hostname-override={}", self.name),
            format!("--node-ip={}", network::node(self.index)),
            "--container-runtime=remote".into(),
            format!("--container-runtime-endpoint={SOCKET}"),
            format!("--image-service-endpoint={SOCKET}"),
            format!("--pod-infra-container-image={}", images::PAUSE),
        ];
        stage.start(&self.program("kubelet"), inside, &words(&stage.part("kubelet"), &arguments))?;
        let proxy = [format!("--config={}", self.file("proxy.yaml").display())];
        stage.start(&self.program("kube-proxy"), inside, &words(&stage.part("kube-proxy"), &proxy))?;
        Ok(())
    }

    /// Gives containerd images from files.
    pub(super) fn import(&self, stage: &Stage<'_>, images: &[PathBuf]) -> Result<()> {
        let (inside, ctr) = (self.inside(&stage.record)?, stage.part("ctr"));
        for image in images {
            stage.output(inside, &[text(&ctr), "--namespace", "k8s.io", "images", "import", text(image)])?;
        }
        Ok(())
    }

    /// Kills everything on it, and takes its network and what it had in `/run` away.
    pub(super) fn stop(&self, stage: &mut Stage<'_>) -> Result<()> {
        let _making = making();
        let ours = format!("{}-", self.name);
        stage.record.processes.retain(|process| {
            let other = !process.name.starts_with(&ours);
            if !other {
                process.kill();
            }
            other
        });
        stage.record.write(stage.place)?;
        cgroups::remove_node(stage.place, self.name)?;
        network::remove_node(stage.place, self.name)
    }

    /// Where its programs run.
    pub(super) fn inside(&self, record: &Record) -> Result<Inside<'static>> {
        Ok(Inside::Node(self.name, self.process(record)?))
    }

    /// A process that has its mounts.
    pub(super) fn process(&self, record: &Record) -> Result<i32> {
        Ok(record.process(&self.program("containerd"))?.pid)
    }

    fn program(&self, name: &str) -> String {
        format!("{}-{name}", self.name)
    }

    /// Waits until the kubelet has made its object in the API, and says there which network the node's pods have.
    pub(super) fn register(&self, stage: &Stage<'_>, kubectl: &Kubectl) -> Result<()> {
        let get = ["get", "node", self.name, "--output=name"];
        stage.wait(&format!("the kubelet of {}", self.name), START, || kubectl.run(&get).map(Some))?;
        kubectl.run(&["patch", "node", self.name, "--patch", &self.patch()]).map(drop)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn patch(&self) -> String {
        let pods = network::pods(self.index);
        json!({ "spec": { "podCIDR": pods, "podCIDRs": [pods] } }).to_string()
    }

    /// JSON is YAML.
    fn kubelet(&self, place: &Place, authority: &Path) -> String {
        json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": { "enabled": false },
                "webhook": { "enabled": true },
                "x509": { "clientCAFile": authority },
            },
            "authorization": { "mode": "Webhook" },
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": format!("/{}/{}", place.cgroup(), self.name),
            "enforceNodeAllocatable": ["pods"],
            // Raising it needs a capability (CAP_SYS_RESOURCE) that containers for development do not have.
            "oomScoreAdj": 0,
            "protectKernelDefaults": true,
            "failSwapOn": false,
            "clusterDomain": dns::DOMAIN,
            "clusterDNS": [network::api()],
            "resolvConf": self.file(POD_RESOLVER),
            // Pods come and go faster than the usual five requests a second allow.
            "kubeAPIQPS": 50,
            "kubeAPIBurst": 100,
            // How soon pods see what has changed in ConfigMaps and Secrets; usually a minute.
            "syncFrequency": "10s",
            "volumePluginDir": "/var/lib/kubelet/volume-plugins",
            // A developer's disk is often nearly full.
            "imageGCHighThresholdPercent": 100,
            "evictionHard": { "memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%" },
        })
        .to_string()
    }

    fn proxy(&self, kubeconfig: &Path) -> String {
        json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": { "kubeconfig": kubeconfig },
            "hostnameOverride": self.name,
            "mode": "iptables",
            "clusterCIDR": PODS_V4,
            // These parameters are the machine's, not the namespace's.
            "conntrack": { "maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s" },
            "oomScoreAdj": 0,
        })
        .to_string()
    }

    fn network(&self) -> String {
        json!({
            "cniVersion": "0.4.0",
            "name": "playground",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": "cni0",
                    "isGateway": true,
                    "hairpinMode": true,
                    "ipam": {
                        "type": "host-local",
                        "ranges": [[{ "subnet": network::pods(self.index) }]],
                        "routes": [{ "dst": "0.0.0.0/0" }],
                    },
                },
                { "type": "portmap", "capabilities": { "portMappings": true } },
            ],
        })
        .to_string()
    }

    fn containerd(&self, runc: &Path) -> String {
        // Strings of JSON are strings of TOML.
        let quoted = |path: &Path| json!(path).to_string();
        format!(
            r#"version = 2
root = {root}
state = "{RUN}"
[debug]
  level = "warn"
[grpc]
  address = "{RUN}/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = {opt}
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = {runc}
        SystemdCgroup = false
"#,
            root = quoted(&self.file("containerd")),
            opt = quoted(&self.file("containerd-opt")),
            pause = images::PAUSE,
            runc = quoted(runc),
        )
    }

    /// A script that makes the mounts in a namespace of its own and becomes the program that it is given. The mounts end with the last
    /// process that sees them.
    fn mounts(&self) -> Result<String> {
        let mut script = "set -e\nmount --make-rshared /\n".to_owned();
        let quoted = |path: &Path| format!("'{}'", text(path).replace('\'', r"'\''"));
        writeln!(script, "mount -t tmpfs -o mode=0755 tmpfs /run\nmkdir -m 0711 {RUN}\nmkdir /run/netns /run/lock")?;
        for (place, name) in PLACES {
            writeln!(script, "mount --bind {} {place}", quoted(&self.file(name)))?;
        }
        // It may be a link into the old `/run`; without a file, nobody is asked.
        writeln!(
            script,
            "if [ -e /etc/resolv.conf ]; then mount --bind {} /etc/resolv.conf; fi",
            quoted(&self.file(RESOLVER))
        )?;
        // What programs pin on one node is not on the other.
        writeln!(script, "if [ -d /sys/fs/bpf ]; then mount -t bpf bpf /sys/fs/bpf; fi")?;
        for (name, value) in PARAMETERS {
            let file = self.file("parameters").join(name.replace('/', "."));
            writeln!(script, "printf {value} > {0}\nmount --bind {0} /proc/sys/{name}", quoted(&file))?;
        }
        Ok(script + "exec \"$@\"\n")
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use serde_json::Value;

    use super::{Node, PLACES};

    fn node(directory: &str) -> Node {
        Node { name: "node-b", index: 1, directory: directory.into() }
    }

    #[test]
    fn a_nodes_network_is_the_one_in_its_object() {
        let node = node("/src");
        let object: Value = serde_json::from_str(&node.patch()).unwrap();
        let network: Value = serde_json::from_str(&node.network()).unwrap();
        assert_eq!(object["spec"]["podCIDR"], network["plugins"][0]["ipam"]["ranges"][0][0]["subnet"]);
        assert_eq!(object["spec"]["podCIDR"], "10.77.2.0/24");
    }

    #[test]
    fn directories_with_odd_names() {
        let node = node("/it's \"here\"");
        let script = node.mounts().unwrap();
        assert!(script.contains(r#"mount --bind '/it'\''s "here"/kubelet' /var/lib/kubelet"#), "{script}");
        assert_eq!(script.matches("/var/lib/kubelet").count(), 1);
        assert!(node.containerd(Path::new("/bin/runc")).contains(r#"root = "/it's \"here\"/containerd""#));
    }

    #[test]
    fn every_place_has_a_directory_of_its_own() {
        let mut files: Vec<_> = PLACES.iter().map(|(_, file)| PathBuf::from(file)).collect();
        files.sort();
        files.dedup();
        assert_eq!(files.len(), PLACES.len());
    }
}
