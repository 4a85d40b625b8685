//! Who is in a captured namespace, written down beside the maps that capture it.
//!
//! The maps know numbers only. An agent that starts must tell which pod an entry is: to let the pod
//! go when it was taken out of the mesh, and to tell an operator its name. So every captured
//! namespace has a record, named by the namespace's cookie. bpffs has no files, but symbolic links,
//! whose target can be any text: the record is as old as the maps and goes with them.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{
    CaptureError,
    kept::Reason,
    pins::{self, Layout},
};
use crate::mesh::{LocalPod, SpiffeId, Workload, WorkloadKey};

/// The pod in a captured namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its namespace and name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    workload: Option<(Arc<str>, Arc<str>)>,
    /// Its uid, where the source knows one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<Arc<str>>,
    /// Its SPIFFE ID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    identity: Option<String>,
    /// What its network namespace was called.
    #[serde(default)]
    pub netns: PathBuf,
    /// Its cgroup directory, where the source knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<PathBuf>,
    /// Why it is kept, while it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Reason>,
}

impl Record {
    /// Of a pod that is enrolled.
    pub fn new(workload: &Workload, local: &LocalPod) -> Self {
        let key = &workload.key;
        Self {
            workload: Some((Arc::clone(&key.namespace), Arc::clone(&key.name))),
            uid: local.uid.clone(),
            identity: Some(workload.identity.to_string()),
            netns: local.netns.name().to_owned(),
            cgroup: local.cgroup.clone(),
            kept: None,
        }
    }

    /// Which workload it is; `None` of a record that could not be read.
    pub fn key(&self) -> Option<WorkloadKey> {
        let (namespace, name) = self.workload.clone()?;
        Some(WorkloadKey { namespace, name })
    }

    /// Its identity.
    pub fn identity(&self) -> Option<SpiffeId> {
        self.identity.as_ref()?.parse().ok()
    }
}

fn path(layout: &Layout, netns: u64) -> PathBuf {
    layout.pods().join(netns.to_string())
}

/// Writes the record of a namespace, in the place of an earlier one. A pod whose record is missing
/// is captured all the same.
pub fn write(layout: &Layout, netns: u64, record: &Record) {
    let path = path(layout, netns);
    let written = serde_json::to_string(record).map_err(|e| e.to_string()).and_then(|text| {
        let new = pins::replacement(&path).map_err(|e| e.to_string())?;
        symlink(text, &new).map_err(|e| format!("make {}: {e}", new.display()))?;
        pins::replace(&new, &path).map_err(|e| e.to_string())
    });
    if let Err(error) = written {
        tracing::warn!(netns, %error, "an agent that starts again will not know which pod this namespace is");
    }
}

/// The record of a namespace, if there is one that can be read.
pub fn read(layout: &Layout, netns: u64) -> Option<Record> {
    read_at(&path(layout, netns))
}

fn read_at(path: &Path) -> Option<Record> {
    let text = fs::read_link(path).ok()?;
    serde_json::from_str(text.to_str()?).ok()
}

/// Removes the record of a namespace that is not captured any more.
pub fn remove(layout: &Layout, netns: u64) {
    let path = path(layout, netns);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(record = %path.display(), %error, "cannot be removed");
        }
        _ => {}
    }
}

/// The records of pods that are kept, of every version under `pin_root`, with or without a living
/// agent.
pub fn kept(pin_root: &Path) -> Result<Vec<(Record, Reason)>, CaptureError> {
    let mut kept = Vec::new();
    for layout in pins::versions(pin_root, None)? {
        let records = pins::list(&layout.pods())?;
        kept.extend(records.iter().filter_map(|path| read_at(path)).filter_map(|r| r.kept.map(|reason| (r, reason))));
    }
    Ok(kept)
}
