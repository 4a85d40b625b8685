//! A node: a network namespace with a bridge for its pods and a wire to the other node.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use anyhow::{Context, Result, ensure};

use crate::{
    addresses::{nested_v4, nested_v6, pod_v4, pod_v6},
    cgroup,
    namespace::Namespace,
    pod::{self, Pod},
    state::Shared,
};

/// First host number given to a pod; 1 is the node.
const FIRST_HOST: u8 = 10;
/// Last host number given to a pod.
const LAST_HOST: u8 = 250;

/// A node. Cloning gives another handle to the same node.
#[derive(Debug, Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    name: &'static str,
    index: u8,
    namespace: Namespace,
    cgroup: PathBuf,
    next_host: AtomicU8,
}

impl Node {
    pub(crate) fn create(shared: &Arc<Shared>, name: &'static str, index: u8) -> Result<Self> {
        let namespace = Namespace::create(shared, format!("up-{}-{name}", shared.id))?;
        let cgroup = shared.cgroup.join(name);
        for directory in [cgroup.join("pods"), cgroup.join("node")] {
            fs::create_dir_all(&directory).with_context(|| format!("creating cgroup {}", directory.display()))?;
        }
        namespace.sysctl(&[
            ("net.ipv4.ip_forward", "1"),
            ("net.ipv6.conf.all.forwarding", "1"),
            ("net.ipv4.conf.all.rp_filter", "0"),
            ("net.ipv4.conf.default.rp_filter", "0"),
        ])?;
        namespace.ip(&format!(
            "link add br0 type bridge mcast_snooping 0\n\
             address add {}/24 dev br0\n\
             address add {}/64 dev br0 nodad\n\
             link set br0 up\n",
            pod_v4(index, 1),
            pod_v6(index, 1),
        ))?;
        let inner =
            Inner { shared: Arc::clone(shared), name, index, namespace, cgroup, next_host: AtomicU8::new(FIRST_HOST) };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// `a` or `b`.
    pub fn name(&self) -> &str {
        self.inner.name
    }

    /// 1 for `a`, 2 for `b`: the third byte of its pods' IPv4 addresses.
    pub fn index(&self) -> u8 {
        self.inner.index
    }

    /// Its network namespace: the place for a sniffer and for its agent.
    pub fn namespace(&self) -> &Namespace {
        &self.inner.namespace
    }

    /// The cgroup directory that all its pods are in: what its agent attaches to.
    pub fn pods_cgroup(&self) -> PathBuf {
        self.inner.cgroup.join("pods")
    }

    /// The cgroup directory of the node's own programs, outside the pods'.
    pub fn own_cgroup(&self) -> PathBuf {
        self.inner.cgroup.join("node")
    }

    /// Another cgroup of the node's, outside the pods', for something like a kubelet. There may be one of this name already.
    pub fn cgroup(&self, name: &str) -> Result<PathBuf> {
        let directory = self.inner.cgroup.join(name);
        fs::create_dir_all(&directory).with_context(|| format!("creating cgroup {}", directory.display()))?;
        Ok(directory)
    }

    /// What `/proc/PID/cgroup` calls one of its cgroup directories.
    pub fn cgroup_path(&self, directory: &Path) -> Result<PathBuf> {
        let below = directory.strip_prefix(cgroup::mount_point()?);
        Ok(Path::new("/").join(below.with_context(|| format!("{} is no cgroup", directory.display()))?))
    }

    /// A directory for the files of something on this node.
    pub fn dir(&self, purpose: &str) -> Result<PathBuf> {
        let dir = self.inner.shared.dir.join(self.name()).join(purpose);
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        Ok(dir)
    }

    /// Creates a pod; `name` is at most 10 characters of `a-z0-9`.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        Pod::create(self, name)
    }

    /// A pod on a network like Calico's: no bridge, an address of /32, the node as gateway at 169.254.1.1 by proxy ARP, a route on the
    /// node for each pod, strict reverse path filter, and a rule that routes by a mark.
    pub fn routed_pod(&self, name: &str) -> Result<Pod> {
        Pod::create_routed(self, name)
    }

    /// A program on the node itself: in its network namespace and in its own cgroup.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        pod::command_in(Some(&self.own_cgroup()), &self.inner.namespace, program.as_ref())
    }

    /// A program in the node's network namespace and in `cgroup`, a directory that [`Node::cgroup`] or a pod gave.
    pub fn command_in(&self, cgroup: &Path, program: impl AsRef<Path>) -> Command {
        pod::command_in(Some(cgroup), &self.inner.namespace, program.as_ref())
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.inner.shared
    }

    /// The next unused host number in the node's subnets.
    pub(crate) fn take_host(&self) -> Result<u8> {
        let host = self.inner.next_host.fetch_add(1, Ordering::Relaxed);
        ensure!((FIRST_HOST..=LAST_HOST).contains(&host), "node {} has no address left for another pod", self.name());
        Ok(host)
    }

    /// Joins `namespace` to the bridge with a new interface `interface` that has host number `host`'s addresses.
    pub(crate) fn plug(&self, namespace: &Namespace, interface: &str, host: u8) -> Result<()> {
        let bridge_port = format!("port{host}");
        self.namespace().ip(&format!(
            "link add {bridge_port} type veth peer name {interface} netns {}\n\
             link set {bridge_port} master br0 up\n",
            namespace.name()
        ))?;
        namespace.ip(&format!(
            "address add {}/24 dev {interface}\n\
             address add {}/64 dev {interface} nodad\n\
             link set {interface} up\n",
            pod_v4(self.index(), host),
            pod_v6(self.index(), host),
        ))?;
        Ok(())
    }

    /// Connects `namespace` to the node by routes alone, as Calico does.
    pub(crate) fn plug_routed(&self, namespace: &Namespace, host: u8) -> Result<()> {
        let (cali, address) = (format!("cali{host}"), pod_v4(self.index(), host));
        self.namespace().ip(&format!(
            "link add {cali} address ee:ee:ee:ee:ee:ee type veth peer name eth0 netns {}\n\
             link set {cali} up\n\
             route add {address}/32 dev {cali} scope link\n",
            namespace.name()
        ))?;
        // Pods on the bridge think that all of the subnet is there.
        let of = |name: &str, setting: &str| format!("net.ipv4.conf.{name}.{setting}");
        self.namespace().sysctl(&[
            (&of(&cali, "proxy_arp"), "1"),
            (&of(&cali, "rp_filter"), "1"),
            (&of(&cali, "forwarding"), "1"),
            (&of("br0", "proxy_arp"), "1"),
        ])?;
        // Proxy ARP answers for what the node has a route to, elsewhere: on a real one the default route.
        self.namespace()
            .ip("route replace local default dev lo table 10020\nroute replace 169.254.1.1/32 dev wire scope link\n")?;
        // Refused from the second pod on: it is there.
        let _ = self.namespace().ip("rule add fwmark 0x20000/0x20000 table 10020 priority 50\n");
        namespace.ip(&format!(
            "address add {address}/32 dev eth0\n\
             link set eth0 up\n\
             route add 169.254.1.1/32 dev eth0 scope link\n\
             route add default via 169.254.1.1 dev eth0\n"
        ))?;
        Ok(())
    }

    /// Routes the nested addresses with number `host` through the pod at `via`.
    pub(crate) fn route_nested(&self, host: u8, via: &Pod) -> Result<()> {
        self.namespace().ip(&format!(
            "route add {}/32 via {}\nroute add {}/128 via {}\n",
            nested_v4(self.index(), host),
            via.ipv4(),
            nested_v6(self.index(), host),
            via.ipv6(),
        ))?;
        Ok(())
    }
}

/// Lays the wire between two nodes and routes each one's addresses to it.
pub(crate) fn join(a: &Node, b: &Node) -> Result<()> {
    a.namespace().ip(&format!("link add wire type veth peer name wire netns {}\n", b.namespace().name()))?;
    address(a, b)
}

/// Takes the wire away and lays one that ends in `middle`, at the interfaces `a` and `b`; what carries packets between these is not made
/// here. No packet on it is more than one segment.
pub(crate) fn lead_through(a: &Node, b: &Node, middle: &Namespace) -> Result<()> {
    a.namespace().ip("link delete wire\n")?;
    for node in [a, b] {
        let name = node.name();
        node.namespace().ip(&format!(
            "link add wire type veth peer name {name} netns {}\nlink set wire gso_max_segs 1\n",
            middle.name()
        ))?;
        middle.ip(&format!("link set dev {name} up\n"))?;
    }
    address(a, b)
}

/// Gives both ends of the wire their addresses and routes.
fn address(a: &Node, b: &Node) -> Result<()> {
    for node in [a, b] {
        let index = node.index();
        node.namespace().ip(&format!(
            "address add {}/24 dev wire\naddress add {}/64 dev wire nodad\nlink set wire up\n",
            pod_v4(0, index),
            pod_v6(0, index)
        ))?;
    }
    for (node, other) in [(a, b), (b, a)] {
        let index = other.index();
        let mut routes = String::new();
        for network in [pod_v4(index, 0), nested_v4(index, 0)] {
            writeln!(routes, "route add {network}/24 via {} dev wire", pod_v4(0, index))?;
        }
        for network in [pod_v6(index, 0), nested_v6(index, 0)] {
            writeln!(routes, "route add {network}/64 via {} dev wire", pod_v6(0, index))?;
        }
        node.namespace().ip(&routes)?;
    }
    Ok(())
}
