//! The playground's network: the control plane's namespace is the wire between the nodes.
//!
//! ```text
//!   pods ── cni0 ── node-a ── eth0 ── br0 (control plane, 10.79.0.1) ── eth0 ── node-b ── cni0 ── pods
//! ```
//!
//! Nothing of it is in the machine's own namespace, and nothing leads out: there is no internet, and no registry.

use std::{fmt::Write as _, net::Ipv4Addr, process::Command};

use anyhow::Result;
use testbed::{
    Namespace,
    addresses::{control_plane_v4, pod_v4},
};

use super::place::{NODES, Place};
use crate::exec;

/// Host part of the first node's address on the wire.
const FIRST: u8 = 11;

/// Address of the control plane.
pub(super) fn api() -> Ipv4Addr {
    control_plane_v4(1)
}

/// Address of node number `index`, from 0.
pub(super) fn node(index: u8) -> Ipv4Addr {
    control_plane_v4(FIRST + index)
}

/// Network of a node's pods.
pub(super) fn pods(index: u8) -> String {
    format!("{}/24", pod_v4(index + 1, 0))
}

/// Makes the namespaces and connects them.
pub(super) fn create(place: &Place) -> Result<()> {
    let hub = namespace(&place.namespace("api"))?;
    // Frames between the nodes pass this bridge on their way, and are no concern of the control plane's iptables.
    hub.ip(&format!("link add br0 type bridge mcast_snooping 0\naddress add {}/24 dev br0\nlink set br0 up\n", api()))?;
    (0..).zip(NODES).try_for_each(|(index, name)| create_node(place, name, index))
}

/// Makes the namespace of node number `index` and connects it with the others.
pub(super) fn create_node(place: &Place, name: &str, index: u8) -> Result<()> {
    let node_namespace = namespace(&place.namespace(name))?;
    Namespace::existing(&place.namespace("api")).ip(&format!(
        "link add {name} type veth peer name eth0 netns {}\nlink set {name} master br0 up\nroute replace {} via {}\n",
        node_namespace.name(),
        pods(index),
        node(index)
    ))?;
    let mut batch =
        format!("address add {}/24 dev eth0\nlink set eth0 up\nroute add default via {}\n", node(index), api());
    // Where clouds tell machines who they are: the kubelet asks when it starts, and would wait for an answer.
    batch.push_str("route add unreachable 169.254.169.254\n");
    for (other, _) in (0..).zip(NODES).filter(|(other, _)| *other != index) {
        writeln!(batch, "route add {} via {}", pods(other), node(other))?;
    }
    node_namespace.ip(&batch).map(drop)
}

/// Removes the namespace of a node, and what connected it.
pub(super) fn remove_node(place: &Place, name: &str) -> Result<()> {
    // First: with the namespace it would end, but not at once.
    Namespace::existing(&place.namespace("api")).ip(&format!("link del {name}\n"))?;
    exec::output(Command::new("ip").args(["netns", "del", &place.namespace(name)])).map(drop)
}

/// Makes a namespace that forwards.
fn namespace(name: &str) -> Result<Namespace> {
    testbed::locked(|| exec::output(Command::new("ip").args(["netns", "add", name])))?;
    let namespace = Namespace::existing(name);
    namespace.sysctl(&[
        ("net.ipv4.ip_forward", "1"),
        ("net.ipv4.conf.all.rp_filter", "0"),
        ("net.ipv4.conf.default.rp_filter", "0"),
    ])?;
    namespace.ip("link set lo up\n")?;
    // Where bridges can call iptables, each namespace has a switch of its own: a reply within a node has to be translated, too.
    if std::path::Path::new("/proc/sys/net/bridge").exists() {
        namespace.sysctl(&[("net.bridge.bridge-nf-call-iptables", "1")])?;
    }
    Ok(namespace)
}

/// Removes the namespaces that are there.
pub(super) fn remove(place: &Place) -> Result<()> {
    for name in place.namespaces() {
        if Namespace::existing(&name).path().exists() {
            exec::output(Command::new("ip").args(["netns", "del", &name]))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{NODES, api, node, pods};

    #[test]
    fn addresses_are_everybodys_own() {
        let count = u8::try_from(NODES.len()).unwrap();
        let all: BTreeSet<_> = (0..count).map(node).chain([api()]).collect();
        assert_eq!(all.len(), NODES.len() + 1);
        assert_eq!((0..count).map(pods).collect::<Vec<_>>(), ["10.77.1.0/24", "10.77.2.0/24"]);
    }
}
