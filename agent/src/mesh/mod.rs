//! The mesh as data: who exists, where, as whom, and how to reach it. No I/O.
//!
//! A [`Snapshot`] is immutable. Sources build one through [`SnapshotBuilder`], which checks what a single
//! field cannot (dangling references, addresses claimed twice), and [`MeshStore`] swaps it in atomically.

mod builder;
mod departures;
mod identity;
mod issuer;
mod mode;
mod model;
mod namespace;
mod policy;
mod sharded;
mod snapshot;
mod store;
#[cfg(test)]
mod tests;

pub use builder::{BuildError, SnapshotBuilder};
pub use departures::Departures;
pub(crate) use identity::check_name;
pub use identity::{IdentityError, SpiffeId, TrustDomain};
pub use issuer::{CaAddress, CaAddressError, IstioCa};
pub use mode::{EffectiveMode, ModeDefaults, ModeSource};
pub use model::{
    AccessLogRule, AccessLogSettings, CertificateFiles, Endpoint, Exclusions, Held, InboundMode, LocalPod,
    MeshSettings, PlaintextRefusal, PortMode, ProbeSettings, Protocol, Service, ServicePort, Workload, WorkloadKey,
};
pub use namespace::{NetnsId, PodNamespace};
pub use policy::{
    Action, Condition, Labels, Operation, Policy, PolicyKey, PolicyStatus, Rule, Scope, ServiceAccount, Source,
    StringMatch, Values, WorkloadPolicy, canonical_block,
};
pub use snapshot::{APPLICATION_LABELS, LATEST_REVISION, Resolution, Snapshot};
pub use store::MeshStore;
