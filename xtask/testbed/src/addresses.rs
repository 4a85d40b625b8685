//! The address plan, the same in every testbed.
//!
//! | What | IPv4 | IPv6 |
//! |---|---|---|
//! | the wire | 10.77.0.0/24 | `fd77::/64` |
//! | pods of node a | 10.77.1.0/24 | `fd77:1::/64` |
//! | pods of node b | 10.77.2.0/24 | `fd77:2::/64` |
//! | nested namespaces of node a, b | 10.78.1.0/24, 10.78.2.0/24 | `fd78:1::/64`, `fd78:2::/64` |
//! | the Kubernetes control plane and its wire to the nodes | 10.79.0.0/24 | `fd79::/64` |
//! | service VIPs (routed nowhere) | 10.96.0.0/16 | `fd96::/112` |
//!
//! Hosts use the same number in both families; the node itself is number 1.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// All pods of both nodes, IPv4.
pub const PODS_V4: &str = "10.77.0.0/16";
/// All pods of both nodes, IPv6.
pub const PODS_V6: &str = "fd77::/16";
/// Service VIPs, IPv4.
pub const VIPS_V4: &str = "10.96.0.0/16";
/// Service VIPs, IPv6.
pub const VIPS_V6: &str = "fd96::/112";

/// Host `host` on the bridge of node number `node` (a is 1, b is 2); node 0 is the wire.
pub fn pod_v4(node: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, node, host)
}

/// As [`pod_v4`], IPv6.
pub fn pod_v6(node: u8, host: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd77, node.into(), 0, 0, 0, 0, 0, host.into())
}

/// Host `host` among the nested namespaces of node number `node`.
pub fn nested_v4(node: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 78, node, host)
}

/// As [`nested_v4`], IPv6.
pub fn nested_v6(node: u8, host: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd78, node.into(), 0, 0, 0, 0, 0, host.into())
}

/// Host `host` on the wire between the Kubernetes control plane, which is number 1, and the nodes.
pub fn control_plane_v4(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 79, 0, host)
}

/// As [`control_plane_v4`], IPv6.
pub fn control_plane_v6(host: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd79, 0, 0, 0, 0, 0, 0, host.into())
}

/// VIPs of service number `number`, one per family.
pub fn vips(number: u8) -> [IpAddr; 2] {
    [Ipv4Addr::new(10, 96, 0, number).into(), Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, number.into()).into()]
}
