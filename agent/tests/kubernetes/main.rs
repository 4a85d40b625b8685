//! With a real Kubernetes control plane: `cargo xtask cluster test`.
//!
//! Needs root, and the programs that `cargo xtask cluster parts` makes; without them every test fails and says so.

mod ca;
mod cni;
mod control_plane;
mod mesh;
mod scale;
mod source;
mod whole;
mod world;
