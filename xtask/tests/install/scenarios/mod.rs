//! What happens to an installation.

pub(crate) mod cni;
pub(crate) mod install;
pub(crate) mod label;
pub(crate) mod probes;
pub(crate) mod reboot;
pub(crate) mod scale;
pub(crate) mod uninstall;
pub(crate) mod upgrade;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{cluster::Node, world::World};

/// Where a node's container runtime finds its networks.
pub(crate) const CONFLIST: &str = "/etc/cni/net.d/10-bridge.conflist";

/// Whether the container runtime of a node calls the plugin, once, after all others.
pub(crate) fn chained(world: &World, node: &Node) -> Result<bool> {
    let text = world.cluster.on(node, &format!("cat {CONFLIST}"))?;
    let list: Value = serde_json::from_str(&text).with_context(|| format!("{CONFLIST} is: {text}"))?;
    let plugins = list["plugins"].as_array().with_context(|| format!("{CONFLIST} has no plugins: {text}"))?;
    let at: Vec<_> = plugins.iter().map(|plugin| plugin["type"] == "underpass-cni").collect();
    Ok(at.iter().filter(|ours| **ours).count() == 1 && at.last() == Some(&true))
}
