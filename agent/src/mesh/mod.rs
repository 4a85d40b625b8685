//! The mesh as data: who exists, where, as whom, and how to reach it. No I/O.
//!
//! A [`Snapshot`] is immutable. Sources build one through [`SnapshotBuilder`], which checks what a single
//! field cannot (dangling references, addresses claimed twice), and [`MeshStore`] swaps it in atomically.

mod builder;
mod identity;
mod model;
mod snapshot;
mod store;
#[cfg(test)]
mod tests;

pub use builder::{BuildError, SnapshotBuilder};
pub(crate) use identity::check_name;
pub use identity::{IdentityError, SpiffeId, TrustDomain};
pub use model::{
    CertificateFiles, Endpoint, Exclusions, InboundMode, LocalPod, MeshSettings, PortMode, Protocol, Service,
    ServicePort, Workload, WorkloadKey,
};
pub use snapshot::{Resolution, Snapshot};
pub use store::MeshStore;
