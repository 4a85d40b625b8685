//! An API server that has too much to do, and one that is away for longer than any timeout.

use std::{net::Ipv4Addr, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use testbed::{Agent, AgentOptions, Testbed, underpass_path};

use crate::{
    mesh::SOON,
    scale::{Mesh, document, wait},
    simulated::{Simulated, Size, address},
};

const SIZE: Size = Size { pods: 20, local: 0, services: 4 };
/// How long the API server sends everybody away.
const THROTTLED: Duration = Duration::from_secs(15);
/// Kinds that are followed.
const KINDS: u64 = 7;
/// Longer than a watch and every timeout of a connection.
const AWAY: Duration = Duration::from_secs(150);

fn start(bed: &Testbed, api: &Simulated) -> Result<(Agent, Mesh)> {
    let options = AgentOptions { ready_within: None, ..AgentOptions::default() };
    let agent = Agent::start(bed.node("a"), &underpass_path()?, &document(bed, api)?, options)?;
    agent.wait_status(SOON, |s| Ok(s["cluster"]["synced"] == true && s["generation"] != 0))?;
    let mesh = Mesh::open(&agent)?;
    wait(&mesh, |mesh| mesh.has(address(SIZE.pods - 1)), SOON)?;
    Ok((agent, mesh))
}

fn pods(status: &Value) -> Option<&Value> {
    status["cluster"]["kinds"].as_array()?.iter().find(|kind| kind["kind"] == "Pod")
}

fn fails(status: &Value) -> bool {
    pods(status).is_some_and(|pods| !pods["error"].is_null())
}

#[test]
fn an_api_server_that_throttles_is_asked_seldom_and_what_is_known_stays() -> Result<()> {
    let bed = Testbed::new("kthrot")?;
    let api = Simulated::start(bed.node("a"), SIZE)?;
    let (agent, mesh) = start(&bed, &api)?;
    api.throttle(true);
    let told = agent.wait_status(SOON, |status| Ok(fails(status)))?;
    ensure!(
        pods(&told).is_some_and(
            |pods| pods["error"].to_string().contains("429") || pods["error"].to_string().contains("too many")
        ),
        "{told}"
    );
    let (missed, before) = (Ipv4Addr::new(10, 9, 0, 1), api.refused());
    api.change(3, missed);
    // Nothing announces that nothing happens.
    thread::sleep(THROTTLED);
    let asked = api.refused() - before;
    ensure!((1..=KINDS * THROTTLED.as_secs()).contains(&asked), "{asked} requests in {THROTTLED:?}");
    ensure!((0..SIZE.pods).all(|i| mesh.has(address(i))), "what is known stays in force");
    ensure!(!mesh.has(missed), "nobody can have told");
    api.throttle(false);
    wait(&mesh, |mesh| mesh.has(missed) && !mesh.has(address(3)), Duration::from_mins(1))?;
    agent.wait_status(Duration::from_mins(1), |status| Ok(!fails(status)))?;
    Ok(())
}

#[test]
#[ignore = "takes three minutes"]
fn an_api_server_is_away_for_minutes_while_pods_come_and_go() -> Result<()> {
    let bed = Testbed::new("kminutes")?;
    let mut api = Simulated::start(bed.node("a"), SIZE)?;
    let (agent, mesh) = start(&bed, &api)?;
    let moved = |i: usize| Ipv4Addr::new(10, 9, 1, 1 + i as u8);
    api.go_away();
    for i in 0..8 {
        api.change(i, moved(i));
    }
    for i in 4..12 {
        api.remove(i);
    }
    thread::sleep(AWAY);
    ensure!((0..SIZE.pods).all(|i| mesh.has(address(i))), "what is known stays in force");
    let status = agent.status()?;
    ensure!(fails(&status), "an API server that is away is told: {status}");
    api.come_back()?;
    // The longest pause between two attempts is 30 s.
    wait(&mesh, |mesh| mesh.has(moved(0)), Duration::from_mins(1)).with_context(|| agent.log())?;
    agent.wait_status(Duration::from_mins(1), |status| Ok(!fails(status)))?;
    for i in 0..SIZE.pods {
        let (is, was) = (mesh.has(moved(i)), mesh.has(address(i)));
        let expected = match i {
            0..4 => (true, false),
            4..12 => (false, false),
            _ => (false, true),
        };
        ensure!((is, was) == expected, "pod {i}: {is}, {was}");
    }
    api.change(15, moved(15));
    wait(&mesh, |mesh| mesh.has(moved(15)) && !mesh.has(address(15)), SOON)
}
