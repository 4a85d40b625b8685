//! Redirects pods' traffic to the agent: loads and pins the BPF programs, writes their maps, enrols pods.
//!
//! The one owner of everything under the pin directory is [`Capture`]. Work that has to happen inside a pod's network
//! namespace runs on worker threads that enter it ([`netns`]); the data path takes ready-made sockets from
//! a pod's [`sockets`] pool, so no connection costs a `setns`.

pub mod cleanup;
mod enroll;
pub mod events;
mod interfaces;
mod loader;
mod maps;
pub mod netns;
pub mod object;
mod pins;
mod pod;
pub mod processes;
pub mod routes;
mod sockdiag;
pub mod sockets;

use std::{net::SocketAddr, os::fd::AsFd, path::PathBuf, sync::Arc};

pub use enroll::EnrollError;
pub use pod::{Pod, PodListeners};

use crate::mesh::{Snapshot, Workload, WorkloadKey};

/// Where and how to capture.
#[derive(Debug, Clone)]
pub struct CaptureOptions {
    /// cgroup v2 directory that the connect hooks attach to; pods' cgroups lie below it.
    pub cgroup: PathBuf,
    /// Directory on bpffs under which a versioned directory is made; created when missing.
    pub pin_root: PathBuf,
    /// How tc programs attach.
    pub tc: TcMode,
    /// Load the object with aya-log and forward its lines to `tracing`.
    pub bpf_log: bool,
}

/// How tc programs attach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum TcMode {
    /// tcx where the kernel has it (6.6), else clsact.
    #[default]
    Auto,
    /// tcx links.
    Tcx,
    /// clsact qdisc and filters.
    Clsact,
}

/// Why capture cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// A BPF object, map, program or link.
    #[error("{action}: {reason}")]
    Bpf {
        /// What was tried, on what.
        action: String,
        /// What the kernel or loader said, and what to do where that is known.
        reason: String,
    },
    /// The file system: cgroup, bpffs, namespaces.
    #[error("{action} {path}: {source}")]
    Path {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A map is too small for the configuration; nothing of it was applied.
    #[error(
        "{map} holds {capacity} entries and the configuration needs {needed}; reduce addresses, exclusions or port rules"
    )]
    Capacity {
        /// Name of the map.
        map: &'static str,
        /// Its size.
        capacity: usize,
        /// What would be needed.
        needed: usize,
    },
}

/// The running capture.
pub struct Capture {}

impl Capture {
    /// Loads, pins and attaches; adopts or atomically replaces what an earlier agent left. There is no moment without capture.
    pub async fn start(options: CaptureOptions) -> Result<Arc<Self>, CaptureError> {
        let _ = options;
        todo!()
    }

    /// Projects mesh addresses, VIPs, CIDRs and mesh-wide exclusions into the maps (differences only; additions before removals).
    pub fn apply(&self, snapshot: &Snapshot) -> Result<(), CaptureError> {
        let _ = snapshot;
        todo!()
    }

    /// Enrols a pod: listeners and routes first, then guard and inbound program on every interface, capture last. Fails whole.
    /// For an already enrolled pod, applies what changed (mode, port rules, exclusions); switching to STRICT destroys plaintext
    /// connections already admitted.
    pub async fn enroll(&self, workload: &Workload) -> Result<Arc<Pod>, EnrollError> {
        let _ = workload;
        todo!()
    }

    /// Gives the pod plain traffic back: capture off first, guard and inbound program last. Live connections go on; the reply
    /// route stays until the returned pod is dropped by its last connection.
    pub async fn unenroll(&self, key: &WorkloadKey) {
        let _ = key;
        todo!()
    }

    /// The pods enrolled now.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        todo!()
    }

    /// Removes what earlier agents left for pods that are not enrolled now. Called once after the first configuration was applied.
    pub async fn collect_garbage(&self) {
        todo!()
    }

    /// Consumes the original destination of a connection accepted on an outbound listener.
    pub fn take_original_destination(&self, pod: &Pod, client: SocketAddr, listener: SocketAddr) -> Option<SocketAddr> {
        let _ = (pod, client, listener);
        todo!()
    }

    /// Flags a socket as the agent's own, so that it is neither captured nor guarded.
    pub fn mark_own(&self, socket: &impl AsFd) -> std::io::Result<()> {
        let _ = socket;
        todo!()
    }

    /// The BPF counters by name.
    pub fn counters(&self) -> std::collections::BTreeMap<String, u64> {
        todo!()
    }
}
