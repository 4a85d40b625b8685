//! Files and directories.

use std::io::{self, ErrorKind};

/// What removing something has led to, where it is as well when there was nothing.
pub fn removed(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
