//! `cargo xtask cluster`: a real Kubernetes.
//!
//! Its programs are built once from Debian's source package, and kept in the user's cache; nothing is installed on the machine, nothing but a
//! Debian mirror is needed. Tests use its control plane ([`testbed::kube`]), people a cluster of two nodes ([`playground`]).

mod go;
mod kubernetes;
mod parts;
mod playground;
mod tests;

use std::path::PathBuf;

use anyhow::Result;

use crate::ui::Ui;
use parts::Group;
use playground::{Installation, Which};
pub(crate) use tests::{install, run_all};

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make the programs that the tests need, if they are not there.
    Parts {
        /// Those of the playground as well: kubelet, scheduler, containerd.
        #[arg(long)]
        all: bool,
        /// Only those that the tests of the Helm chart need, of which none has to be built.
        #[arg(long, conflicts_with = "all")]
        chart: bool,
    },
    /// Run the tests that need a Kubernetes control plane, then install Underpass on a whole cluster and see what becomes of it (root).
    Test {
        /// Only tests whose name contains this.
        #[arg(last = true)]
        filter: Option<String>,
    },
    /// Start a cluster of two nodes, which goes on until `down` (root).
    ///
    /// Kubernetes 1.20.2 with containerd, a bridge for pods and names for services, each node in a network namespace of its own. There is no
    /// way out of the machine: images come from files (`load`), `localhost/busybox:1` is there.
    Up {
        #[command(flatten)]
        which: Which,
        /// Install Underpass, of a release build.
        #[arg(long)]
        underpass: bool,
        /// Without the deployment that shows that it works.
        #[arg(long)]
        bare: bool,
    },
    /// Remove a cluster, also one that is not whole (root).
    Down(Which),
    /// Say what of a cluster runs (root).
    Status {
        #[command(flatten)]
        which: Which,
        /// One JSON object: how to use the cluster.
        #[arg(long)]
        json: bool,
    },
    /// Give the nodes images from files, as `cargo xtask image` makes them (root).
    Load {
        #[command(flatten)]
        which: Which,
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Install or upgrade Underpass, with the chart of this checkout (root).
    Install {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        options: Installation,
    },
    /// Run a program on a node: in its network, with its mounts (root).
    Exec {
        #[command(flatten)]
        which: Which,
        node: String,
        #[arg(last = true, required = true)]
        program: Vec<String>,
    },
    /// Stop everything on a node, forget what a machine forgets, and start it again (root).
    Reboot {
        #[command(flatten)]
        which: Which,
        node: String,
    },
    /// What `up` leaves running beside the cluster.
    #[command(hide = true)]
    Attend(playground::Attend),
    /// Answers questions for services' names.
    #[command(hide = true)]
    Dns(playground::Dns),
}

/// Gets what the tests of the Helm chart need. Quick and silent when it is there.
pub(crate) fn ensure_for_chart(ui: &Ui) -> Result<()> {
    parts::ensure(ui, &[Group::Chart]).map(drop)
}

pub(crate) fn run(ui: &Ui, options: &Options) -> Result<()> {
    match &options.command {
        Command::Parts { all, chart } => {
            let groups = match (all, chart) {
                (true, _) => &[Group::Tests, Group::Chart, Group::Playground][..],
                (_, true) => &[Group::Chart],
                _ => &[Group::Tests, Group::Chart],
            };
            let parts = parts::ensure(ui, groups)?;
            ui.say(&format!("The programs of Kubernetes are in {}.", parts.display()));
            Ok(())
        }
        Command::Test { filter } => tests::run(ui, filter.as_deref()),
        Command::Up { which, underpass, bare } => {
            playground::up(ui, which, *bare)?;
            if *underpass { playground::install(ui, which, &Installation::usual()) } else { Ok(()) }
        }
        Command::Down(which) => playground::down(ui, which),
        Command::Status { which, json } => playground::status(ui, which, *json),
        Command::Load { which, files } => playground::load(ui, which, files),
        Command::Install { which, options } => playground::install(ui, which, options),
        Command::Exec { which, node, program } => playground::exec(which, node, program),
        Command::Reboot { which, node } => playground::reboot(ui, which, node),
        Command::Attend(options) => playground::attend(options),
        Command::Dns(options) => playground::dns(options),
    }
}
