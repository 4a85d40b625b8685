//! Objects in, snapshots out.

mod compiling;
mod incremental;
mod scale;
mod static_pods;
pub(super) mod support;
mod unknown;
