//! Removes everything the agent makes, with or without a living agent.

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::maps::{HashMap, Map, MapData};
use serde::Serialize;

use super::{
    CaptureError, garbage,
    lock::PinLock,
    netns::Netns,
    node_guard,
    pins::{self, Direction, Layout, TcPin},
    routes, tc,
};
use crate::sys::bpf;

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Directories of ABI versions.
    pub versions: Vec<PathBuf>,
    /// Links: cgroup hooks and tcx programs.
    pub links: usize,
    /// Maps.
    pub maps: usize,
    /// clsact filters.
    pub filters: usize,
    /// Namespaces whose reply routes and filters were removed.
    pub namespaces: Vec<PathBuf>,
    /// What could not be done. Calling again tries again.
    pub problems: Vec<String>,
}

impl std::ops::AddAssign for Report {
    fn add_assign(&mut self, other: Self) {
        self.versions.extend(other.versions);
        self.links += other.links;
        self.maps += other.maps;
        self.filters += other.filters;
        self.namespaces.extend(other.namespaces);
        self.problems.extend(other.problems);
    }
}

/// Removes links, pins and directories of every ABI version under `pin_root`, and filters and reply routes in the pods'
/// namespaces: these `pods`, and those that the pinned maps name and that can be found. Pods get plain traffic back. Does
/// nothing where there is nothing. Refused while an agent runs, unless `force`.
pub async fn cleanup(pin_root: &Path, pods: &[PathBuf], force: bool) -> Result<Report, CaptureError> {
    let lock = match PinLock::acquire(pin_root) {
        Ok(lock) => Some(lock),
        Err(_) if force => None,
        Err(e) => return Err(e),
    };
    let mut report = Report::default();
    let versions = pins::versions(pin_root, None)?;
    let mut captured: BTreeSet<u64> = versions.iter().flat_map(|v| captured(v).unwrap_or_default()).collect();
    let devices: BTreeSet<u32> = versions.iter().flat_map(node_interfaces).collect();
    for layout in versions {
        match remove_version(&layout) {
            Ok(removed) => report += removed,
            Err(e) => report.problems.push(e.to_string()),
        }
    }
    let mut namespaces = Vec::new();
    for path in pods {
        match Netns::open(path) {
            Ok(netns) => {
                captured.remove(&netns.cookie());
                namespaces.push(netns);
            }
            Err(e) => report.problems.push(e.to_string()),
        }
    }
    if !captured.is_empty() {
        namespaces.extend(super::blocking(move || garbage::find(&captured)).await);
    }
    for netns in namespaces {
        match tc::detach_filters(&netns).await {
            Ok(filters) => report.filters += filters,
            Err(e) => report.problems.push(e.to_string()),
        }
        routes::remove(&netns).await;
        report.namespaces.push(netns.path().to_owned());
    }
    for device in devices {
        match super::blocking(move || node_guard::remove_filters(device)).await {
            Ok(filters) => report.filters += filters,
            Err(e) => report.problems.push(e.to_string()),
        }
    }
    // What others put there is theirs.
    if pins::list(pin_root)?.is_empty() {
        remove_directory(pin_root, &mut report.problems);
    }
    if let Some(lock) = lock {
        lock.remove()?;
    }
    Ok(report)
}

/// Cookies of the namespaces that a version captures, whatever its entries look like.
pub fn captured(layout: &Layout) -> io::Result<Vec<u64>> {
    match bpf::object_get(&layout.map("PODS")) {
        Ok(map) => bpf::keys(map.as_fd()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Interfaces of the node that a version guards, as [`captured`].
fn node_interfaces(layout: &Layout) -> Vec<u32> {
    let interfaces = MapData::from_pin(layout.map("NODE_INTERFACES")).and_then(Map::from_map_data);
    let interfaces = interfaces.and_then(HashMap::<_, u32, u32>::try_from);
    interfaces.map(|interfaces| interfaces.keys().filter_map(Result::ok).collect()).unwrap_or_default()
}

/// Removes one version in the order of un-enrolment: capture off first, then guards, then what they need.
pub fn remove_version(layout: &Layout) -> Result<Report, CaptureError> {
    let mut report = Report::default();
    let links = pins::list(&layout.links())?;
    let is = |path: &Path, prefix: &str| {
        path.file_name().and_then(|n| n.to_str()).is_some_and(|name| name.starts_with(prefix))
    };
    let outside = |path: &Path| {
        let pin = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
        pin.is_some_and(|pin: TcPin| pin.direction == Direction::Node)
    };
    let rank = |path: &PathBuf| match () {
        () if is(path, "connect") => 0,
        () if outside(path) => 2,
        () if is(path, "tc-") => 1,
        () => 3,
    };
    let mut ordered = links;
    ordered.sort_by_key(rank);
    for path in ordered {
        report.links += usize::from(pins::remove(&path)?);
    }
    for path in pins::list(&layout.maps())? {
        report.maps += usize::from(pins::remove(&path)?);
    }
    for path in pins::list(&layout.pods())? {
        pins::remove(&path)?;
    }
    for dir in [layout.links(), layout.maps(), layout.pods(), layout.dir().to_owned()] {
        remove_directory(&dir, &mut report.problems);
    }
    report.versions.push(layout.dir().to_owned());
    Ok(report)
}

fn remove_directory(path: &Path, problems: &mut Vec<String>) {
    match fs::remove_dir(path) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => problems.push(format!("remove directory {}: {e}", path.display())),
    }
}
