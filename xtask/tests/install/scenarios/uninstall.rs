//! Away with it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::{
    cluster::Node,
    traffic::{RATE, Traffic, ensure_plaintext, sniff},
    wait::eventually,
    world::{CLIENT, RELEASE, SYSTEM, World},
};

/// How long kubelets may take to say that pods are gone.
const ENDED: Duration = Duration::from_mins(3);
/// What Underpass could leave on a node, one finding a line: pins, files, rules, routes, settings, queues and ports of every namespace.
const LOOK: &str = r#"
find /sys/fs/bpf -mindepth 1 -name '*underpass*'
find /run/underpass /var/lib/underpass -mindepth 1 2>/dev/null
ls /opt/cni/bin | grep underpass
grep -l underpass /etc/cni/net.d/* 2>/dev/null
for namespace in self /run/netns/*; do
    if [ $namespace = self ]; then enter=""; else enter="nsenter --net=$namespace"; fi
    $enter ip rule | grep -v -e 'lookup local' -e 'lookup main' -e 'lookup default'
    $enter ip -6 rule 2>/dev/null | grep -v -e 'lookup local' -e 'lookup main'
    $enter ip route show table all | grep -w table | grep -v 'table local'
    $enter tc qdisc show | grep -e clsact -e ingress
    $enter ss --no-header --tcp --listening --numeric | grep -e ':15001 ' -e ':15006 ' -e ':15008 ' -e ':15053 '
    $enter cat /proc/sys/net/ipv4/tcp_fwmark_accept | grep -v 0
done
true
"#;

/// Everything is given back, on both nodes and in the cluster, and pods talk on in plaintext.
pub(crate) fn leaves_nothing(world: &mut World) -> Result<()> {
    for node in world.cluster.nodes() {
        let there = findings(world, node)?;
        for what in ["/sys/fs/bpf/", "underpass-cni", "10-bridge.conflist", ":15008 "] {
            // The control: it would be found.
            ensure!(there.contains(what), "{what} was not found on {} while it is there:\n{there}", node.name);
        }
    }
    let traffic = Traffic::start(&world.cluster, CLIENT, &world.address("shop/far")?, RATE)?;
    let uninstall = ["uninstall", RELEASE, "--namespace", SYSTEM, "--wait", "--timeout=3m"];
    world.cluster.helm(&uninstall)?.success()?;
    let sniffers = world.cluster.nodes().iter().map(sniff).collect::<Result<Vec<_>>>()?;
    for node in world.cluster.nodes() {
        let left = findings(world, node)?;
        ensure!(left.is_empty(), "left on {}:\n{left}", node.name);
    }
    world.notes.push(format!("while it was uninstalled: {}", traffic.stop()?.all_worked()?));
    for sniffer in sniffers {
        ensure_plaintext(sniffer)?;
    }
    // Helm does not wait for pods that are ending.
    eventually("a cluster without Underpass' objects", ENDED, || objects(world))
}

fn findings(world: &World, node: &Node) -> Result<String> {
    world.cluster.on(node, LOOK).map(|text| text.trim().to_owned())
}

/// What is left in the cluster: the Secret with the authority's root, which is kept on purpose.
fn objects(world: &World) -> Result<()> {
    let namespace = format!("--namespace={SYSTEM}");
    let kinds = "daemonsets,deployments,jobs,pods,services,configmaps,serviceaccounts,secrets,roles,rolebindings";
    let text = world.cluster.kubectl(&["get", kinds, &namespace, "--output=name"])?;
    let ours: Vec<_> = text.lines().filter(|name| name.contains("underpass")).collect();
    ensure!(ours == ["secret/underpass-ca"], "left in {SYSTEM}: {ours:?}");
    let text = world.cluster.kubectl(&["get", "clusterroles,clusterrolebindings", "--output=name"])?;
    let ours = text.lines().find(|name| name.contains("underpass"));
    ours.map_or(Ok(()), |name| Err(anyhow::anyhow!("left in the cluster: {name}"))).context("helm uninstall")
}
