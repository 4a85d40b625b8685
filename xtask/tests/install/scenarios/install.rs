//! Helm installs Underpass, and says whether it works.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::{
    traffic::{RATE, Traffic, ensure_plaintext, sniff},
    wait::eventually,
    world::{CLIENT, RELEASE, SYSTEM, World, path},
};

/// Values for tests beside those of the playground: two replicas of the authority, as in clusters that people rely on.
pub(crate) const VALUES: [&str; 3] = ["--set=image.tag=one", "--set=ca.replicas=2", "--set=mesh.mode=permissive"];

/// Nothing changes for pods when it is installed, and both nodes get an agent and the plugin.
pub(crate) fn by_helm(world: &mut World) -> Result<()> {
    let far = world.address("shop/far")?;
    let traffic = Traffic::start(&world.cluster, CLIENT, &far, RATE)?;
    let image = world.underpass("one")?;
    let arguments = [&["--image", path(&image)?, "--"][..], &VALUES[..]].concat();
    world.cluster.xtask("install", &arguments)?;
    world.wait_agents()?;
    let start = Instant::now();
    wait_root(world)?;
    world.notes.push(format!(
        "the authority's root was with the agents {:.1} s after they were ready",
        start.elapsed().as_secs_f64()
    ));
    let sniffers = world.cluster.nodes().iter().map(sniff).collect::<Result<Vec<_>>>()?;
    // At least one connection for them, however quickly the rest of this goes.
    Traffic::start(&world.cluster, CLIENT, &far, RATE)?.stop()?.all_worked()?;
    for node in world.cluster.nodes() {
        let plugins = world.cluster.on(node, "ls /opt/cni/bin")?;
        ensure!(plugins.lines().any(|plugin| plugin == "underpass-cni"), "{}: {plugins}", node.name);
        ensure!(crate::scenarios::chained(world, node)?, "{} does not call the plugin", node.name);
    }
    world.notes.push(traffic.stop()?.all_worked()?.to_string());
    // The control for all captures that follow: the marker is found where it is.
    for sniffer in sniffers {
        ensure_plaintext(sniffer)?;
    }
    Ok(())
}

/// Waits until the kubelets have given the agents the authority's root, which is younger than their pods. Until then there are no certificates, and
/// pods of the mesh reach nobody.
fn wait_root(world: &World) -> Result<()> {
    let root = "test -e /var/lib/kubelet/pods/*/volumes/kubernetes.io~configmap/ca-root/ca.crt";
    eventually("the authority's root", Duration::from_secs(90), || {
        world.cluster.nodes().iter().try_for_each(|node| world.cluster.on(node, root).map(drop))
    })
}

/// `helm test`.
pub(crate) fn helm_test(world: &mut World) -> Result<()> {
    let output = world.cluster.helm(&["test", RELEASE, "--namespace", SYSTEM, "--timeout=2m"])?;
    let said = output.success().context("helm test")?;
    ensure!(said.contains("Phase:          Succeeded"), "{said}");
    Ok(())
}
