//! Enrolling a pod, and the reasons not to.

use std::path::PathBuf;

use super::CaptureError;

/// Why a pod is not enrolled; nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// The namespace cannot be opened or is the host's own.
    #[error("network namespace {path}: {reason}")]
    Namespace {
        /// Its path.
        path: PathBuf,
        /// Why not, and what to do.
        reason: String,
    },
    /// Processes of the pod would escape the connect hooks.
    #[error(
        "process {pid} ({command}) of the pod is in cgroup {cgroup}, not below the attach point {attach}; move it, or attach higher with --cgroup"
    )]
    OutsideCgroup {
        /// One of the processes.
        pid: i32,
        /// Its name.
        command: String,
        /// Its cgroup v2 path.
        cgroup: String,
        /// Where the hooks are.
        attach: PathBuf,
    },
    /// An application holds a port the agent needs.
    #[error("port {port} in the pod is already in use by {holder}; the agent needs it")]
    PortTaken {
        /// The port.
        port: u16,
        /// Who, as far as it can be told.
        holder: String,
    },
    /// Two workloads, one namespace.
    #[error("namespace {path} is already enrolled as {other}")]
    Duplicate {
        /// The path.
        path: PathBuf,
        /// The other workload.
        other: String,
    },
    /// Routes, rules or sysctls inside the pod.
    #[error("{action} in the pod's namespace: {reason}")]
    Setup {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        reason: String,
    },
    /// Programs or maps.
    #[error(transparent)]
    Capture(#[from] CaptureError),
}
