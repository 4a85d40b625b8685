//! Programs of others on the same hooks: theirs and ours both run, whoever came first, before and after our restart.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use bpf_tests::foreign::Foreign;
use testbed::{Pod, Stream};

use crate::world::{MARKER, Stage, World, app, app_error, assert_encrypted, at, serve};

/// The name of a pod's interface.
const INTERFACE: &str = "eth0";

/// What another vendor has put on the server's pod and above the pods' cgroups.
struct Others {
    connect: Foreign,
    /// `None` where the kernel has no tcx.
    tcx: Option<Foreign>,
    clsact: Foreign,
    pin: PathBuf,
}

impl Others {
    fn attach(stage: &Stage) -> Result<Self> {
        let pods = stage.bed.node("a").pods_cgroup();
        let connect = Foreign::connect4(pods.parent().context("the pods' cgroup has a parent")?)?;
        let tcx = stage.server.enter(|| -> Result<Option<Foreign>> {
            Foreign::tcx_ingress(nix::net::if_::if_nametoindex(INTERFACE)?)
        })??;
        let pin = stage.bed.pin("foreign");
        let clsact = Foreign::pinned_classifier(&pin)?;
        // The agent may have made the qdisc already.
        let pod = &stage.server;
        let _ = pod.run(&["tc", "qdisc", "add", "dev", INTERFACE, "clsact"], std::time::Duration::from_secs(10))?;
        let pinned = pin.to_str().context("a path in UTF-8")?;
        pod.check(&[
            "tc",
            "filter",
            "add",
            "dev",
            INTERFACE,
            "ingress",
            "bpf",
            "direct-action",
            "object-pinned",
            pinned,
        ])?;
        Ok(Self { connect, tcx, clsact, pin })
    }

    /// How often each has run.
    fn runs(&self) -> Result<Vec<(&'static str, u64)>> {
        let mut all = vec![("connect4", self.connect.runs()?), ("clsact", self.clsact.runs()?)];
        if let Some(tcx) = &self.tcx {
            all.push(("tcx", tcx.runs()?));
        }
        Ok(all)
    }
}

impl Drop for Others {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.pin);
    }
}

/// Traffic is encrypted and plaintext refused, which is our programs' work, and every other program has seen it.
fn both_run(world: &World, outsider: &Pod, others: &Others, when: &str) -> Result<()> {
    let to = at(world.server.ipv4(), 8080);
    let before = others.runs()?;
    let sniffer = world.sniff()?;
    app(&world.client, &["request", &to, "--line", MARKER])?;
    assert_encrypted(&sniffer.stop()?).with_context(|| when.to_owned())?;
    let error = app_error(outsider, &["request", &to, "--timeout", "2"])?;
    ensure!(error == "ECONNREFUSED", "{when}: plaintext under STRICT: {error}");
    for ((name, before), (_, after)) in before.into_iter().zip(others.runs()?) {
        ensure!(after > before, "{when}: the other {name} program did not run");
    }
    Ok(())
}

#[test]
fn pods_on_a_network_of_routes() -> Result<()> {
    let mut stage = Stage::new("routed")?;
    // One on each node, and one beside the client.
    let routed = [("a", "near"), ("b", "far")]
        .map(|(node, name)| stage.bed.node(node).routed_pod(name))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    for pod in &routed {
        stage.mesh.enroll(pod).mode = Some(testbed::Mode::Strict);
    }
    let outsider = stage.bed.node("a").routed_pod("outsider")?;
    stage.mesh.plain(&outsider);
    let world = stage.start()?;
    let servers = routed.iter().map(|pod| serve(pod, 8080, &[])).collect::<Result<Vec<_>>>()?;
    let _server = serve(&world.server, 8080, &[])?;
    let sniffer = world.sniff()?;
    // From a bridge, to one, and between two of them; the source address is the pod's own each time.
    let [near, far] = &routed[..] else { unreachable!("there are two") };
    for (from, to) in [(&world.client, near), (&world.client, far), (near, &world.server), (near, far), (far, near)] {
        let target = at(to.ipv4(), 8080);
        app(from, &["request", &target, "--line", MARKER])
            .with_context(|| format!("from {} to {}", from.name(), to.name()))?;
    }
    assert_encrypted(&sniffer.stop()?)?;
    for pod in [near, far] {
        let error = app_error(&outsider, &["request", &at(pod.ipv4(), 8080), "--timeout", "2"])?;
        ensure!(error == "ECONNREFUSED", "plaintext to {} under STRICT: {error}", pod.name());
    }
    drop(servers);
    Ok(())
}

#[test]
fn others_on_the_same_hooks_before_us() -> Result<()> {
    others_on_the_same_hooks("before", true)
}

#[test]
fn others_on_the_same_hooks_after_us() -> Result<()> {
    others_on_the_same_hooks("after", false)
}

fn others_on_the_same_hooks(label: &str, foreign_first: bool) -> Result<()> {
    for tc in ["auto", "clsact"] {
        let mut stage = Stage::new(label)?;
        let outsider = stage.bed.node("a").pod("outsider")?;
        stage.mesh.plain(&outsider);
        stage.mesh.workload("server").mode = Some(testbed::Mode::Strict);
        let mut others = foreign_first.then(|| Others::attach(&stage)).transpose()?;
        let (client, server) = (stage.client.clone(), stage.server.clone());
        let a = crate::world::start_agent(&stage.mesh, stage.bed.node("a"), &["--tc", tc])?;
        let b = crate::world::start_agent(&stage.mesh, stage.bed.node("b"), &["--tc", tc])?;
        if others.is_none() {
            others = Some(Others::attach(&stage)?);
        }
        let others = others.context("attached before or after")?;
        let Stage { mesh, bed, .. } = stage;
        let mut world = World { a, b, client, server, mesh, bed };
        let echo = serve(&world.server, 8080, &[])?;
        let when = |what: &str| format!("the others came {label} us, --tc {tc}, {what}");
        both_run(&world, &outsider, &others, &when("at first"))?;
        for agent in [&mut world.a, &mut world.b] {
            agent.kill()?;
            agent.restart()?;
            agent.wait_ready(testbed::pace::patience(std::time::Duration::from_secs(20)))?;
        }
        both_run(&world, &outsider, &others, &when("after our restart"))?;
        ensure!(echo.status().is_none(), "the server ended: {}", echo.text(Stream::Stderr));
        drop(others);
    }
    Ok(())
}
