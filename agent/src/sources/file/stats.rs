//! What happened to the configuration file since the agent started.

use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

/// Longest error kept, in bytes.
const MAX_ERROR: usize = 4096;

/// The counts at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadStatus {
    /// Documents put into force, the first one included.
    pub accepted: u64,
    /// Documents refused: unreadable, invalid, or in need of a restart.
    pub rejected: u64,
    /// The agent started from the last good copy and has not seen a valid file since.
    pub from_last_good: bool,
    /// Why the file as it is now is not in force; absent when it is.
    pub error: Option<String>,
}

/// Counts reloads. Bounded: it keeps one error.
#[derive(Debug, Default)]
pub struct ReloadStats(Mutex<ReloadStatus>);

impl ReloadStats {
    /// The counts now.
    pub fn status(&self) -> ReloadStatus {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn accepted(&self) {
        self.update(|s| {
            s.accepted += 1;
            s.error = None;
            s.from_last_good = false;
        });
    }

    /// The file is back to what is in force.
    pub(super) fn in_force(&self) {
        self.update(|s| s.error = None);
    }

    pub(super) fn rejected(&self, error: &str) {
        let end = error.floor_char_boundary(MAX_ERROR);
        self.update(|s| {
            s.rejected += 1;
            s.error = Some(error[..end].to_owned());
        });
    }

    pub(super) fn started_from_last_good(&self) {
        self.update(|s| {
            s.accepted += 1;
            s.from_last_good = true;
        });
    }

    fn update(&self, change: impl FnOnce(&mut ReloadStatus)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
