//! Underpass: a transparent mTLS dataplane.
//!
//! The modules read in the order a connection meets them: [`capture`] redirects it to the agent, [`proxy`]
//! decides, [`tunnel`] authenticates, [`relay`] moves the bytes. [`mesh`], [`policy`] and [`identity`] are
//! what those decisions are based on, [`sources`] fills them, [`cli`] and [`admin`] are what operators touch,
//! [`cni`] is what holds a new pod's start until it is captured.

pub mod admin;
pub mod bounds;
pub mod ca;
pub mod capture;
pub mod cli;
pub mod cni;
mod fnv;
pub mod handover;
pub mod identity;
pub mod mesh;
mod pod_identity;
pub mod policy;
pub mod proxy;
pub mod relay;
mod socket_file;
pub mod sources;
pub mod sys;
pub mod telemetry;
pub mod tunnel;
mod until;
