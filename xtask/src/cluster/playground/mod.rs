//! `cargo xtask cluster up`, `down` and `status`: a cluster of two nodes to play with.
//!
//! Everything is real but the machines: etcd, kube-apiserver, controllers and scheduler run in one network namespace, and each node is a network
//! namespace with mounts of its own in which containerd, kubelet and kube-proxy run. They go on when the command has ended. What there is
//! follows from the directory's name and from a record in it, so that `down` also removes what an interrupted `up` has left.
//!
//! There is no DNS for services and no way out: images come from files.

mod attend;
mod cgroups;
mod control;
mod images;
mod network;
mod node;
mod place;
mod programs;
mod record;
mod teardown;
mod workload;

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use nix::unistd::geteuid;

use super::parts::{self, Group};
use crate::ui::Ui;
pub(super) use attend::{Attend, run as attend};
use control::Control;
use place::{NODES, Place};
use programs::{Stage, making};
use record::Record;

/// Starts the playground; says so when it is there already.
pub(super) fn up(ui: &Ui) -> Result<()> {
    ensure_root("up")?;
    let parts = parts::ensure(ui, &[Group::Tests, Group::Chart, Group::Playground])?;
    let place = Place::here()?;
    for path in [place.directory(), &parts] {
        ensure!(path.to_str().is_some(), "the directory {} has a name that is no UTF-8", path.display());
    }
    let _lock = place.lock()?;
    if let Some(record) = Record::read(&place)? {
        let ended = record.ended();
        ensure!(
            ended.is_empty(),
            "the playground is not whole, {} ended: `cargo xtask cluster down` first",
            ended.join(", ")
        );
        ensure!(record.complete, "an earlier `up` was not finished: `cargo xtask cluster down` first");
        ui.say("The playground is up already.");
        summary(ui, &place, &parts);
        return Ok(());
    }
    remove_when_interrupted(&place)?;
    let result = build(ui, &place, &parts);
    if result.is_ok() {
        summary(ui, &place, &parts);
        return Ok(());
    }
    let _making = making();
    let kept = keep_logs(&place);
    match teardown::remove(&place) {
        Ok(_) => result.with_context(|| format!("everything was removed again; {kept}")),
        Err(error) => result.with_context(|| {
            format!("not everything could be removed again ({error:#}): `cargo xtask cluster down` tries again; {kept}")
        }),
    }
}

/// Removes the playground.
pub(super) fn down(ui: &Ui) -> Result<()> {
    ensure_root("down")?;
    let place = Place::here()?;
    let _lock = place.lock()?;
    let there = place.directory().exists();
    let ended = ui.step("removing the playground", |_| teardown::remove(&place))?;
    ui.say(&if there {
        format!("The playground is gone; {ended} programs were killed.")
    } else {
        "There is none.".into()
    });
    Ok(())
}

/// Says what runs. It is an error when there is a playground that is not whole.
pub(super) fn status(ui: &Ui) -> Result<()> {
    ensure_root("status")?;
    let place = Place::here()?;
    let Some(record) = Record::read(&place)? else {
        ui.say("There is no playground: `cargo xtask cluster up` starts one.");
        return Ok(());
    };
    for process in &record.processes {
        let state = if process.is_alive() { "runs" } else { "has ended" };
        ui.say(&format!("{:24} {state:10} process {}", process.name, process.pid));
    }
    let ended = record.ended();
    ensure!(ended.is_empty(), "{} ended; logs are in {}", ended.join(", "), place.logs().display());
    ensure!(
        record.complete,
        "`up` is at work, or was interrupted: then `cargo xtask cluster down` removes what there is"
    );
    let parts = testbed::kube::Parts::directory()?;
    let mut kubectl = std::process::Command::new(parts.join("bin/kubectl"));
    kubectl.arg("--kubeconfig").arg(place.file("kubeconfig")).args(["get", "nodes,pods", "--all-namespaces"]);
    crate::exec::openly(kubectl.args(["--output=wide", "--request-timeout=10s"]))
}

fn build(ui: &Ui, place: &Place, parts: &Path) -> Result<()> {
    let mut stage = Stage { place, parts, record: Record::default() };
    ui.step("namespaces, control groups, images", |_| {
        {
            let _making = making();
            fs::create_dir_all(place.logs()).with_context(|| format!("creating {}", place.logs().display()))?;
            // First, so that `down` and `up` know that there is something.
            stage.record.write(place)?;
            network::create(place)?;
            cgroups::create(place)?;
        }
        node::prepare(&mut stage)
    })?;
    let images = images::write(&stage.part("busybox"), &place.file("images"))?;
    let control = ui.step("the control plane", |_| Control::start(&mut stage))?;
    ui.step("nodes", |step| {
        let mut nodes = Vec::new();
        for (index, name) in (0..).zip(NODES) {
            step.now(name);
            let node = node::Node::create(place, parts, &control, name, index)?;
            node.start(&mut stage, &control, &images)?;
            nodes.push(node);
        }
        step.now("waiting until they are ready");
        for node in nodes {
            node.register(&stage, &control)?;
        }
        workload::nodes_ready(&stage, &control)
    })?;
    ui.step("a deployment of two pods", |_| workload::deploy(&stage, &control))?;
    let address = ui.step("its service, from nodes and pods", |_| workload::check(&stage, &control))?;
    ui.say(&format!(
        "The service hello in the namespace playground answers at http://{address}/ on nodes and in pods."
    ));
    let ended = stage.record.ended();
    ensure!(ended.is_empty(), "{} ended", ended.join(", "));
    let _making = making();
    stage.record.complete = true;
    stage.record.write(place)
}

fn summary(ui: &Ui, place: &Place, parts: &Path) {
    ui.say(&format!("\nexport KUBECONFIG={}", place.file("kubeconfig").display()));
    ui.say(&format!("{} get pods --all-namespaces --output=wide\n", parts.join("bin/kubectl").display()));
    ui.say(&format!("Pods can use the image {}; logs are in {}.", images::BUSYBOX, place.logs().display()));
    ui.say(&format!("A node's network: nsenter --net=/run/netns/{}", place.namespace(NODES[0])));
    ui.say("`cargo xtask cluster down` removes all of it.");
}

fn ensure_root(command: &str) -> Result<()> {
    ensure!(
        geteuid().is_root(),
        "nodes are made of namespaces and mounts: run it as root (sudo -E cargo xtask cluster {command})"
    );
    Ok(())
}

/// From now on SIGINT, SIGTERM and SIGHUP remove the playground and then end this process.
fn remove_when_interrupted(place: &Place) -> Result<()> {
    let place = place.clone();
    let remove = move || {
        let _making = making();
        eprintln!("\ninterrupted: removing the playground");
        if let Err(error) = teardown::remove(&place) {
            eprintln!("{error:#}; `cargo xtask cluster down` tries again");
        }
        // 128 + SIGINT, as a shell reports it.
        std::process::exit(130);
    };
    ctrlc::set_handler(remove).context("handling SIGINT, SIGTERM and SIGHUP")
}

/// Saves the logs from being removed with everything else; says where they are.
fn keep_logs(place: &Place) -> String {
    let to = place.failed_logs();
    // There may be older ones, or none at all.
    let _ = fs::remove_dir_all(&to);
    match fs::rename(place.logs(), &to) {
        Ok(()) => format!("logs are in {}", to.display()),
        Err(error) => format!("there are no logs ({error})"),
    }
}
