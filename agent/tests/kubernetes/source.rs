//! What the API server says becomes what the node does, under traffic.

use std::{
    net::IpAddr,
    sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::{
    mesh::{AGENT, KubePod, MARKER, Mesh, SOON, app, assert_encrypted, assert_plaintext, at, in_sync, serve},
    world::{World, eventually},
};
use testbed::{Pod, kube::User};

fn enabled() -> Value {
    json!({ "underpass.io/mode": "enabled" })
}

fn request(client: &KubePod, to: &str) -> Result<Value> {
    app(&client.pod, &["request", to, "--line", MARKER])
}

/// Waits until it is so.
fn holds(within: Duration, check: impl Fn() -> Result<bool>) -> Result<()> {
    eventually(within, || {
        ensure!(check()?, "it is not so");
        Ok(())
    })
}

/// Requests one after the other while `during` runs; how many there were and the failures among them.
fn under_traffic<T>(client: &Pod, to: &str, during: impl FnOnce() -> Result<T>) -> Result<(u32, Vec<String>, T)> {
    let (stop, count) = (AtomicBool::new(false), AtomicU32::new(0));
    let client = client.clone();
    thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            let mut failures = Vec::new();
            while !stop.load(Relaxed) {
                if let Err(e) = app(&client, &["request", to, "--line", MARKER]) {
                    failures.push(format!("{e:#}"));
                }
                count.fetch_add(1, Relaxed);
            }
            failures
        });
        let result = during();
        // A little of what comes behind it, too.
        let seen = count.load(Relaxed);
        let after = holds(SOON, || Ok(count.load(Relaxed) > seen + 5));
        stop.store(true, Relaxed);
        let failures = traffic.join().expect("the traffic's thread does not panic");
        after?;
        Ok((count.load(Relaxed), failures, result?))
    })
}

/// The virtual address that the API server gave.
fn vip(mesh: &Mesh, service: &str) -> Result<IpAddr> {
    let service = mesh.world.plane.get(&["service", service, "--namespace=shop"])?;
    Ok(service["spec"]["clusterIP"].as_str().context("a cluster IP")?.parse()?)
}

#[test]
fn services_and_pods_come_and_go() -> Result<()> {
    let mesh = Mesh::new("ksource")?;
    let client = mesh.run("a", "client", &enabled())?;
    let labels = json!({ "underpass.io/mode": "enabled", "app": "web" });
    let first = mesh.run("b", "web1", &labels)?;
    let _serves = serve(&first.pod, 8080)?;
    mesh.world.plane.apply(
        &json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "shop", "name": "web" },
            "spec": { "selector": { "app": "web" }, "ports": [{ "port": 80, "targetPort": 8080 }] } })
        .to_string(),
    )?;
    let to = at(vip(&mesh, "web")?, 80);
    let sniffer = mesh.sniff()?;
    eventually(SOON, || request(&client, &to).map(drop))?;
    request(&client, &at(first.pod.ipv6(), 8080))?;
    assert_encrypted(&sniffer.stop()?)?;
    let identities = mesh.a.ask(&["workloads"])?;
    ensure!(identities.to_string().contains("spiffe://cluster.local/ns/shop/sa/default"), "{identities}");

    // The only endpoint goes; another one comes, on the client's own node.
    mesh.delete(&first)?;
    mesh.wait_in_mesh(&first, false)?;
    let second = mesh.run("a", "web2", &labels)?;
    let _serves = serve(&second.pod, 8080)?;
    mesh.wait_enrolled(&second, true)?;
    eventually(SOON, || request(&client, &to).map(drop))?;

    mesh.world.plane.kubectl(&["delete", "service", "web", "--namespace=shop"])?;
    eventually(SOON, || {
        let services = mesh.a.ask(&["services"])?;
        ensure!(services["total"] == 0, "{services}");
        Ok(())
    })
}

#[test]
fn labels_change_under_traffic() -> Result<()> {
    let mesh = Mesh::new("klabels")?;
    let client = mesh.run("a", "client", &json!({}))?;
    let server = mesh.run("b", "server", &json!({}))?;
    let _serves = serve(&server.pod, 8080)?;
    let to = at(server.pod.ipv4(), 8080);
    let plain = mesh.sniff()?;
    request(&client, &to)?;
    assert_plaintext(&plain.stop()?)?;

    let (count, failures, ()) = under_traffic(&client.pod, &to, || {
        mesh.label(&["namespace", "shop", "underpass.io/mode=enabled"])?;
        mesh.wait_enrolled(&server, true)?;
        mesh.wait_in_mesh(&server, true)
    })?;
    ensure!(failures.is_empty(), "joining: {} of {count} failed: {failures:?}", failures.len());
    let sniffer = mesh.sniff()?;
    request(&client, &to)?;
    assert_encrypted(&sniffer.stop()?)?;

    let (count, failures, ()) = under_traffic(&client.pod, &to, || {
        mesh.label(&["namespace", "shop", "underpass.io/mode-"])?;
        mesh.wait_in_mesh(&server, false)?;
        mesh.wait_enrolled(&server, false)
    })?;
    ensure!(failures.is_empty(), "leaving: {} of {count} failed: {failures:?}", failures.len());
    let plain = mesh.sniff()?;
    request(&client, &to)?;
    assert_plaintext(&plain.stop()?)?;

    // A pod may ask for itself, and stay out of a namespace that is in.
    mesh.label(&["pod", "client", "server", "--namespace=shop", "istio.io/dataplane-mode=ambient"])?;
    mesh.wait_in_mesh(&server, true)?;
    mesh.label(&["namespace", "shop", "istio.io/dataplane-mode=ambient"])?;
    mesh.label(&["pod", "server", "--namespace=shop", "underpass.io/mode=disabled"])?;
    mesh.wait_in_mesh(&server, false)?;
    mesh.wait_in_mesh(&client, true)
}

#[test]
fn policies_and_modes_by_kubectl_hold_within_a_second() -> Result<()> {
    let mesh = Mesh::new("kpolicy")?;
    let client = mesh.run("a", "client", &enabled())?;
    let server = mesh.run("b", "server", &json!({ "underpass.io/mode": "enabled", "app": "server" }))?;
    let outsider = mesh.run("a", "outsider", &json!({}))?;
    let _serves = serve(&server.pod, 8080)?;
    let to = at(server.pod.ipv4(), 8080);
    mesh.wait_enrolled(&server, true)?;
    mesh.wait_enrolled(&client, true)?;
    eventually(SOON, || request(&client, &to).map(drop))?;
    request(&outsider, &to)?;

    let apply = |kind: &str, spec: Value| {
        let object = json!({ "apiVersion": "security.istio.io/v1", "kind": kind,
            "metadata": { "namespace": "shop", "name": "test" }, "spec": spec });
        mesh.world.plane.apply(&object.to_string()).map(|_| Instant::now())
    };
    // From kubectl's end to the start of the first request that is treated so: one that is dropped takes a second itself.
    let within = |since: Instant, what: &str, holds: &dyn Fn() -> bool| -> Result<()> {
        let took = eventually(SOON, || {
            let took = since.elapsed();
            ensure!(holds(), "{what}");
            Ok(took)
        })?;
        println!("{what}: in force {took:?} after kubectl");
        ensure!(took < testbed::pace::patience(Duration::from_secs(1)), "{what} took {took:?}");
        Ok(())
    };
    let denied = |pod: &KubePod| app(&pod.pod, &["request", &to, "--timeout", "1"]).is_err();

    let selector = json!({ "matchLabels": { "app": "server" } });
    let deny = json!({ "selector": selector, "action": "DENY",
        "rules": [{ "from": [{ "source": { "principals": ["cluster.local/ns/shop/sa/default"] } }] }] });
    let held = app_held(&client.pod, &to)?;
    let since = apply("AuthorizationPolicy", deny)?;
    within(since, "a DENY", &|| denied(&client))?;
    held.wait(SOON)?;
    let listed = mesh.b.ask(&["policies"])?;
    ensure!(listed.to_string().contains("shop"), "{listed}");
    mesh.world.plane.kubectl(&["delete", "authorizationpolicy", "test", "--namespace=shop"])?;
    within(Instant::now(), "its end", &|| !denied(&client))?;

    let since = apply("PeerAuthentication", json!({ "mtls": { "mode": "STRICT" } }))?;
    within(since, "STRICT", &|| denied(&outsider))?;
    request(&client, &to)?;
    mesh.world.plane.kubectl(&["delete", "peerauthentication", "test", "--namespace=shop"])?;
    // One that met the old mode is dropped for its whole second, and only then comes the next. What matters is that it ends.
    let since = Instant::now();
    eventually(SOON, || request(&outsider, &to).map(drop))?;
    println!("its end: at the latest {:?} after kubectl", since.elapsed());

    // A policy that cannot be read lets nobody in and says why.
    let bad = json!({ "selector": selector, "rules": [{ "to": [{ "operation": { "ports": ["http"] } }] }] });
    apply("AuthorizationPolicy", bad)?;
    holds(SOON, || Ok(denied(&client)))?;
    let status = mesh.b.status()?;
    let problem = &status["cluster"]["problems"][0];
    ensure!(problem["object"] == "AuthorizationPolicy shop/test", "{status}");
    ensure!(problem["problem"].as_str().is_some_and(|p| p.contains("\"http\" is no port")), "{problem}");
    Ok(())
}

/// A connection that is reset sooner or later.
fn app_held(client: &Pod, to: &str) -> Result<testbed::Process> {
    let process = client.app(&["expect-reset", to, "--timeout", "60"])?;
    process.wait_json("established", SOON)?;
    Ok(process)
}

#[test]
fn the_api_server_is_away_and_the_agent_restarts() -> Result<()> {
    let mut mesh = Mesh::new("kaway")?;
    let client = mesh.run("a", "client", &enabled())?;
    let server = mesh.run("b", "server", &enabled())?;
    let _serves = serve(&server.pod, 8080)?;
    let to = at(server.pod.ipv4(), 8080);
    mesh.wait_enrolled(&server, true)?;
    eventually(SOON, || request(&client, &to).map(drop))?;
    let copy = mesh.a.state_dir()?.join("last-good-cluster.json");
    // The copy is written at most every 30 s.
    holds(Duration::from_mins(1), || Ok(std::fs::read_to_string(&copy)?.contains("\"server\"")))?;

    mesh.world.plane.stop_api()?;
    request(&client, &to)?;
    mesh.a.kill()?;
    mesh.a.restart()?;
    let sniffer = mesh.sniff()?;
    eventually(SOON, || request(&client, &to).map(drop))?;
    assert_encrypted(&sniffer.stop()?)?;
    let status = mesh.a.status()?;
    ensure!(status["cluster"]["from_last_good"] == true && status["cluster"]["synced"] == false, "{status}");
    let checked = mesh.a.ask(&["status"])?;
    let error = checked["cluster"]["kinds"][0]["error"].as_str();
    ensure!(error.is_some(), "an API server that is away is told: {checked}");

    mesh.world.plane.start_api()?;
    mesh.a.wait_status(Duration::from_mins(1), in_sync)?;
    mesh.delete(&server)?;
    mesh.wait_in_mesh(&server, false)
}

#[test]
fn watches_that_expire_are_taken_up_again() -> Result<()> {
    // Watches end after 2 to 4 s, and what happened in between is compacted away.
    let world =
        World::with("kwatch", &["--min-request-timeout=2", "--watch-cache=false", "--etcd-compaction-interval=1s"])?;
    let mesh = Mesh::over(world)?;
    let client = mesh.run("a", "client", &enabled())?;
    mesh.wait_enrolled(&client, true)?;
    for round in 0..4 {
        let server = mesh.run("b", &format!("server{round}"), &enabled())?;
        let _serves = serve(&server.pod, 8080)?;
        mesh.wait_enrolled(&server, true)?;
        eventually(SOON, || request(&client, &at(server.pod.ipv4(), 8080)).map(drop))?;
        mesh.world.plane.compact_etcd()?;
        mesh.delete(&server)?;
        mesh.wait_in_mesh(&server, false)?;
    }
    Ok(())
}

#[test]
fn the_agent_may_do_what_it_has_to_and_no_more() -> Result<()> {
    let mesh = Mesh::new("krbac")?;
    let user = User::new(AGENT);
    let may = |verb: &str, resource: &str| -> Result<bool> {
        let (resource, part) = resource.split_once('/').unwrap_or((resource, ""));
        let part = format!("--subresource={part}");
        let question = ["auth", "can-i", verb, resource, &part, "--all-namespaces"];
        let output = mesh.world.plane.kubectl_as(&user, &question, "")?;
        Ok(output.stdout.trim() == "yes")
    };
    let read = [
        "pods",
        "services",
        "namespaces",
        "nodes",
        "endpointslices.discovery.k8s.io",
        "authorizationpolicies.security.istio.io",
        "peerauthentications.security.istio.io",
    ];
    for resource in read {
        for verb in ["list", "watch"] {
            ensure!(may(verb, resource)?, "{verb} {resource}");
        }
        for verb in ["get", "create", "update", "patch", "delete", "deletecollection"] {
            ensure!(!may(verb, resource)?, "{verb} {resource}");
        }
    }
    // Two CRDs may be listed by their names, and no others.
    for resource in [
        "secrets",
        "configmaps",
        "serviceaccounts",
        "serviceaccounts/token",
        "events",
        "pods/exec",
        "pods/log",
        "customresourcedefinitions.apiextensions.k8s.io",
    ] {
        for verb in ["get", "list", "watch", "create", "update", "patch", "delete"] {
            ensure!(!may(verb, resource)?, "{verb} {resource}");
        }
    }
    // Without one of them nothing is applied, and the reason is told.
    mesh.world.plane.kubectl(&["delete", "clusterrolebinding", AGENT])?;
    let mut mesh = mesh;
    mesh.a.stop()?;
    std::fs::remove_file(mesh.a.state_dir()?.join("last-good-cluster.json"))?;
    mesh.a.restart()?;
    let status = mesh.a.wait_status(SOON, |s| Ok(s["cluster"]["kinds"][0]["error"].is_string()))?;
    ensure!(status["generation"] == 0, "{status}");
    ensure!(status["cluster"]["kinds"].to_string().contains("forbidden"), "{status}");
    Ok(())
}
