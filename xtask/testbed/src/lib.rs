//! Two "nodes" and any number of "pods" made of network namespaces and cgroups, real programs in them, and a sniffer.
//!
//! ```text
//!   pod ── veth ── bridge ── node a ══ wire ══ node b ── bridge ── veth ── pod
//! ```
//!
//! Every testbed uses the same addresses ([`addresses`]), which is fine because nothing of it is in the host's namespace. Names
//! of kernel objects contain the process id and a counter, so testbeds of one or several processes do not meet, and
//! [`Testbed::sweep`] can tell what a killed process left. Dropping the [`Testbed`] removes everything, also during a panic.
//!
//! Limits of time given to this library are for real processors; on emulated ones it waits longer ([`pace`]).
//!
//! Needs root, cgroup v2 (also beside v1), iproute2 and nsenter.

#![forbid(unsafe_code)]

pub mod addresses;
mod agent;
mod bpffs;
mod cgroup;
mod ktls;
pub mod kube;
mod mesh;
pub mod mounts;
mod namespace;
mod node;
pub mod pace;
mod packet;
mod pod;
mod process;
mod programs;
mod sniffer;
mod state;
pub mod torture;
mod wire;

use std::path::PathBuf;

use anyhow::{Context, Result};

pub use agent::{Agent, AgentOptions};
pub use bpffs::locked;
pub use cgroup::{mount_point as cgroup_mount_point, remove as remove_cgroup};
pub use mesh::{CertificateFiles, Enroll, Exclude, MeshConfig, Mode, PortMode, Probes, Protocol, Service, Workload};
pub use namespace::Namespace;
pub use node::Node;
pub use pod::Pod;
pub use process::{Output, Process, Stream};
pub use programs::{Iperf, Nginx, Redis};
pub use sniffer::{Capture, Sniffer, SnifferOptions};
pub use state::{AppliedCleanup, cleanup_own};
pub use wire::{BadWire, Impairment};

use state::Shared;

/// Two nodes joined by a wire. Everything is removed on drop.
pub struct Testbed {
    nodes: Vec<Node>,
    shared: std::sync::Arc<Shared>,
}

impl Testbed {
    /// Creates the nodes `a` and `b`.
    ///
    /// `label` (1 to 8 characters of `a-z0-9`) appears in the names of everything created.
    pub fn new(label: &str) -> Result<Self> {
        let shared = Shared::new(label)?;
        // The value exists before the first kernel object, so that a failure on the way is cleaned up too.
        let mut testbed = Self { nodes: Vec::new(), shared };
        for (index, name) in [(1, "a"), (2, "b")] {
            testbed.nodes.push(Node::create(&testbed.shared, name, index)?);
        }
        node::join(&testbed.nodes[0], &testbed.nodes[1])?;
        Ok(testbed)
    }

    /// The node called `a` or `b`.
    ///
    /// # Panics
    /// When there is no such node.
    pub fn node(&self, name: &str) -> &Node {
        self.nodes.iter().find(|n| n.name() == name).unwrap_or_else(|| panic!("nodes are called a and b, not {name:?}"))
    }

    /// A directory of this testbed's own, removed with it.
    pub fn dir(&self) -> &std::path::Path {
        &self.shared.dir
    }

    /// A path on the BPF file system for something that a test pins itself, and removes before the testbed goes.
    pub fn pin(&self, name: &str) -> PathBuf {
        bpffs::pin_root(&self.shared.id, name)
    }

    /// What the names of this testbed's kernel objects contain: `<label>-<pid>-<counter>`.
    pub fn id(&self) -> &str {
        &self.shared.id
    }

    /// Kernel objects of this testbed that still exist: namespaces, cgroup, pins. Empty after a drop.
    pub fn leftovers(id: &str) -> Result<Vec<PathBuf>> {
        state::objects_of(|found| found.id == id)
    }

    /// Removes what testbeds of dead processes left behind.
    pub fn sweep() -> Result<AppliedCleanup> {
        state::sweep()
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        self.shared.remove();
    }
}

/// Path of the `testbed-app` program: `$TESTBED_APP`, else beside or above the running executable.
pub fn app_path() -> Result<PathBuf> {
    beside_executable("testbed-app", "TESTBED_APP", "cargo build -p testbed")
}

/// Path of the `underpass` program: `$UNDERPASS_BIN`, else beside or above the running executable.
pub fn underpass_path() -> Result<PathBuf> {
    beside_executable("underpass", "UNDERPASS_BIN", "cargo build -p underpass")
}

fn beside_executable(name: &str, variable: &str, remedy: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        let path = PathBuf::from(path);
        anyhow::ensure!(path.is_file(), "{variable}={} is not a file; run `{remedy}`", path.display());
        return Ok(path);
    }
    let executable = std::env::current_exe().context("finding the running executable")?;
    // Test executables are in target/<profile>/deps, programs one level above.
    let mut candidates = executable.ancestors().skip(1).take(2).map(|dir| dir.join(name));
    candidates.find(|path| path.is_file()).with_context(|| {
        format!("no {name} beside {} or one directory above; run `{remedy}` or set {variable}", executable.display())
    })
}
