//! Objects in, snapshots out.

mod compiling;
mod incremental;
mod scale;
pub(super) mod support;
