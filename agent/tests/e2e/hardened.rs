//! An agent in a container that is not privileged, with the capabilities that the chart asks for (`agent.hardened`).

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use testbed::{Agent, AgentOptions, Node, Process, underpass_path};

use crate::world::{MARKER, Stage, app, assert_encrypted, assert_plaintext_seen, at, serve, sniff, start_agent};

/// Where the chart lists the capabilities.
const CHART: &str = include_str!("../../../charts/underpass/templates/agent/daemonset.yaml");

#[test]
fn an_agent_that_is_not_privileged_does_everything() -> Result<()> {
    let stage = Stage::new("hardened")?;
    let _echo = serve(&stage.server, 8080, &[])?;
    let to = at(stage.server.ipv4(), 8080);
    let sniffer = sniff(&stage.bed)?;
    app(&stage.client, &["request", &to, "--line", MARKER])?;
    assert_plaintext_seen(&sniffer.stop()?)?;

    let node = stage.bed.node("b").clone();
    let contained = contained(&node)?;
    let _a = start_agent(&stage.mesh, stage.bed.node("a"), &[])?;
    let mut b = Agent::start(&node, &contained, &stage.mesh.document(&node), AgentOptions::default())?;
    // Machines on which tests run may lack some.
    let (has, wanted) = (effective(&b)?, wanted()?);
    ensure!(has.contains(&"SYS_ADMIN".to_owned()) && has.iter().all(|one| wanted.contains(one)), "it has {has:?}");

    let sniffer = sniff(&stage.bed)?;
    app(&stage.client, &["request", &to, "--line", MARKER])?;
    app(&stage.server, &["request", &at(stage.server.ipv4(), 8080)])?;
    assert_encrypted(&sniffer.stop()?)?;
    let accepts = stage.server.check(&["cat", "/proc/sys/net/ipv4/tcp_fwmark_accept"])?;
    ensure!(accepts.trim() == "1", "the setting for replies is {accepts:?}");

    // What it says about itself is what it does.
    let mut check = node.command(&contained);
    check.args(["check", "--cgroup"]).arg(node.pods_cgroup()).arg("--pin-root").arg(b.pin_root());
    let check = Process::spawn(&mut check)?.output(Duration::from_secs(20))?;
    ensure!(check.status.success(), "underpass check: {}{}", check.stdout, check.stderr);

    b.stop()?;
    let rules = stage.server.check(&["ip", "rule"])?;
    ensure!(!rules.contains("0x539"), "a rule is left: {rules}");
    let accepts = stage.server.check(&["cat", "/proc/sys/net/ipv4/tcp_fwmark_accept"])?;
    ensure!(accepts.trim() == "0", "the setting is left: {accepts:?}");
    Ok(())
}

/// A program that is the agent as runtimes start it in such a container: without other capabilities, in a cgroup namespace of its own,
/// with settings of the kernel mounted read-only.
fn contained(node: &Node) -> Result<PathBuf> {
    let path = node.dir("contained")?.join("underpass");
    let capabilities: Vec<_> = wanted()?.iter().map(|name| format!("+{}", name.to_lowercase())).collect();
    let script = format!(
        "#!/bin/sh\nexec unshare --mount --cgroup --propagation slave sh -ec '
            mount --bind /proc/sys /proc/sys
            mount -o remount,bind,ro /proc/sys
            mount -o remount,bind,ro /sys
            if [ -w /proc/sys/net/ipv4/tcp_fwmark_accept ]; then exit 99; fi
            exec setpriv --bounding-set -all,{} --inh-caps -all {} \"$@\"
        ' sh \"$@\"\n",
        capabilities.join(","),
        underpass_path()?.display(),
    );
    fs::write(&path, script).with_context(|| format!("writing {}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// The capabilities that the chart asks for.
fn wanted() -> Result<Vec<String>> {
    let (_, after) = CHART.split_once("add:\n").context("the chart adds no capabilities")?;
    let entries = after.lines().map(str::trim).take_while(|line| line.starts_with(['#', '-']));
    let mut names: Vec<_> = entries.filter_map(|line| line.strip_prefix("- ")).map(str::to_owned).collect();
    names.sort_unstable();
    ensure!(names.len() > 3 && names.contains(&"BPF".to_owned()), "the chart adds {names:?}");
    Ok(names)
}

/// The capabilities that a running agent has.
fn effective(agent: &Agent) -> Result<Vec<String>> {
    let all = caps::read(Some(agent.process()?.pid().cast_signed()), caps::CapSet::Effective)
        .context("the agent's capabilities")?;
    let mut names: Vec<_> = all.iter().map(|one| one.to_string().trim_start_matches("CAP_").to_owned()).collect();
    names.sort_unstable();
    Ok(names)
}
