//! What operators see of live connections.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::world::{World, at, data_path, eventually, serve};

#[test]
fn both_agents_list_identities_addresses_and_data_path_and_can_close() -> Result<()> {
    let world = World::new("table")?;
    let _echo = serve(&world.server, 8080, &[])?;
    let [vip, _] = testbed::addresses::vips(1);
    let live = world.client.app(&["expect-reset", &at(vip, 80)])?;
    live.wait_json("established", Duration::from_secs(10))?;
    let only = |agent: &testbed::Agent| -> Result<serde_json::Value> {
        let all = agent.connections()?;
        let list = all["connections"].as_array().with_context(|| format!("{all}"))?.clone();
        ensure!(list.len() == 1, "{all}");
        Ok(list[0].clone())
    };
    let (out, inb) = (only(&world.a)?, only(&world.b)?);
    for c in [&out, &inb] {
        ensure!(c["source_identity"] == "spiffe://cluster.local/ns/default/sa/client", "{c}");
        ensure!(c["destination_identity"] == "spiffe://cluster.local/ns/default/sa/server", "{c}");
        ensure!(c["data_path"] == data_path(&world.a)?.as_str(), "{c}");
        ensure!(c["cipher"].as_str().is_some_and(|s| s.starts_with("TLS13_")), "{c}");
    }
    ensure!(out["direction"] == "outbound" && inb["direction"] == "inbound", "{out} {inb}");
    ensure!(out["original_destination"] == at(vip, 80).as_str(), "{out}");
    ensure!(out["upstream"] == at(world.server.ipv4(), 15008).as_str(), "{out}");
    ensure!(out["service"] == "web.default.svc.cluster.local", "{out}");
    ensure!(inb["upstream"] == at(world.server.ipv4(), 8080).as_str(), "{inb}");
    ensure!(inb["source"].as_str().is_some_and(|s| s.starts_with(&world.client.ipv4().to_string())), "{inb}");
    // The table is a tool: closing one resets both applications' ends.
    let id = inb["id"].to_string();
    world.b.ask(&["connections", "--close", &id])?;
    let output = live.output(Duration::from_secs(5))?;
    ensure!(output.status.success(), "{}", output.stdout);
    eventually(Duration::from_secs(5), || {
        for agent in [&world.a, &world.b] {
            ensure!(agent.connections()?["connections"].as_array().is_some_and(Vec::is_empty));
        }
        Ok(())
    })
}
