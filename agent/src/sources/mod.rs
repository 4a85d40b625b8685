//! Where the mesh model comes from.

pub mod file;
pub mod kubernetes;
mod last_good;

use std::{io, path::Path};

/// Removes what sources keep for a start without them.
pub fn forget(state_dir: &Path) -> io::Result<()> {
    file::forget(state_dir)?;
    kubernetes::forget(state_dir)
}
