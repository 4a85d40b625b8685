//! The control plane's network namespace, joined with both nodes.

use std::fmt::Write as _;

use anyhow::Result;

use crate::{
    Testbed,
    addresses::{control_plane_v4, control_plane_v6, nested_v4, nested_v6, pod_v4, pod_v6},
    namespace::Namespace,
    state::Shared,
};

/// The control plane's host number on its wire.
pub(super) const HOST: u8 = 1;
/// A node's host number there is this and its own number.
const NODES: u8 = 10;

/// Creates the namespace. Pods reach it, too: their node forwards, and the control plane routes their subnets back.
pub(super) fn create(testbed: &Testbed, shared: &Shared) -> Result<Namespace> {
    let namespace = Namespace::create(shared, format!("up-{}-kube", shared.id))?;
    namespace.sysctl(&[("net.ipv4.conf.all.rp_filter", "0"), ("net.ipv4.conf.default.rp_filter", "0")])?;
    namespace.ip(&format!(
        "link add br0 type bridge mcast_snooping 0\n\
         address add {}/24 dev br0\n\
         address add {}/64 dev br0 nodad\n\
         link set br0 up\n",
        control_plane_v4(HOST),
        control_plane_v6(HOST),
    ))?;
    for node in &testbed.nodes {
        let (index, port) = (node.index(), format!("node-{}", node.name()));
        let (ipv4, ipv6) = (control_plane_v4(NODES + index), control_plane_v6(NODES + index));
        namespace.ip(&format!(
            "link add {port} type veth peer name kube netns {}\n\
             link set {port} master br0 up\n",
            node.namespace().name(),
        ))?;
        node.namespace().ip(&format!(
            "address add {ipv4}/24 dev kube\n\
             address add {ipv6}/64 dev kube nodad\n\
             link set kube up\n"
        ))?;
        let mut routes = String::new();
        for network in [pod_v4(index, 0), nested_v4(index, 0)] {
            writeln!(routes, "route add {network}/24 via {ipv4}")?;
        }
        for network in [pod_v6(index, 0), nested_v6(index, 0)] {
            writeln!(routes, "route add {network}/64 via {ipv6}")?;
        }
        // Node addresses are on the wire between the nodes.
        writeln!(
            routes,
            "route add {}/32 via {ipv4}\nroute add {}/128 via {ipv6}",
            pod_v4(0, index),
            pod_v6(0, index)
        )?;
        namespace.ip(&routes)?;
    }
    Ok(namespace)
}
