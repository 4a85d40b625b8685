//! The plugin's program.

use std::{io, path::Path};

use super::{InstallError, failed};
use crate::files::{self, Attributes, Snapshot};

/// Largest program, in bytes. It has 1.5 MiB when it is static, eight with debug information.
const LARGEST: u64 = 64 << 20;
const ATTRIBUTES: Attributes = Attributes { mode: 0o755, owner: None };

/// Copies the program unless the same is there. One that is running is not touched: the new one takes its name.
/// Returns whether it was copied.
pub(super) fn install(program: &Path, to: &Path) -> Result<bool, InstallError> {
    let new = Snapshot::take(program, LARGEST).map_err(failed("reading", program))?;
    match Snapshot::take(to, LARGEST) {
        Ok(old) if old.bytes == new.bytes && old.attributes().mode == ATTRIBUTES.mode => return Ok(false),
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::FileTooLarge) => {
            return Err(failed("reading", to)(error));
        }
        _ => {}
    }
    files::replace(to, &new.bytes, ATTRIBUTES).map_err(failed("writing", to))?;
    Ok(true)
}
