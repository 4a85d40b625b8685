//! Counters and logs.

mod counters;
pub mod logging;

pub use counters::{Counters, CountersSnapshot, KtlsFallback, RefusalReason};
