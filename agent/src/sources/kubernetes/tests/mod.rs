//! Objects in, snapshots out.

mod compiling;
pub(super) mod support;
