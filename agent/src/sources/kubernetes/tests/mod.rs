//! Objects in, snapshots out.

mod compiling;
mod scale;
pub(super) mod support;
