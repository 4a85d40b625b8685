//! With a real Kubernetes control plane: `cargo xtask cluster test`.
//!
//! Needs root, and the programs that `cargo xtask cluster parts` makes; without them every test fails and says so. Those of [`scale`] and
//! [`throttled`] have an API of their own.

mod absence;
mod ca;
mod cni;
mod control_plane;
mod mesh;
mod scale;
mod simulated;
mod source;
mod throttled;
mod whole;
mod world;
