//! A label is all that it takes.

use std::time::Duration;

use anyhow::Result;

use crate::{
    traffic::{RATE, Traffic, ensure_encrypted, ensure_plaintext, sniff},
    world::{CLIENT, World},
};

/// Two seconds (docs/kubernetes.md), and some more.
const GRACE: Duration = Duration::from_secs(3);
/// Long enough for many connections.
const MOMENT: Duration = Duration::from_millis(500);

/// Puts the namespace `shop` into the mesh, or takes it out.
pub(crate) fn mark(world: &World, member: bool) -> Result<()> {
    let label = if member { "underpass.io/mode=enabled" } else { "underpass.io/mode-" };
    world.cluster.kubectl(&["label", "--overwrite", "namespace", "shop", label])?;
    world.wait_enrolled(member)
}

/// Pods that run already are taken in; from then on nobody reads what they say, between nodes and on one.
pub(crate) fn encrypts(world: &mut World) -> Result<()> {
    mark(world, true)?;
    settle();
    encrypted(world)
}

/// Traffic on one node and between both cannot be read.
pub(crate) fn encrypted(world: &World) -> Result<()> {
    let [first, second] = world.cluster.pair()?;
    for (target, nodes) in [("shop/near", &[first][..]), ("shop/far", &[first, second])] {
        let sniffers = nodes.iter().map(|node| sniff(node)).collect::<Result<Vec<_>>>()?;
        let traffic = Traffic::start(&world.cluster, CLIENT, &world.address(target)?, RATE)?;
        std::thread::sleep(MOMENT);
        traffic.stop()?.all_worked()?;
        for sniffer in sniffers {
            ensure_encrypted(sniffer)?;
        }
    }
    Ok(())
}

/// Waits for the grace that agents give peers who know of a label later.
pub(crate) fn settle() {
    std::thread::sleep(GRACE);
}

/// The label goes and comes back under traffic: what is said is readable without it, and not with it, and no connection fails.
pub(crate) fn removed_and_added(world: &mut World) -> Result<()> {
    let [first, _] = world.cluster.pair()?;
    let traffic = ["shop/near", "shop/far"].map(|server| {
        let target = world.address(server)?;
        Traffic::start(&world.cluster, CLIENT, &target, RATE)
    });
    let traffic = traffic.into_iter().collect::<Result<Vec<_>>>()?;
    mark(world, false)?;
    settle();
    let sniffer = sniff(first)?;
    std::thread::sleep(MOMENT);
    ensure_plaintext(sniffer)?;
    mark(world, true)?;
    settle();
    let sniffer = sniff(first)?;
    std::thread::sleep(MOMENT);
    ensure_encrypted(sniffer)?;
    let reports = traffic.into_iter().map(Traffic::stop).collect::<Result<Vec<_>>>()?;
    for (report, which) in reports.into_iter().zip(["on one node", "between nodes"]) {
        world.notes.push(format!("{which}: {}", report.all_worked()?));
    }
    Ok(())
}
