//! What can be done with a playground that runs: images for its nodes, a node that starts anew, programs on a node.

use std::{os::unix::process::CommandExt, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result};
use testbed::kube::Parts;

use super::{
    Which, cgroups,
    control::Kubectl,
    network,
    node::Node,
    place::Place,
    programs::{Stage, making},
    record::Record,
    workload,
};
use crate::ui::Ui;

/// How long a kubelet may take to answer.
const READY: Duration = Duration::from_mins(2);

/// The playground at `place`, which is there and whole.
pub(super) fn stage<'a>(place: &'a Place, parts: &'a Parts) -> Result<Stage<'a>> {
    let record = Record::read(place)?;
    let record = record.with_context(|| format!("there is no playground: {} starts one", place.command("up")))?;
    record.ensure_whole(place)?;
    Ok(Stage { place, parts: parts.path(), record })
}

/// Gives the nodes images from files.
pub(in crate::cluster) fn load(ui: &Ui, which: &Which, files: &[PathBuf]) -> Result<()> {
    let (place, parts) = (which.place()?, Parts::find()?);
    let files: Vec<PathBuf> = files
        .iter()
        .map(|file| file.canonicalize().with_context(|| format!("looking for the image {}", file.display())))
        .collect::<Result<_>>()?;
    let stage = stage(&place, &parts)?;
    ui.step("images for the nodes", |step| {
        Node::all(&place).try_for_each(|node| {
            step.now(node.name());
            node.import(&stage, &files)
        })
    })
}

/// Stops everything on a node, forgets what a machine forgets, and starts it again.
pub(in crate::cluster) fn reboot(ui: &Ui, which: &Which, name: &str) -> Result<()> {
    let (place, parts) = (which.place()?, Parts::find()?);
    let _lock = place.lock()?;
    let mut stage = stage(&place, &parts)?;
    let node = Node::named(&place, name)?;
    // Whoever interrupts this finds a playground that is not whole.
    stage.record.complete = false;
    ui.step(&format!("stopping {name}"), |_| node.stop(&mut stage))?;
    ui.step(&format!("starting {name}"), |_| {
        cgroups::create_node(&place, name)?;
        network::create_node(&place, name, node.index())?;
        node.start(&mut stage, &[])?;
        let kubectl = Kubectl::of(&place, stage.parts);
        node.register(&stage, &kubectl)?;
        // What its object says may be from before.
        let health = format!("--raw=/api/v1/nodes/{name}/proxy/healthz");
        let answers = || Ok((kubectl.run(&["get", &health])?.trim() == "ok").then_some(()));
        stage.wait(&format!("the kubelet of {name}"), READY, answers)?;
        workload::nodes_ready(&stage, &kubectl)
    })?;
    let _making = making();
    stage.record.complete = true;
    stage.record.write(&place)
}

/// Becomes a program on a node: in its network, with its mounts.
pub(in crate::cluster) fn exec(which: &Which, node: &str, program: &[String]) -> Result<()> {
    let (place, parts) = (which.place()?, Parts::find()?);
    let stage = stage(&place, &parts)?;
    let words = stage.enter(Node::named(&place, node)?.inside(&stage.record)?);
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).args(program);
    stage.environment(&mut command);
    Err(command.exec()).with_context(|| format!("starting {}", program.join(" ")))
}
