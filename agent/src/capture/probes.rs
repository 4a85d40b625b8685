//! Probe cgroups: connections from them are the kubelet's probes, which neither mode nor policy
//! stops.
//!
//! The programs know a cgroup by its kernel id. A unit that is restarted gets a new cgroup, with another id, under its old
//! name, so the directories on the way to a configured cgroup are watched.

mod record;
mod watch;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use underpass_abi::capacity;

pub use self::record::Recorder;
use self::watch::Watch;
use super::{CaptureError, hierarchy::Mount, maps::Maps};

/// A configured probe cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeCgroup {
    /// Its path, as `/proc/PID/cgroup` has it.
    pub path: PathBuf,
    /// How it stands.
    pub state: ProbeCgroupState,
    /// Why its connections cannot be recorded, and what to do. They are recognised only while
    /// packets carry their sockets.
    pub unrecorded: Option<String>,
}

/// How a probe cgroup stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeCgroupState {
    /// Connections from it are probes.
    Active {
        /// Its kernel id.
        id: u64,
    },
    /// There is no such cgroup now; it is used as soon as there is.
    Missing,
    /// It is not used.
    Refused {
        /// Why not, and what to do.
        reason: String,
    },
}

/// Keeps the map of probe cgroups equal to what is configured and exists.
pub struct Probes {
    /// The attach point: the pods are below it.
    attach: PathBuf,
    maps: Arc<Maps>,
    recorder: Recorder,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    cgroups: Vec<ProbeCgroup>,
    /// There is none while nothing is configured.
    watch: Option<Watch>,
}

impl Probes {
    /// No probe cgroup is configured yet; those of an earlier agent stay until [`set`](Self::set).
    pub fn new(attach: PathBuf, maps: Arc<Maps>, recorder: Recorder) -> Arc<Self> {
        Arc::new(Self { attach, maps, recorder, state: Mutex::default() })
    }

    /// Makes `cgroups` the probe cgroups. Must be called within a Tokio runtime, which then follows their directories.
    pub fn set(self: &Arc<Self>, cgroups: &[PathBuf]) -> Result<(), CaptureError> {
        let mut state = self.state();
        let known = std::mem::take(&mut state.cgroups);
        let as_known = |path: &PathBuf| known.iter().find(|k| k.path == *path).cloned();
        let new =
            |path: &PathBuf| ProbeCgroup { path: path.clone(), state: ProbeCgroupState::Missing, unrecorded: None };
        // What is new has no state to compare with, so it is announced whatever it is.
        let fresh: Vec<_> = cgroups.iter().filter(|p| as_known(p).is_none()).cloned().collect();
        state.cgroups = cgroups.iter().map(|p| as_known(p).unwrap_or_else(|| new(p))).collect();
        if cgroups.is_empty() {
            state.watch = None;
        } else if state.watch.is_none() {
            state.watch = Some(Watch::start(self));
        }
        self.look(&mut state, &fresh)
    }

    /// Looks again at every configured cgroup.
    pub fn refresh(&self) {
        let mut state = self.state();
        if let Err(e) = self.look(&mut state, &[]) {
            tracing::error!(error = %e, "the probe cgroups stay what they were");
        }
    }

    /// The configured ones, as they were found last.
    pub fn cgroups(&self) -> Vec<ProbeCgroup> {
        self.state().cgroups.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self, state: &mut State, fresh: &[PathBuf]) -> Result<(), CaptureError> {
        let State { cgroups, watch } = state;
        let attach = fs::canonicalize(&self.attach).map_err(|e| format!("{}: {e}", self.attach.display()));
        let place = attach.and_then(|attach| Ok((Mount::of(&attach)?, attach)));
        // First the watches, then a look: what happens in between is seen by one of them.
        if let (Some(watch), Ok((mount, _))) = (watch, &place) {
            let directories = cgroups.iter().filter_map(|c| mount.directory(&c.path)).collect::<Vec<_>>();
            watch.follow(mount.point(), &directories);
        }
        let mut active = BTreeMap::new();
        for cgroup in &mut *cgroups {
            let mut found = match &place {
                Ok((mount, attach)) => find(mount, &mount.cgroup(attach), &cgroup.path),
                Err(reason) => ProbeCgroupState::Refused { reason: reason.clone() },
            };
            if matches!(found, ProbeCgroupState::Active { .. }) && active.len() >= capacity::PROBE_CGROUPS {
                found = ProbeCgroupState::Refused { reason: too_many() };
            }
            if found != cgroup.state || fresh.contains(&cgroup.path) {
                announce(&cgroup.path, &found);
            }
            if let (ProbeCgroupState::Active { id }, Ok((mount, _))) = (&found, &place)
                && let Some(directory) = mount.directory(&cgroup.path)
            {
                active.insert(*id, directory);
            }
            cgroup.state = found;
        }
        let failures = self.recorder.record(&active);
        for cgroup in &mut *cgroups {
            let failure = match cgroup.state {
                ProbeCgroupState::Active { id } => failures.get(&id).cloned(),
                _ => None,
            };
            if failure.is_some() && failure != cgroup.unrecorded {
                let (cgroup, reason) = (cgroup.path.display(), failure.as_deref());
                tracing::warn!(%cgroup, reason, "kubelet probes are recognised only while packets carry their sockets");
            }
            cgroup.unrecorded = failure;
        }
        let ids = cgroups.iter().filter_map(|c| match c.state {
            ProbeCgroupState::Active { id } => Some(id),
            _ => None,
        });
        self.maps.tables().apply_probe_cgroups(ids)
    }
}

fn too_many() -> String {
    format!(
        "there is room for {} probe cgroups and this is one more: its probes fail under STRICT; name one cgroup above several",
        capacity::PROBE_CGROUPS
    )
}

/// Looks at one cgroup. `pods` is the cgroup that all pods are below.
fn find(mount: &Mount, pods: &Path, cgroup: &Path) -> ProbeCgroupState {
    let refused = |reason| ProbeCgroupState::Refused { reason };
    let (shown, pods_shown) = (cgroup.display(), pods.display());
    if cgroup.starts_with(pods) {
        return refused(format!(
            "{shown} is at or below the pods' cgroup {pods_shown}, and no pod is exempt; name the kubelet's own cgroup"
        ));
    }
    if pods.starts_with(cgroup) {
        return refused(format!(
            "the pods' cgroup {pods_shown} is below {shown}, so every pod would be exempt; name the kubelet's own cgroup"
        ));
    }
    let Some(directory) = mount.directory(cgroup) else {
        return refused(format!(
            "{shown} is not shown by the mount {}; give --cgroup a directory of a mount of the whole hierarchy",
            mount.point().display()
        ));
    };
    // The kernel's id of a cgroup is the inode number of its directory.
    match fs::metadata(directory) {
        Ok(found) if found.is_dir() => ProbeCgroupState::Active { id: found.ino() },
        _ => ProbeCgroupState::Missing,
    }
}

fn announce(cgroup: &Path, state: &ProbeCgroupState) {
    let cgroup = cgroup.display();
    match state {
        ProbeCgroupState::Active { id } => tracing::info!(%cgroup, id, "kubelet probes come from this cgroup"),
        ProbeCgroupState::Missing => {
            tracing::warn!(%cgroup, "no such cgroup: probes fail under STRICT and are subject to policies until there is");
        }
        ProbeCgroupState::Refused { reason } => tracing::error!(%cgroup, %reason, "not used as a probe cgroup"),
    }
}
