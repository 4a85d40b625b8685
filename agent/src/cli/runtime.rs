//! What commands run asynchronous code on.

use anyhow::Context as _;
use tokio::runtime::{Builder, Runtime};

/// For a command that waits for one thing after the other: no thread but its own.
pub(super) fn small() -> anyhow::Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("starting the runtime")
}

/// For a server: a thread per processor.
pub(super) fn full() -> anyhow::Result<Runtime> {
    Builder::new_multi_thread().enable_all().thread_name("underpass").build().context("starting the runtime")
}
