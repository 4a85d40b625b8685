//! A real Kubernetes control plane beside a testbed's nodes: etcd, kube-apiserver and kube-controller-manager.
//!
//! ```text
//!   test process ── 127.0.0.1 ── relay ─┐
//!   node a ── kube ── bridge ── control plane ── bridge ── kube ── node b
//! ```
//!
//! The programs run in a network namespace of their own, so every control plane has the same addresses ([`crate::addresses`]) and several
//! do not meet. Nodes and their pods reach it over a wire of its own, and a test's own process through a relay that listens on
//! a free port of 127.0.0.1. There is no kubelet: a pod that the controllers create is what the test says it is
//! ([`ControlPlane::set_pod_running`]).

pub mod arguments;
mod control_plane;
mod keeper;
mod kubectl;
mod network;
mod parts;
mod pki;
mod relay;

pub use control_plane::{ControlPlane, ControlPlaneOptions};
pub use parts::{PARTS_VARIABLE, Parts, VALIDATOR, VERSION};
pub use pki::{Pki, User};
pub use relay::carry;
