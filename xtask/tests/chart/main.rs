//! The Helm chart, rendered by the real Helm: what is in it, what it refuses, and what its documentation says.
//!
//! Helm and the schemas of Kubernetes' objects come with `cargo xtask cluster parts --chart`; `cargo xtask test` calls it.

mod cases;
mod golden;
mod helm;
mod invariants;
mod objects;
mod profiles;
mod reference;
mod refused;
mod schemas;
