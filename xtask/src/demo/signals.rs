//! An interrupted demo leaves nothing behind either.

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};

/// From now on SIGINT, SIGTERM and SIGHUP remove what this process created and then end it.
///
/// The signals stay blocked in this thread and those it starts; programs that it starts get a clean mask.
pub(super) fn clean_up_when_interrupted() -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().context("blocking signals")?;
    std::thread::spawn(move || {
        let Ok(signal) = signals.wait() else { return };
        eprintln!("\n{signal}: removing namespaces, programs and pins");
        if let Err(error) = testbed::cleanup_own() {
            eprintln!("{error:#}");
        }
        std::process::exit(128 + signal as i32);
    });
    Ok(())
}
