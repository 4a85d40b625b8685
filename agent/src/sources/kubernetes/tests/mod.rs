//! Objects in, snapshots out.

mod absence;
mod compiling;
mod incremental;
mod scale;
mod static_pods;
pub(super) mod support;
mod unknown;
