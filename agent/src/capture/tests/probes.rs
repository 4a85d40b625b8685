//! Probe cgroups of the file system, and what gets into the map.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::{
    super::{Capture, ProbeCgroupState},
    lab::{Lab, cgroup_mount, snapshot, until},
};
use crate::{
    mesh::{MeshSettings, ProbeSettings},
    sys::bpf::LinkTarget,
};

/// A cgroup outside of the pods', with one below it; removed when dropped.
struct Kubelet(PathBuf);

impl Kubelet {
    fn path_for(lab: &Lab) -> PathBuf {
        PathBuf::from(format!("{}-slice/kubelet.service", lab.cgroup.display()))
    }

    fn create(directory: PathBuf) -> Self {
        fs::create_dir_all(&directory).unwrap();
        Self(directory)
    }

    fn id(&self) -> u64 {
        fs::metadata(&self.0).unwrap().ino()
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        for directory in [&*self.0, self.0.parent().unwrap()] {
            if let Err(e) = fs::remove_dir(directory) {
                eprintln!("removing {}: {e}", directory.display());
            }
        }
    }
}

/// As `/proc/PID/cgroup` writes it.
fn cgroup_path(directory: &Path) -> PathBuf {
    Path::new("/").join(directory.strip_prefix(cgroup_mount()).unwrap())
}

fn apply(capture: &Capture, cgroups: &[&Path]) {
    let cgroups = cgroups.iter().map(|c| cgroup_path(c)).collect();
    let probes = ProbeSettings { cgroups, ..ProbeSettings::default() };
    capture.apply(&snapshot(MeshSettings { probes, ..MeshSettings::default() }, vec![])).unwrap();
}

fn in_map(capture: &Capture) -> Vec<u64> {
    capture.inner.maps.tables().probe_cgroups()
}

/// The cgroups, by id, whose connections are recorded.
fn recorded(lab: &Lab) -> Vec<u64> {
    let links = lab.links();
    let probes = links.iter().filter_map(|(name, link)| {
        let id = name.strip_prefix("probe-")?.parse().unwrap();
        assert_eq!(link.target, LinkTarget::Cgroup(id), "{name}");
        Some(id)
    });
    probes.collect()
}

fn states(capture: &Capture) -> Vec<ProbeCgroupState> {
    capture.probe_cgroups().into_iter().map(|c| c.state).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cgroup_is_followed_as_it_comes_and_goes() {
    let lab = Lab::new();
    let capture = lab.start().await;
    let path = Kubelet::path_for(&lab);
    apply(&capture, &[&path]);
    assert_eq!((states(&capture), in_map(&capture)), (vec![ProbeCgroupState::Missing], vec![]));
    // Neither it nor what it is in has been there.
    let kubelet = Kubelet::create(path.clone());
    let first = kubelet.id();
    until("the new cgroup is used", || in_map(&capture) == [first]).await;
    assert_eq!(states(&capture), [ProbeCgroupState::Active { id: first }]);
    assert_eq!(recorded(&lab), [first]);
    drop(kubelet);
    until("the old cgroup is forgotten", || in_map(&capture).is_empty()).await;
    assert!(recorded(&lab).is_empty());
    // As when a unit is restarted: gone and there again before anybody looks.
    drop(Kubelet::create(path.clone()));
    let kubelet = Kubelet::create(path.clone());
    assert_ne!(kubelet.id(), first, "ids are not used again");
    until("the cgroup that replaces it is used", || in_map(&capture) == [kubelet.id()]).await;
    assert_eq!(recorded(&lab), [kubelet.id()]);
    fs::remove_dir(&path).unwrap();
    fs::create_dir(&path).unwrap();
    until("also when only the last directory is replaced", || in_map(&capture) == [kubelet.id()]).await;
    apply(&capture, &[]);
    assert!(in_map(&capture).is_empty() && states(&capture).is_empty() && recorded(&lab).is_empty());
}

/// Connections are recorded while no agent runs, then by the next one's program in the same place.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_agent_goes_on_recording() {
    let lab = Lab::new();
    let kubelet = Kubelet::create(Kubelet::path_for(&lab));
    let capture = lab.start().await;
    apply(&capture, &[&kubelet.0]);
    let link = |lab: &Lab| lab.links()[&format!("probe-{}", kubelet.id())];
    let before = link(&lab);
    drop(capture);
    assert_eq!(link(&lab), before, "nobody runs");
    let capture = lab.start().await;
    assert_eq!(link(&lab), before, "until it is known who sends probes");
    apply(&capture, &[&kubelet.0]);
    let after = link(&lab);
    assert_eq!((after.id, after.target), (before.id, before.target));
    assert_ne!(after.program_id, before.program_id);
    assert_eq!(capture.probe_cgroups()[0].unrecorded, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn cgroups_of_pods_are_not_used() {
    let lab = Lab::new();
    let capture = lab.start().await;
    let kubelet = Kubelet::create(Kubelet::path_for(&lab));
    let above = lab.cgroup.parent().unwrap();
    for (cgroup, reason) in [
        (&*lab.cgroup, "at or below the pods' cgroup"),
        (&*lab.cgroup.join("pods"), "at or below the pods' cgroup"),
        (above, "so every pod would be exempt"),
    ] {
        apply(&capture, &[cgroup, &kubelet.0]);
        let found = states(&capture);
        assert!(
            matches!(&found[0], ProbeCgroupState::Refused { reason: r } if r.contains(reason) && r.contains("name the kubelet")),
            "{found:?}"
        );
        assert_eq!(in_map(&capture), [kubelet.id()], "the other one is used all the same");
    }
    // What one agent wrote does not outlive the configuration of the next.
    drop(capture);
    let capture = lab.start().await;
    assert_eq!(in_map(&capture), [kubelet.id()]);
    apply(&capture, &[]);
    assert!(in_map(&capture).is_empty());
}
