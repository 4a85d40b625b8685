//! A pod: a network namespace and a cgroup, and programs started in both.

use std::{
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::{
    addresses::{nested_v4, nested_v6, pod_v4, pod_v6},
    namespace::Namespace,
    node::Node,
    process::{Output, Process},
};

/// A pod. Cloning gives another handle to the same pod.
#[derive(Debug, Clone)]
pub struct Pod {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    node: Node,
    name: String,
    namespace: Namespace,
    cgroup: PathBuf,
    ipv4: Ipv4Addr,
    ipv6: Ipv6Addr,
}

impl Pod {
    pub(crate) fn create(node: &Node, name: &str) -> Result<Self> {
        check_name(name)?;
        let host = node.take_host()?;
        let index = node.index();
        let (ipv4, ipv6) = (pod_v4(index, host), pod_v6(index, host));
        let namespace = Namespace::create(node.shared(), format!("up-{}-{}-{name}", node.shared().id, node.name()))?;
        node.plug(&namespace, "eth0", host)?;
        namespace.ip(&format!(
            "route add default via {}\nroute add default via {}\n",
            pod_v4(index, 1),
            pod_v6(index, 1)
        ))?;
        Self::finish(node, name, namespace, node.pods_cgroup().join(name), ipv4, ipv6)
    }

    pub(crate) fn create_routed(node: &Node, name: &str) -> Result<Self> {
        check_name(name)?;
        let host = node.take_host()?;
        let index = node.index();
        let namespace = Namespace::create(node.shared(), format!("up-{}-{}-{name}", node.shared().id, node.name()))?;
        node.plug_routed(&namespace, host)?;
        Self::finish(
            node,
            name,
            namespace,
            node.pods_cgroup().join(name),
            pod_v4(index, host),
            // It has none: connections to it fail.
            pod_v6(index, host),
        )
    }

    fn finish(
        node: &Node,
        name: &str,
        namespace: Namespace,
        cgroup: PathBuf,
        ipv4: Ipv4Addr,
        ipv6: Ipv6Addr,
    ) -> Result<Self> {
        fs::create_dir(&cgroup).with_context(|| format!("creating cgroup {}", cgroup.display()))?;
        let inner = Inner { node: node.clone(), name: name.to_owned(), namespace, cgroup, ipv4, ipv6 };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The node that it is on.
    pub fn node(&self) -> &Node {
        &self.inner.node
    }

    /// Its IPv4 address.
    pub fn ipv4(&self) -> Ipv4Addr {
        self.inner.ipv4
    }

    /// Its IPv6 address.
    pub fn ipv6(&self) -> Ipv6Addr {
        self.inner.ipv6
    }

    /// Its network namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.inner.namespace
    }

    /// Its cgroup directory.
    pub fn cgroup(&self) -> &Path {
        &self.inner.cgroup
    }

    /// A directory for files of a program in this pod.
    pub fn dir(&self, purpose: &str) -> Result<PathBuf> {
        self.node().dir(&format!("{}/{purpose}", self.name()))
    }

    /// A program in the pod: in its network namespace and its cgroup.
    ///
    /// `ip netns exec` would give it another `/sys` without cgroups; this leaves the file system alone.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        command_in(Some(self.cgroup()), self.namespace(), program.as_ref())
    }

    /// A program in the pod's network namespace but not in its cgroup, as `nsenter` on the node would start it.
    pub fn command_outside_cgroup(&self, program: impl AsRef<Path>) -> Command {
        command_in(Some(&self.node().own_cgroup()), self.namespace(), program.as_ref())
    }

    /// Starts a program in the pod; it is killed when the result is dropped.
    pub fn spawn(&self, command: &[&str]) -> Result<Process> {
        let (program, arguments) = command.split_first().context("a command has at least a program")?;
        Process::spawn(self.command(program).args(arguments))
    }

    /// Runs a program to its end. The result may be a failure of the program.
    pub fn run(&self, command: &[&str], within: Duration) -> Result<Output> {
        self.spawn(command)?.output(within)
    }

    /// Runs a program that has to succeed within a minute; its standard output.
    pub fn check(&self, command: &[&str]) -> Result<String> {
        self.run(command, Duration::from_mins(1))?.success()
    }

    /// Starts `testbed-app` in the pod.
    pub fn app(&self, arguments: &[&str]) -> Result<Process> {
        Process::spawn(self.command(crate::app_path()?).args(arguments))
    }

    /// Runs `testbed-app` to its end within a minute; the last line of its output, which is JSON, whatever its exit status.
    pub fn app_json(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        self.app(arguments)?.output(Duration::from_mins(1))?.last_json()
    }

    /// Runs `f` on a thread inside the pod's network namespace (but in the caller's cgroup: those belong to processes).
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        self.namespace().enter(f)
    }

    /// Gives the pod another interface, on `node`'s bridge. Returns its addresses.
    pub fn add_interface(&self, name: &str, node: &Node) -> Result<(Ipv4Addr, Ipv6Addr)> {
        let host = node.take_host()?;
        node.plug(self.namespace(), name, host)?;
        Ok((pod_v4(node.index(), host), pod_v6(node.index(), host)))
    }

    /// Creates a network namespace behind the pod, as a container engine inside it would: its packets are forwarded by the pod, its
    /// processes are in a child of the pod's cgroup.
    pub fn nested(&self, name: &str) -> Result<Self> {
        check_name(name)?;
        let node = self.node();
        let host = node.take_host()?;
        let namespace = Namespace::create(node.shared(), format!("{}-{name}", self.namespace().name()))?;
        let (ipv4, ipv6) = (nested_v4(node.index(), host), nested_v6(node.index(), host));
        self.namespace().sysctl(&[("net.ipv4.ip_forward", "1"), ("net.ipv6.conf.all.forwarding", "1")])?;
        let inner_side = format!("nest{host}");
        self.namespace().ip(&format!("link add {inner_side} type veth peer name eth0 netns {}\n", namespace.name()))?;
        // The usual point-to-point arrangement: a link-local gateway, nothing but a host route towards the inner namespace.
        self.namespace().ip(&format!(
            "link set {inner_side} up\n\
             address add 169.254.1.1/32 dev {inner_side}\n\
             address add fe80::1/64 dev {inner_side} nodad\n\
             route add {ipv4}/32 dev {inner_side}\n\
             route add {ipv6}/128 dev {inner_side}\n"
        ))?;
        namespace.ip(&format!(
            "address add {ipv4}/32 dev eth0\n\
             address add {ipv6}/128 dev eth0 nodad\n\
             link set eth0 up\n\
             route add 169.254.1.1/32 dev eth0\n\
             route add default via 169.254.1.1 dev eth0\n\
             route add default via fe80::1 dev eth0\n"
        ))?;
        node.route_nested(host, self)?;
        Self::finish(node, name, namespace, self.cgroup().join(name), ipv4, ipv6)
    }
}

fn check_name(name: &str) -> Result<()> {
    ensure!(
        (1..=10).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()),
        "a pod's name is 1 to 10 characters of a-z0-9, not {name:?}"
    );
    Ok(())
}

/// A command that moves itself into `cgroup` and `namespace` and then becomes `program`: one process, one process id.
pub(crate) fn command_in(cgroup: Option<&Path>, namespace: &Namespace, program: &Path) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", r#"echo 0 > "$0" && exec "$@""#]);
    command.arg(cgroup.map_or(PathBuf::from("/dev/null"), |directory| directory.join("cgroup.procs")));
    command.arg("nsenter").arg(format!("--net={}", namespace.path().display())).arg("--").arg(program);
    command
}
