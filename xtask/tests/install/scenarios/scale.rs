//! Pods come and go while others talk to them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::{
    manifests::{self, PORT},
    traffic::{RATE, Traffic},
    wait::eventually,
    world::{CLIENT, World},
};

/// How many at most.
const MANY: u32 = 30;
/// How long that many may take, on a machine that is busy.
const SCALED: Duration = Duration::from_mins(3);
/// Seconds that a pod serves on after it was told to end, so that all know before it does.
const LINGER: u32 = 5;

/// A service has one pod that stays, and 1, 30 and then 0 that come and go: no connection fails.
pub(crate) fn under_traffic(world: &mut World) -> Result<()> {
    let [first, _] = world.node_names()?;
    let mut template = manifests::app(&manifests::echo());
    template["terminationGracePeriodSeconds"] = json!(LINGER);
    // A pod that is ready listens.
    template["containers"][0]["readinessProbe"] = json!({ "tcpSocket": { "port": PORT }, "periodSeconds": 2 });
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": { "name": "crowd", "namespace": "shop" },
        "spec": {
            "replicas": 1,
            "selector": { "matchLabels": { "app": "web", "crowd": "true" } },
            "template": { "metadata": { "labels": { "app": "web", "crowd": "true" } }, "spec": template },
        },
    });
    let steady = manifests::pod("shop", "steady", &first, &json!({ "app": "web" }), &manifests::echo());
    world.cluster.apply(&manifests::list(&[deployment, steady, manifests::service("shop", "web")]))?;
    wait_crowd(world, 1)?;
    let service = world.cluster.get(&["service", "web", "--namespace=shop"])?;
    let address = service["spec"]["clusterIP"].as_str().context("the service has an address")?;
    let traffic = Traffic::start(&world.cluster, CLIENT, &format!("{address}:{PORT}"), RATE)?;
    for count in [MANY, 0] {
        let replicas = format!("--replicas={count}");
        world.cluster.kubectl(&["scale", "deployment/crowd", "--namespace=shop", &replicas])?;
        wait_crowd(world, count)?;
    }
    world.notes.push(traffic.stop()?.all_worked()?.to_string());
    let delete = ["delete", "--namespace=shop", "deployment/crowd", "service/web", "pod/steady"];
    world.cluster.kubectl(&delete).map(drop)
}

/// Waits until so many pods of the deployment are ready, and there are no others.
fn wait_crowd(world: &World, count: u32) -> Result<()> {
    eventually(&format!("{count} pods"), SCALED, || {
        let pods = world.cluster.get(&["pods", "--namespace=shop", "--selector=crowd=true"])?;
        let pods = pods["items"].as_array().context("a list has items")?;
        let ready = pods.iter().filter(|pod| crate::world::is_ready(pod)).count();
        ensure!(pods.len() == count as usize && ready == pods.len(), "{ready} of {} are ready", pods.len());
        Ok(())
    })
}
