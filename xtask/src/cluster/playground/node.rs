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
use testbed::{addresses::PODS_V4, kube::User};

use super::{
    control::{Control, text, url, words},
    images, network,
    place::Place,
    programs::{Inside, Stage, making},
};

/// Where the programs of a node expect their files, as on a real one, and where those are below the node's directory.
const PLACES: [(&str, &str); 6] = [
    ("/var/lib/kubelet", "kubelet"),
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
const START: Duration = Duration::from_mins(2);

/// A node that is being started.
pub(super) struct Node {
    name: &'static str,
    index: u8,
    directory: PathBuf,
    namespace: String,
}

/// Makes the machine's directories that nodes mount theirs on, and remembers which; links for all nodes.
pub(super) fn prepare(stage: &mut Stage<'_>) -> Result<()> {
    let _making = making();
    let wanted = PLACES.iter().map(|(place, _)| Path::new(place)).chain([Path::new(RUN)]);
    stage.record.mount_points = wanted
        .flat_map(|place| place.ancestors().collect::<Vec<_>>().into_iter().rev())
        .map(Path::to_path_buf)
        .collect();
    stage.record.mount_points.retain(|path| !path.exists());
    stage.record.mount_points.dedup();
    // First: what is made has to be known.
    stage.record.write(stage.place)?;
    for path in &stage.record.mount_points {
        // `/var/lib/cni` and the like may have been made for another one of them.
        fs::create_dir_all(path).with_context(|| format!("creating {}", path.display()))?;
    }
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
    /// Makes the files of node number `index`.
    pub(super) fn create(
        place: &Place,
        parts: &Path,
        control: &Control,
        name: &'static str,
        index: u8,
    ) -> Result<Self> {
        let directory = place.file(name);
        let node = Self { name, index, namespace: place.namespace(name), directory };
        for name in PLACES.iter().map(|(_, name)| *name).chain(["containerd", "parameters"]) {
            fs::create_dir_all(node.file(name)).with_context(|| format!("creating {}", node.file(name).display()))?;
        }
        for plugin in PLUGINS {
            let to = node.file("cni-bin").join(plugin);
            fs::copy(parts.join("cni").join(plugin), &to).with_context(|| format!("copying to {}", to.display()))?;
        }
        let authority = control.pki.file("ca.crt");
        let kubeconfig = control.pki.kubeconfig(&User::new("system:kube-proxy"), &url(), "nodes")?;
        for (file, content) in [
            ("containerd.toml", node.containerd(&parts.join("bin/runc"))),
            ("kubelet.yaml", node.kubelet(place, &authority)),
            ("proxy.yaml", node.proxy(&kubeconfig)),
            ("cni/10-bridge.conflist", node.network()),
            ("mounts", node.mounts()?),
        ] {
            fs::write(node.file(file), content).with_context(|| format!("writing {}", node.file(file).display()))?;
        }
        Ok(node)
    }

    /// Starts containerd with images, then kubelet and kube-proxy.
    pub(super) fn start(&self, stage: &mut Stage<'_>, control: &Control, images: &[PathBuf]) -> Result<()> {
        let (containerd, config, mounts) =
            (stage.part("containerd"), self.file("containerd.toml"), self.file("mounts"));
        let command = ["unshare", "--mount", "sh", text(&mounts), text(&containerd), "--config", text(&config)];
        let pid = stage.start(&format!("{}-containerd", self.name), Inside::Network(&self.namespace), &command)?;
        let inside = Inside::Node(&self.namespace, pid);
        let ctr = stage.part("ctr");
        let answers = || stage.output(inside, &[text(&ctr), "version"]).map(Some);
        stage.wait(&format!("containerd of {}", self.name), START, answers)?;
        for image in images {
            stage.output(inside, &[text(&ctr), "--namespace", "k8s.io", "images", "import", text(image)])?;
        }
        let kubeconfig = control.pki.kubeconfig(&User::node(self.name), &url(), "nodes")?;
        let arguments = [
            format!("--config={}", self.file("kubelet.yaml").display()),
            format!("--kubeconfig={}", kubeconfig.display()),
            "--root-dir=/var/lib/kubelet".into(),
            "--cert-dir=/var/lib/kubelet/pki".into(),
            format!("--hostname-override={}", self.name),
            format!("--node-ip={}", network::node(self.index)),
            "--container-runtime=remote".into(),
            format!("--container-runtime-endpoint={SOCKET}"),
            format!("--image-service-endpoint={SOCKET}"),
            format!("--pod-infra-container-image={}", images::PAUSE),
        ];
        stage.start(&format!("{}-kubelet", self.name), inside, &words(&stage.part("kubelet"), &arguments))?;
        let proxy = [format!("--config={}", self.file("proxy.yaml").display())];
        stage.start(&format!("{}-kube-proxy", self.name), inside, &words(&stage.part("kube-proxy"), &proxy))?;
        Ok(())
    }

    /// Waits until the kubelet has made its object in the API, and says there which network the node's pods have.
    pub(super) fn register(&self, stage: &Stage<'_>, control: &Control) -> Result<()> {
        let get = ["get", "node", self.name, "--output=name"];
        stage.wait(&format!("the kubelet of {}", self.name), START, || control.kubectl(&get).map(Some))?;
        control.kubectl(&["patch", "node", self.name, "--patch", &self.patch()]).map(drop)
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
            "clusterDomain": "cluster.local",
            "resolvConf": "/etc/resolv.conf",
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
  netns_mounts_under_state_dir = true
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
        writeln!(script, "mount -t tmpfs -o mode=0711 tmpfs {RUN}")?;
        for (place, name) in PLACES {
            writeln!(script, "mount --bind {} {place}", quoted(&self.file(name)))?;
        }
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
        Node { name: "node-b", index: 1, directory: directory.into(), namespace: "cluster-1-node-b".into() }
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
