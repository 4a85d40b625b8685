//! A machine is started again.

use anyhow::{Context, Result, ensure};

use super::{chained, cni::ready, label::encrypted};
use crate::{
    traffic::{RATE, Traffic, ensure_encrypted, sniff},
    wait::eventually,
    world::{CLIENT, READY, World},
};

/// Nothing that was pinned is left, the plugin is, so pods wait until the agent is there; not a packet of theirs can be read meanwhile.
pub(crate) fn a_node_starts_anew(world: &mut World) -> Result<()> {
    let [first, second] = world.cluster.pair()?;
    let restarts = |world: &World| -> Result<u64> {
        let pod = world.pod("shop/far")?;
        pod["status"]["containerStatuses"][0]["restartCount"].as_u64().context("a pod has a number of restarts")
    };
    let before = restarts(world)?;
    let traffic = Traffic::start(&world.cluster, CLIENT, &world.address("shop/far")?, RATE)?;
    let sniffer = sniff(first)?;
    world.cluster.xtask("reboot", &[&second.name])?;
    eventually("the pod's next life", READY, || {
        ensure!(restarts(world)? > before, "it was not restarted");
        ready(world, "shop/far")
    })?;
    world.wait_agents()?;
    ensure!(chained(world, second)?, "{} does not call the plugin", second.name);
    let address = world.address("shop/far")?;
    eventually("traffic to the pod", READY, || {
        Traffic::start(&world.cluster, CLIENT, &address, RATE)?.stop()?.all_worked()
    })?;
    // Its connections failed while there was nobody; none of them was made in plaintext.
    world.notes.push(format!("to the node that was away: {}", traffic.stop()?));
    ensure_encrypted(sniffer)?;
    world.wait_ready("plain")?;
    encrypted(world)
}
