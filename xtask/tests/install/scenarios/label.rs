//! A label is all that it takes.

use anyhow::Result;

use crate::{
    traffic::{Traffic, ensure_encrypted, ensure_plaintext, sniff},
    world::{CLIENT, World},
};

/// Puts the namespace `shop` into the mesh, or takes it out.
pub(crate) fn mark(world: &World, member: bool) -> Result<()> {
    let label = if member { "underpass.io/mode=enabled" } else { "underpass.io/mode-" };
    world.cluster.kubectl(&["label", "--overwrite", "namespace", "shop", label])?;
    world.wait_enrolled(member)
}

/// Pods that run already are taken in, without a connection that fails; from then on nobody reads what they say, between nodes and on one.
pub(crate) fn encrypts(world: &mut World) -> Result<()> {
    let targets = [world.address("shop/near")?, world.address("shop/far")?];
    let before =
        targets.iter().map(|target| Traffic::start(&world.cluster, CLIENT, target, 50)).collect::<Result<Vec<_>>>()?;
    mark(world, true)?;
    settle();
    for traffic in before {
        world.notes.push(format!("while it was labelled: {}", traffic.stop()?.all_worked()?));
    }
    encrypted(world)
}

/// Traffic on one node and between both cannot be read.
pub(crate) fn encrypted(world: &World) -> Result<()> {
    let [first, second] = world.cluster.pair()?;
    for (target, nodes) in [("shop/near", &[first][..]), ("shop/far", &[first, second])] {
        let sniffers = nodes.iter().map(|node| sniff(node)).collect::<Result<Vec<_>>>()?;
        let traffic = Traffic::start(&world.cluster, CLIENT, &world.address(target)?, 50)?;
        std::thread::sleep(std::time::Duration::from_millis(500));
        traffic.stop()?.all_worked()?;
        for sniffer in sniffers {
            ensure_encrypted(sniffer)?;
        }
    }
    Ok(())
}

/// Waits for the grace that the agents give peers who know of a label later (docs/kubernetes.md): two seconds.
pub(crate) fn settle() {
    std::thread::sleep(std::time::Duration::from_secs(3));
}

/// The label goes and comes back under traffic.
pub(crate) fn removed_and_added(world: &mut World) -> Result<()> {
    let [first, _] = world.cluster.pair()?;
    let target = world.address("shop/far")?;
    let traffic = Traffic::start(&world.cluster, CLIENT, &target, 50)?;
    mark(world, false)?;
    settle();
    let sniffer = sniff(first)?;
    std::thread::sleep(std::time::Duration::from_millis(500));
    ensure_plaintext(sniffer)?;
    mark(world, true)?;
    settle();
    let sniffer = sniff(first)?;
    std::thread::sleep(std::time::Duration::from_millis(500));
    ensure_encrypted(sniffer)?;
    world.notes.push(traffic.stop()?.all_worked()?.to_string());
    Ok(())
}
