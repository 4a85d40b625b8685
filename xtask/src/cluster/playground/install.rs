//! `cargo xtask cluster install`: Underpass on a playground, with the chart of this checkout.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use testbed::kube::Parts;

use super::{Which, cgroups, place::Place, running};
use crate::{exec, image, places, ui::Ui};

/// Release and namespace.
const RELEASE: &str = "underpass";
const NAMESPACE: &str = "underpass-system";
/// How long everything may take to be ready, on a machine that is busy.
const READY: &str = "--timeout=5m";

#[derive(clap::Args)]
pub(in crate::cluster) struct Installation {
    /// The image, as `cargo xtask image` makes it; by default one is made, of a release build.
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Further arguments of `helm upgrade --install`.
    #[arg(last = true)]
    helm: Vec<String>,
}

impl Installation {
    /// With a new image and nothing special.
    pub(in crate::cluster) fn usual() -> Self {
        Self { image: None, helm: Vec::new() }
    }
}

/// Installs it, or upgrades what is installed, and waits until it is ready.
pub(in crate::cluster) fn run(ui: &Ui, which: &Which, options: &Installation) -> Result<()> {
    let (place, parts) = (which.place()?, Parts::find()?);
    let image = match &options.image {
        Some(image) => image.clone(),
        None => image::make(ui)?,
    };
    running::load(ui, which, &[image])?;
    let mut helm = Command::new(parts.program("helm")?);
    helm.env("KUBECONFIG", place.kubeconfig());
    helm.args(["upgrade", RELEASE]).arg(places::repository().join("charts/underpass"));
    helm.args(["--install", "--namespace", NAMESPACE, "--create-namespace", "--wait", READY]);
    helm.arg("--values").arg(place.values()).args(&options.helm);
    ui.step("Underpass", |step| exec::quietly(&mut helm, step))?;
    ui.say("Underpass is installed. A namespace joins the mesh with `kubectl label namespace NAME underpass.io/mode=enabled`.");
    Ok(())
}

/// Writes what the chart has to know of this playground.
pub(super) fn write_values(place: &Place) -> Result<()> {
    let path = place.values();
    fs::write(&path, values(place)?.to_string()).with_context(|| format!("writing {}", path.display()))
}

fn values(place: &Place) -> Result<Value> {
    Ok(json!({
        "profile": "demo",
        // The kubelets are among the playground's programs, not in a service of systemd.
        "probes": { "cgroups": [cgroups::programs(place)] },
        // Nodes share the hierarchy; the kubelet replaces the variable.
        "agent": { "extraArgs": [format!("--cgroup={}", cgroups::pods(place, "$(UNDERPASS_NODE)")?.display())] },
    }))
}
