//! `cargo xtask cluster status`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};
use serde::Serialize;

use super::{Which, cgroups, network, node::Node, place::Place, record::Record};
use crate::{exec, ui::Ui};

/// A playground for programs that use it.
#[derive(Serialize)]
struct Description<'a> {
    kubeconfig: PathBuf,
    /// Where kubectl, helm and the others are.
    programs: PathBuf,
    logs: PathBuf,
    /// Values for the chart that fit this playground.
    values: PathBuf,
    nodes: Vec<NodeDescription<'a>>,
}

#[derive(Serialize)]
struct NodeDescription<'a> {
    name: &'a str,
    address: std::net::Ipv4Addr,
    /// Network namespace, as `ip netns` names it.
    namespace: String,
    /// Control group of its pods in the hierarchy of version 2.
    cgroup: PathBuf,
    /// A process that has its mounts.
    process: i32,
}

/// Says what runs, for people or as one JSON object. It is an error when there is a playground that is not whole.
pub(in crate::cluster) fn status(ui: &Ui, which: &Which, json: bool) -> Result<()> {
    let place = which.place()?;
    let parts = testbed::kube::Parts::directory()?;
    let Some(record) = Record::read(&place)? else {
        ensure!(!json, "there is no playground: {} starts one", place.command("up"));
        ui.say(&format!("There is no playground: {} starts one.", place.command("up")));
        return Ok(());
    };
    if json {
        record.ensure_whole(&place)?;
        println!("{}", serde_json::to_string(&describe(&place, &parts, &record)?)?);
        return Ok(());
    }
    for process in &record.processes {
        let state = if process.is_alive() { "runs" } else { "has ended" };
        ui.say(&format!("{:24} {state:10} process {}", process.name, process.pid));
    }
    let ended = record.ended();
    ensure!(ended.is_empty(), "{} ended; logs are in {}", ended.join(", "), place.logs().display());
    ensure!(
        record.complete,
        "`up` is at work, or was interrupted: then {} removes what there is",
        place.command("down")
    );
    let mut kubectl = Command::new(parts.join("bin/kubectl"));
    kubectl.arg("--kubeconfig").arg(place.kubeconfig()).args(["get", "nodes,pods", "--all-namespaces"]);
    exec::openly(kubectl.args(["--output=wide", "--request-timeout=10s"]))
}

fn describe<'a>(place: &Place, parts: &Path, record: &Record) -> Result<Description<'a>> {
    let nodes = Node::all(place).map(|node| {
        Ok(NodeDescription {
            name: node.name(),
            address: network::node(node.index()),
            namespace: place.namespace(node.name()),
            cgroup: cgroups::pods(place, node.name())?,
            process: node.process(record)?,
        })
    });
    Ok(Description {
        kubeconfig: place.kubeconfig(),
        programs: parts.join("bin"),
        logs: place.logs(),
        values: place.values(),
        nodes: nodes.collect::<Result<_>>()?,
    })
}
