//! What is pinned is told alike by a live and by a dead agent's node.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{json, printed, run};
use crate::world::{Stage, World, app, at, serve};

const LISTED: [&str; 12] = [
    "PODS",
    "PODS_BY_ID",
    "MESH",
    "EXCLUDED_CIDRS",
    "PORT_RULES",
    "PROBE_CGROUPS",
    "PROBES",
    "NODE_ADDRESSES",
    "NODE_INTERFACES",
    "FLOWS",
    "PENDING_FLOWS",
    "COUNTERS",
];

/// What `bpf` prints, without numbers that the kernel counts while it is looked at.
fn everything(world: &World) -> Result<Vec<(String, Value)>> {
    let mut all = Vec::new();
    for arguments in [&["bpf", "programs"][..], &["bpf", "maps"]] {
        let mut value = json(&world.b, arguments)?;
        for row in value["programs"].as_array_mut().into_iter().flatten() {
            for moving in ["runs", "run_time_ns"] {
                row[moving] = Value::Null;
            }
            // Computed from the time since boot.
            row["loaded_at"] = Value::Null;
        }
        for row in value["maps"].as_array_mut().into_iter().flatten() {
            row["memory"] = Value::Null;
        }
        all.push((arguments.join(" "), value));
    }
    for map in LISTED {
        all.push((map.to_owned(), json(&world.b, &["bpf", "dump", map])?));
    }
    Ok(all)
}

fn rows<'a>(value: &'a Value, list: &str) -> Result<&'a Vec<Value>> {
    value[list].as_array().with_context(|| format!("no {list} in {value}"))
}

#[test]
fn programs_and_maps_are_told_alike_with_the_agent_dead() -> Result<()> {
    let mut stage = Stage::new("pins")?;
    let server = stage.mesh.workload("server");
    server.mode = Some(testbed::Mode::Strict);
    server.ports = vec![testbed::PortMode { port: 9090, mode: testbed::Mode::Permissive }];
    let mut world = stage.start()?;
    let _echo = serve(&world.server, 8080, &[])?;
    app(&world.client, &["request", &at(world.server.ipv4(), 8080)])?;

    let live = everything(&world)?;
    let find = |name: &str| live.iter().find(|(n, _)| n == name).map(|(_, v)| v).context(name.to_owned());
    let programs = rows(find("bpf programs")?, "programs")?;
    let hooks: Vec<_> = programs.iter().filter_map(|p| p["hook"].as_str()).collect();
    ensure!(
        hooks[..7]
            == ["sockops", "getpeername4", "getpeername6", "getsockname4", "getsockname6", "connect4", "connect6"],
        "{hooks:?}"
    );
    ensure!(programs.iter().all(|p| p["problem"].is_null() && p["own"] == true), "{programs:?}");
    ensure!(programs.iter().all(|p| p["program"].as_str().is_some_and(|n| n.starts_with("up_"))), "{programs:?}");
    // Kernels without tcx have filters instead, which have no pins.
    for tc in programs.iter().filter(|p| !p["pod_id"].is_null()) {
        ensure!(tc["workload"] == "default/server" && tc["attached"]["interface"].is_u64(), "{tc}");
    }
    let pod = &rows(find("PODS")?, "entries")?[0];
    ensure!(pod["key"]["workload"] == "default/server", "{pod}");
    ensure!(pod["value"]["ipv4"] == world.server.ipv4().to_string().as_str(), "{pod}");
    ensure!(pod["value"]["flags"] == serde_json::json!(["strict"]), "{pod}");
    let mesh = rows(find("MESH")?, "entries")?;
    let network = format!("{}/32", world.client.ipv4());
    ensure!(
        mesh.iter().any(|e| e["key"]["network"] == network.as_str() && e["value"]["flags"][0] == "capture"),
        "{mesh:?}"
    );
    let rules = rows(find("PORT_RULES")?, "entries")?;
    let permissive = |e: &Value| {
        e["key"]["port"] == 9090 && e["key"]["workload"] == "default/server" && e["value"]["action"] == "permissive"
    };
    ensure!(rules.iter().any(permissive), "{rules:?}");
    let counters = rows(find("COUNTERS")?, "entries")?;
    ensure!(counters.iter().any(|e| e["key"]["counter"] == "captured" && e["value"]["total"].is_u64()), "{counters:?}");
    for map in rows(find("bpf maps")?, "maps")? {
        ensure!(map["problem"].is_null(), "{map}");
        let counted = LISTED.iter().any(|name| map["map"] == *name);
        ensure!(map["entries"].is_u64() == counted, "{map}");
    }
    let all = printed(&world.b, &["bpf", "programs", "--check"])? + &printed(&world.b, &["bpf", "maps", "--check"])?;
    ensure!(all.contains("up_connect4") && all.contains("PORT_RULES"), "{all}");

    world.b.kill()?;
    for ((name, before), (_, after)) in live.iter().zip(everything(&world)?) {
        // What the dying agent's sockets send is counted, too.
        let same = if name == "COUNTERS" { before["total"] == after["total"] } else { *before == after };
        ensure!(same, "{name} changed when the agent died:\n{before}\n{after}");
    }
    let limited = json(&world.b, &["bpf", "dump", "mesh", "--limit", "1"])?;
    ensure!(limited["entries"].as_array().map(Vec::len) == Some(1) && limited["total"].as_u64() > Some(1), "{limited}");
    Ok(())
}

#[test]
fn what_is_missing_or_cannot_be_listed_is_said() -> Result<()> {
    let mut world = World::new("unpinned")?;
    for (map, part) in [("SOCKETS", "stored with sockets"), ("EVENTS", "a queue"), ("nosuch", "there are PODS, ")] {
        let (code, stdout, stderr) = run(&world.b, &["bpf", "dump", map])?;
        ensure!(code == 1 && stdout.is_empty() && stderr.contains(part), "{map}: {code} {stderr}");
    }
    // Nobody but a broken operator removes a single pin.
    let links = std::fs::read_dir(world.b.pin_root())?.flatten().next().context("a version")?.path().join("links");
    std::fs::remove_file(links.join("getpeername6"))?;
    let (code, stdout, stderr) = run(&world.b, &["bpf", "programs", "--check"])?;
    ensure!(
        code == 4 && stderr.contains("problem: getpeername6: the link cannot be opened"),
        "{code} {stdout}{stderr}"
    );
    world.b.kill()?;
    world.b.cleanup()?.success()?;
    for verb in ["programs", "maps"] {
        let text = printed(&world.b, &["bpf", verb])?;
        ensure!(text.starts_with("nothing is pinned under "), "{text}");
        let (code, _, stderr) = run(&world.b, &["bpf", verb, "--check"])?;
        ensure!(code == 4 && stderr.contains("nothing is pinned"), "{code} {stderr}");
    }
    let (code, _, stderr) = run(&world.b, &["bpf", "dump", "PODS"])?;
    ensure!(code == 1 && stderr.contains("see `underpass bpf maps`"), "{code} {stderr}");
    Ok(())
}
