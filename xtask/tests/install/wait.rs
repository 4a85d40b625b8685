//! Waiting for what does not tell.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use testbed::pace::patience;

/// How often something is asked that does not tell by itself.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Asks until the answer is no error any more, at most `within`; then that error.
pub(crate) fn eventually<T>(what: &str, within: Duration, mut ask: impl FnMut() -> Result<T>) -> Result<T> {
    let within = patience(within);
    let deadline = Instant::now() + within;
    loop {
        match ask() {
            Err(_) if Instant::now() < deadline => sleep(ASK_AGAIN),
            result => return result.with_context(|| format!("{what}: not within {within:?}")),
        }
    }
}

/// As long as `during`, what is asked has to be so.
pub(crate) fn throughout(what: &str, during: Duration, mut ask: impl FnMut() -> Result<()>) -> Result<()> {
    let end = Instant::now() + during;
    while Instant::now() < end {
        ask().with_context(|| format!("{what}: not throughout {during:?}"))?;
        sleep(ASK_AGAIN);
    }
    Ok(())
}
