//! What is pinned and in force, read without an agent: programs, maps and what the maps hold.
//!
//! Reading changes nothing and needs no lock. What is read may be changing: every entry is whole, entries that come or go
//! meanwhile may be there or not.

mod decode;
mod entries;
mod field;
pub mod namespace;
mod pinned_maps;
mod programs;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, path::Path};

pub use entries::{Dump, Fullest, dump};
pub use field::{Entry, Field, Fields};
pub use pinned_maps::{MapRow, Maps, NotListed, maps};
pub use programs::{Attached, ProgramRow, Programs, programs};

use super::{
    CaptureError,
    object::ABI_HASH,
    pins::{self, Layout},
};
use crate::mesh::{Snapshot, WorkloadKey};

/// Every version that is pinned under `pin_root`, this program's own first.
fn layouts(pin_root: &Path) -> Result<Vec<(Layout, bool)>, CaptureError> {
    let mut all: Vec<_> = pins::versions(pin_root, None)?.into_iter().map(|l| (is_ours(&l), l)).collect();
    all.sort_by_key(|(ours, _)| !ours);
    Ok(all.into_iter().map(|(ours, layout)| (layout, ours)).collect())
}

fn is_ours(layout: &Layout) -> bool {
    version(layout) == ABI_HASH
}

/// The version's name: an ABI hash.
fn version(layout: &Layout) -> String {
    layout.dir().file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Names of pods, as far as the pinned maps and a configuration tell.
#[derive(Debug, Clone, Default)]
pub struct Names {
    by_id: BTreeMap<u32, String>,
    by_netns: BTreeMap<u64, String>,
}

impl Names {
    /// Pods are recognised by their addresses. Nothing is known when nothing of this version is pinned.
    pub fn read(pin_root: &Path, mesh: &Snapshot) -> Self {
        let layout = Layout::new(pin_root, ABI_HASH);
        let mut names = Self::default();
        for (netns, config) in entries::pods(&layout).unwrap_or_default() {
            let addresses = [config.addr4, config.addr6].map(decode::ip);
            let named = addresses.iter().filter(|a| !a.is_unspecified()).find_map(|a| mesh.workload_at(*a));
            if let Some(workload) = named {
                names.add(config.pod_id, netns, &workload.key);
            }
        }
        names
    }

    fn add(&mut self, pod_id: u32, netns: u64, key: &WorkloadKey) {
        self.by_id.insert(pod_id, key.to_string());
        self.by_netns.insert(netns, key.to_string());
    }

    /// The workload with this number.
    pub fn pod(&self, id: u32) -> Option<&str> {
        self.by_id.get(&id).map(String::as_str)
    }

    /// The workload in the network namespace with this cookie.
    pub fn netns(&self, cookie: u64) -> Option<&str> {
        self.by_netns.get(&cookie).map(String::as_str)
    }
}
