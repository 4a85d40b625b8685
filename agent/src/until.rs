//! Waiting for a moment that there may not be.

use tokio::time::{Instant, sleep_until};

/// Waits until `at`; for ever without one.
pub async fn until(at: Option<impl Into<Instant>>) {
    match at {
        Some(at) => sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
