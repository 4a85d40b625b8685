//! `WireGuard` between the nodes, as meshes use it: one tunnel for all pods.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result};
use testbed::{Node, Process, addresses::pod_v4};

const PORT: u16 = 51820;
const WG: Duration = Duration::from_secs(20);

/// Lays a tunnel beside the wire, and routes each node's pods into it.
pub(super) fn join(a: &Node, b: &Node, directory: &Path) -> Result<()> {
    let keys = [a, b].map(|node| key(node, directory));
    let [key_a, key_b] = keys;
    let (key_a, key_b) = (key_a?, key_b?);
    for (node, own, other, peer) in [(a, &key_a, b, &key_b), (b, &key_b, a, &key_a)] {
        node.namespace().ip("link add wg0 type wireguard\n").context("making a WireGuard interface")?;
        let network = format!("{}/24", pod_v4(other.index(), 0));
        let endpoint = format!("{}:{PORT}", pod_v4(0, other.index()));
        let mut wg = node.command("wg");
        wg.args(["set", "wg0", "listen-port", &PORT.to_string(), "private-key"]).arg(&own.file);
        wg.args(["peer", &peer.public, "allowed-ips", &network, "endpoint", &endpoint]);
        Process::spawn(&mut wg)?.output(WG)?.success()?;
        node.namespace().ip(&format!("link set wg0 up\nroute replace {network} dev wg0\n"))?;
    }
    Ok(())
}

struct Key {
    file: std::path::PathBuf,
    public: String,
}

fn key(node: &Node, directory: &Path) -> Result<Key> {
    let private = Process::spawn(node.command("wg").arg("genkey"))?.output(WG)?.success()?;
    let file = directory.join(format!("wireguard-{}", node.name()));
    fs::write(&file, &private).with_context(|| format!("writing {}", file.display()))?;
    let mut public = Process::spawn(node.command("wg").arg("pubkey"))?;
    public.write_stdin(private.as_bytes())?;
    Ok(Key { file, public: public.output(WG)?.success()?.trim().to_owned() })
}
