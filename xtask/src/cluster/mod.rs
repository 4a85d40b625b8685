//! `cargo xtask cluster`: a real Kubernetes.
//!
//! Its programs are built once from Debian's source package, and kept in the user's cache; nothing is installed on the machine, nothing but a
//! Debian mirror is needed. Tests use its control plane ([`testbed::kube`]), people a cluster of two nodes ([`playground`]).

mod go;
mod kubernetes;
mod parts;
mod playground;
mod tests;

use anyhow::Result;

use crate::ui::Ui;
use parts::Group;
pub(crate) use tests::run_all;

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
    /// Run the tests that need a Kubernetes control plane (root).
    Test {
        /// Only tests whose name contains this.
        #[arg(last = true)]
        filter: Option<String>,
    },
    /// Start a cluster of two nodes, which goes on until `down` (root).
    ///
    /// Kubernetes 1.20.2 with containerd and a bridge for pods, each node in a network namespace of its own. It has no DNS for services and no way
    /// out of the machine: images come from files, `localhost/busybox:1` is there.
    Up,
    /// Remove the cluster, also one that is not whole (root).
    Down,
    /// Say what of the cluster runs (root).
    Status,
    /// What `up` leaves running beside the cluster.
    #[command(hide = true)]
    Attend(playground::Attend),
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
        Command::Up => playground::up(ui),
        Command::Down => playground::down(ui),
        Command::Status => playground::status(ui),
        Command::Attend(options) => playground::attend(options),
    }
}
