//! `cargo xtask cluster up`, `down` and what can be done in between: clusters of two nodes to play with, and to test on.
//!
//! Everything is real but the machines: etcd, kube-apiserver, controllers and scheduler run in one network namespace, and each node is a network
//! namespace with mounts of its own in which containerd, kubelet and kube-proxy run. They go on when the command has ended. What there is
//! follows from the directory's name and from a record in it, so that `down` also removes what an interrupted `up` has left.
//!
//! There is no way out: images come from files, and names are those of services.

mod attend;
mod cgroups;
mod control;
mod dns;
mod images;
mod install;
mod mount_points;
mod network;
mod node;
mod place;
mod programs;
mod record;
mod running;
mod status;
mod teardown;
mod workload;

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use nix::unistd::geteuid;

use super::parts::{self, Group};
use crate::ui::Ui;
pub(super) use attend::{Attend, run as attend};
use control::Control;
pub(super) use dns::{Dns, run as dns};
pub(super) use install::{Installation, run as install};
use node::Node;
use place::Place;
use programs::{Stage, making};
use record::Record;
pub(super) use running::{exec, load, reboot};
pub(super) use status::status;

/// Which playground of this checkout.
#[derive(clap::Args, Clone)]
pub(super) struct Which {
    /// Which playground, when there is more than one. Any number can run side by side.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

impl Which {
    /// Its place, for root.
    fn place(&self) -> Result<Place> {
        ensure!(
            geteuid().is_root(),
            "nodes are made of namespaces and mounts: run it as root (sudo -E cargo xtask cluster ...)"
        );
        Place::of(self.name.as_deref())
    }
}

/// Starts a playground, without a deployment when it is `bare`; says so when it is there already.
pub(super) fn up(ui: &Ui, which: &Which, bare: bool) -> Result<()> {
    let place = which.place()?;
    let parts = parts::ensure(ui, &[Group::Tests, Group::Chart, Group::Playground])?;
    for path in [place.directory(), &parts] {
        ensure!(path.to_str().is_some(), "the directory {} has a name that is no UTF-8", path.display());
    }
    let _lock = place.lock()?;
    if let Some(record) = Record::read(&place)? {
        record.ensure_whole(&place)?;
        ui.say("The playground is up already.");
        summary(ui, &place, &parts);
        return Ok(());
    }
    remove_when_interrupted(&place)?;
    let result = build(ui, &place, &parts, bare);
    if result.is_ok() {
        summary(ui, &place, &parts);
        return Ok(());
    }
    let _making = making();
    let kept = keep_logs(&place);
    match teardown::remove(&place) {
        Ok(_) => result.with_context(|| format!("everything was removed again; {kept}")),
        Err(error) => result.with_context(|| {
            format!("not everything could be removed again ({error:#}): {} tries again; {kept}", place.command("down"))
        }),
    }
}

/// Removes a playground.
pub(super) fn down(ui: &Ui, which: &Which) -> Result<()> {
    let place = which.place()?;
    let _lock = place.lock()?;
    let there = place.directory().exists();
    let ended = ui.step("removing the playground", |_| teardown::remove(&place))?;
    // Nobody waits for it: who finds it taken gives up.
    place.unlock()?;
    ui.say(&if there {
        format!("The playground is gone; {ended} programs were killed.")
    } else {
        "There is none.".into()
    });
    Ok(())
}

fn build(ui: &Ui, place: &Place, parts: &Path, bare: bool) -> Result<()> {
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
        install::write_values(place)?;
        node::prepare(&mut stage)
    })?;
    let images = images::write(&stage.part("busybox"), &place.file("images"))?;
    let control = ui.step("the control plane", |_| Control::start(&mut stage))?;
    ui.step("nodes", |step| {
        for node in Node::all(place) {
            step.now(node.name());
            node.create(place, parts, &control)?;
            node.start(&mut stage, &images)?;
        }
        step.now("waiting until they are ready");
        for node in Node::all(place) {
            node.register(&stage, &control.kubectl)?;
        }
        workload::nodes_ready(&stage, &control.kubectl)
    })?;
    if !bare {
        ui.step("a deployment of two pods", |_| workload::deploy(&stage, &control.kubectl))?;
        let address = ui.step("its service, from nodes and pods", |_| workload::check(&stage, &control.kubectl))?;
        ui.say(&format!(
            "The service hello in the namespace playground answers at http://{address}/ on nodes and in pods."
        ));
    }
    let ended = stage.record.ended();
    ensure!(ended.is_empty(), "{} ended", ended.join(", "));
    let _making = making();
    stage.record.complete = true;
    stage.record.write(place)
}

fn summary(ui: &Ui, place: &Place, parts: &Path) {
    ui.say(&format!("\nexport KUBECONFIG={}", place.kubeconfig().display()));
    ui.say(&format!("{} get pods --all-namespaces --output=wide\n", parts.join("bin/kubectl").display()));
    ui.say(&format!("Pods can use the image {}; logs are in {}.", images::BUSYBOX, place.logs().display()));
    ui.say(&format!(
        "{} installs Underpass, {} gives the nodes images from files,",
        place.command("install"),
        place.command("load")
    ));
    ui.say(&format!("{} runs a program on a node (its name, --, the program).", place.command("exec")));
    ui.say(&format!("{} removes all of it.", place.command("down")));
}

/// From now on SIGINT, SIGTERM and SIGHUP remove the playground and then end this process.
fn remove_when_interrupted(place: &Place) -> Result<()> {
    let place = place.clone();
    let remove = move || {
        let _making = making();
        eprintln!("\ninterrupted: removing the playground");
        if let Err(error) = teardown::remove(&place) {
            eprintln!("{error:#}; {} tries again", place.command("down"));
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
