//! Policies on real connections: who is let in, and what a change ends.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testbed::{Pod, Protocol, pace};

use crate::world::{Stage, World, app, app_error, at, counter, live, serve, wait_counter};

/// The identity of a pod of the testbed, as policies write it.
fn principal(name: &str) -> String {
    format!("cluster.local/ns/default/sa/{name}")
}

fn policy(name: &str, action: &str, rules: &Value) -> Value {
    json!({ "name": name, "namespace": "default", "action": action, "rules": rules })
}

/// A pod that stays outside of the mesh, though its addresses are known.
fn outsider(stage: &mut Stage, node: &str, name: &str) -> Result<Pod> {
    let pod = stage.bed.node(node).pod(name)?;
    let workload = stage.mesh.enroll(&pod);
    workload.enroll = None;
    workload.protocol = Protocol::Plain;
    Ok(pod)
}

#[test]
fn identities_are_let_in_by_name() -> Result<()> {
    let mut stage = Stage::new("allow")?;
    let other = stage.bed.node("a").pod("other")?;
    stage.mesh.enroll(&other);
    let rule = json!([{ "from": [{ "source": { "principals": [principal("client")] } }], "to": [{ "operation": { "ports": ["8080"] } }] }]);
    let mut only_server = policy("only-client", "ALLOW", &rule);
    only_server["selector"] = json!({ "matchLabels": { "app": "server" } });
    stage.mesh.policies.push(only_server);
    let mut world = stage.start()?;
    let _echo = serve(&world.server, 8080, &[])?;
    let _second = serve(&world.server, 8081, &[])?;
    let (to, elsewhere) = (at(world.server.ipv4(), 8080), at(world.server.ipv4(), 8081));
    // Nothing has the label yet.
    app(&other, &["request", &to])?;
    world.mesh.policies[0].as_object_mut().context("an object")?.remove("selector");
    world.reload()?;
    app(&world.client, &["request", &to])?;
    ensure!(app_error(&world.client, &["request", &elsewhere])? == "ECONNRESET", "another port");
    ensure!(app_error(&other, &["request", &to])? == "ECONNRESET", "another identity");
    wait_counter(&world.b, "refused.policy", 2)?;
    wait_counter(&world.a, "refused.denied-by-peer", 2)?;
    // The running agent explains what it did.
    for (name, allowed) in [("client", true), ("other", false)] {
        let from = format!("spiffe://{}", principal(name));
        let why = world.b.ask(&["policy", "explain", "--from", &from, "--to", &to])?;
        ensure!(why["explanations"][0]["allowed"] == allowed, "{why}");
    }
    let listed = world.b.ask(&["policies"])?;
    ensure!(listed["policies"][0]["name"].as_str().is_some_and(|name| name.contains("only-client")), "{listed}");
    ensure!(world.b.log().contains("ALLOW policies select the workload and none of them matches"), "{}", world.b.log());
    Ok(())
}

/// Of two hundred live connections a change of policy ends the half that it forbids, within a second, and no other.
#[test]
fn a_change_ends_exactly_what_it_forbids() -> Result<()> {
    let mut stage = Stage::new("change")?;
    let other = stage.bed.node("a").pod("other")?;
    stage.mesh.enroll(&other);
    let mut world = stage.start()?;
    let _echo = serve(&world.server, 8080, &[])?;
    let to = at(world.server.ipv4(), 8080);
    let hold = ["hold", to.as_str(), "--count", "100", "--concurrency", "10", "--exchange"];
    let (allowed, denied) = (world.client.app(&hold)?, other.app(&hold)?);
    for process in [&allowed, &denied] {
        ensure!(process.wait_json("held", pace::patience(Duration::from_secs(30)))?["held"] == 100);
    }
    ensure!(live(&world.b)? == 200, "{}", world.b.connections()?);
    let rule = json!([{ "from": [{ "source": { "principals": [principal("other")] } }] }]);
    world.mesh.policies.push(policy("not-other", "DENY", &rule));
    world.reload()?;
    let start = Instant::now();
    world.b.wait_connections(pace::patience(Duration::from_secs(1)), |all| all.len() <= 100)?;
    println!("gone {:?} after the agents took the policy", start.elapsed());
    let ends = denied.output(pace::patience(Duration::from_secs(30)))?.last_json()?;
    ensure!(ends["endings"]["ECONNRESET"] == 100, "{ends}");
    ensure!(app_error(&other, &["request", &to])? == "ECONNRESET");
    let alive = allowed.output(pace::patience(Duration::from_secs(30)))?.last_json()?;
    ensure!(alive["alive"] == 100, "{alive}");
    Ok(())
}

/// Plaintext has no identity, only an address. Where that decides, the agent is asked; where it does not, the kernel decides alone.
#[test]
fn plaintext_is_judged_by_address_and_port() -> Result<()> {
    let mut stage = Stage::new("blocks")?;
    let friend = outsider(&mut stage, "a", "friend")?;
    let stranger = outsider(&mut stage, "a", "stranger")?;
    let blocks = json!([friend.ipv4().to_string(), friend.ipv6().to_string()]);
    stage.mesh.policies.push(policy(
        "friends",
        "ALLOW",
        &json!([
            { "from": [{ "source": { "ipBlocks": blocks } }], "to": [{ "operation": { "ports": ["8080"] } }] },
            { "from": [{ "source": { "principals": ["*"] } }] },
        ]),
    ));
    let mut world = stage.start()?;
    let echo = serve(&world.server, 8080, &["--print"])?;
    let _second = serve(&world.server, 8081, &[])?;
    for ip in [world.server.ipv4().into(), std::net::IpAddr::from(world.server.ipv6())] {
        let to = at(ip, 8080);
        app(&friend, &["request", &to])?;
        ensure!(app_error(&stranger, &["request", &to])? == "ECONNRESET", "a stranger over {ip}");
        // No address helps here, so nobody is asked: the SYN is answered with a reset.
        let error = app_error(&friend, &["request", &at(ip, 8081), "--timeout", "3"])?;
        ensure!(error == "ECONNREFUSED", "{error}");
        app(&world.client, &["request", &to])?;
        app(&world.client, &["request", &at(ip, 8081)])?;
    }
    ensure!(counter(&world.b, "plaintext_in")? == 2, "{}", world.b.counters()?);
    ensure!(counter(&world.b, "refused.policy")? == 2, "{}", world.b.counters()?);
    ensure!(counter(&world.b, "bpf.inbound_strict_dropped")? >= 2, "{}", world.b.counters()?);
    ensure!(
        echo.text(testbed::Stream::Stdout).contains(&friend.ipv4().to_string()),
        "the friend's address is not what the application sees"
    );

    // A live one is judged again when the policy changes, whether the agent carries it or not.
    let to = at(world.server.ipv4(), 8080);
    let carried = friend.app(&["hold", &to, "--count", "5", "--exchange"])?;
    carried.wait_json("held", Duration::from_secs(20))?;
    world.mesh.policies.clear();
    world.reload()?;
    let direct = stranger.app(&["hold", &to, "--count", "5", "--exchange"])?;
    direct.wait_json("held", Duration::from_secs(20))?;
    let mesh = world.client.app(&["hold", &to, "--count", "5", "--exchange"])?;
    mesh.wait_json("held", Duration::from_secs(20))?;
    world.mesh.policies.push(policy(
        "no-plaintext",
        "DENY",
        &json!([
            { "from": [{ "source": { "notPrincipals": ["*"] } }] },
        ]),
    ));
    world.reload()?;
    world.b.wait_connections(pace::patience(Duration::from_secs(1)), |all| all.len() == 5)?;
    for process in [carried, direct] {
        let ends = process.output(Duration::from_secs(20))?.last_json()?;
        ensure!(ends["endings"]["ECONNRESET"] == 5, "{ends}");
    }
    ensure!(mesh.output(Duration::from_secs(20))?.last_json()?["alive"] == 5);
    Ok(())
}

/// Dry-run policies are reported and decide nothing.
#[test]
fn a_dry_run_is_only_reported() -> Result<()> {
    let mut stage = Stage::new("dryrun")?;
    let mut nobody = policy("nobody", "DENY", &json!([{}]));
    nobody["dryRun"] = json!(true);
    stage.mesh.policies.push(nobody);
    let world: World = stage.start()?;
    let _echo = serve(&world.server, 8080, &[])?;
    app(&world.client, &["request", &at(world.server.ipv4(), 8080)])?;
    world.b.wait_log("dry run: would be denied", Duration::from_secs(10))?;
    Ok(())
}

/// A pod with more port rules than its share takes plaintext on no port whose rule does not fit,
/// and says so. Old rules do not stay in force.
#[test]
fn more_ports_than_the_map_has_room_for() -> Result<()> {
    let mut stage = Stage::new("ports")?;
    let second = stage.bed.node("b").pod("second")?;
    stage.mesh.enroll(&second);
    let friend = outsider(&mut stage, "a", "friend")?;
    let block = json!([{ "source": { "ipBlocks": [friend.ipv4().to_string()] } }]);
    let ports = |ports: Vec<String>| json!([{ "from": block, "to": [{ "operation": { "ports": ports } }] }]);
    stage.mesh.policies.push(policy("friends", "ALLOW", &ports(vec!["8080".into()])));
    let mut world = stage.start()?;
    let _echo = serve(&world.server, 8080, &[])?;
    let _closed = serve(&world.server, 8081, &[])?;
    let (open, closed) = (at(world.server.ipv4(), 8080), at(world.server.ipv4(), 8081));
    let check = || -> Result<()> {
        app(&friend, &["request", &open])?;
        let error = app_error(&friend, &["request", &closed, "--timeout", "2"])?;
        ensure!(error == "ECONNREFUSED", "{error}");
        Ok(())
    };
    check()?;
    let rules = |world: &mut World, allowed: Vec<String>| -> Result<()> {
        world.mesh.policies = vec![policy("friends", "ALLOW", &ports(allowed))];
        world.b.write_config(&world.mesh.document(world.bed.node("b")))
    };
    let settled = |world: &World, full: bool| {
        world.b.wait_status(pace::patience(Duration::from_secs(20)), |status| {
            let problems = status["capture_problems"].as_array().map_or(&[][..], Vec::as_slice);
            let told = |pod: &str| {
                let is = |problem: &str| problem.starts_with(pod) && problem.contains("port rules are more than fit");
                problems.iter().filter_map(|problem| problem.as_str()).any(is)
            };
            let enrolled = status["pods"].as_array().context("pods")?.iter().all(|pod| pod["state"] == "enrolled");
            Ok(enrolled && ["default/server", "default/second"].iter().all(|pod| told(pod) == full))
        })
    };
    let all = (1..=40_000).filter(|port| *port != 8081).map(|port: u32| port.to_string());
    rules(&mut world, all.collect())?;
    settled(&world, true)?;
    for destination in [&open, &closed] {
        let error = app_error(&friend, &["request", destination, "--timeout", "2"])?;
        ensure!(error == "ECONNREFUSED", "{destination}: {error}");
    }
    rules(&mut world, vec!["8080".into()])?;
    settled(&world, false)?;
    check()
}
