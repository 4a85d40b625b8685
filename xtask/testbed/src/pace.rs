//! How fast the machine is that tests run on.
//!
//! Time limits and sizes in tests are made for real processors. On an emulated one everything takes many times longer, and
//! [`SLOWNESS`] says how many. Limits that are the subject of a test, such as a timeout of the agent's, are not for this module: the
//! agent's clock runs as fast there as anywhere.

use std::{sync::LazyLock, time::Duration};

/// Environment variable with the factor, a number of at least 1; without it the factor is 1.
pub const SLOWNESS: &str = "UNDERPASS_TEST_SLOWNESS";

static FACTOR: LazyLock<u32> = LazyLock::new(|| {
    let value = std::env::var(SLOWNESS).unwrap_or_else(|_| "1".to_owned());
    let factor = value.parse().ok().filter(|factor| *factor >= 1);
    factor.unwrap_or_else(|| panic!("{SLOWNESS}={value:?} is no whole number of at least 1"))
});

/// How long to wait for what takes at most `limit` on a real processor.
pub fn patience(limit: Duration) -> Duration {
    limit * *FACTOR
}

/// As much of `size` as takes about the time here that `size` takes on a real processor; at least 1.
pub fn scaled(size: u64) -> u64 {
    (size / u64::from(*FACTOR)).max(1)
}
