//! With a real Kubernetes control plane: `cargo xtask cluster test`.
//!
//! Needs root, and the programs that `cargo xtask cluster parts` makes; without them every test
//! fails and says so. Those of [`scale`], [`throttled`] and [`unknown`] have an API of their own.

mod absence;
mod ca;
mod cni;
mod control_plane;
mod mesh;
mod scale;
mod scripted;
mod simulated;
mod source;
mod throttled;
mod unknown;
mod whole;
mod world;
