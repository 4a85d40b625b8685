//! A command that is interrupted leaves nothing behind either.

use anyhow::{Context, Result};

/// From now on SIGINT, SIGTERM and SIGHUP remove what this process created and then end it.
///
/// A handler, not a blocked mask: programs that this one starts would inherit the mask and could not be ended politely.
pub(crate) fn clean_up_when_interrupted() -> Result<()> {
    let clean_up = || {
        eprintln!("\ninterrupted: removing namespaces, programs and pins");
        if let Err(error) = testbed::cleanup_own() {
            eprintln!("{error:#}");
        }
        // 128 + SIGINT, as a shell reports it.
        std::process::exit(130);
    };
    ctrlc::set_handler(clean_up).context("handling SIGINT, SIGTERM and SIGHUP")
}
