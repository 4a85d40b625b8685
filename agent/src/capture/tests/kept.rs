//! Pods that vanish without leaving the mesh.

use std::{collections::BTreeSet, fs, os::unix::fs::MetadataExt as _, process::Stdio};

use tokio::process::{Child, Command};

use super::{
    super::{Capture, Reason, TcMode, pins::Layout, records},
    lab::{Connected, Lab, PEER, POD, ip, snapshot, until},
    scene::{PORT, Scene},
    workload,
};
use crate::mesh::{Departures, Exclusions, MeshSettings, Workload};

/// Somebody says that this workload leaves.
fn leaves(workload: &Workload) -> Departures {
    Departures { workloads: BTreeSet::from([workload.key.clone()]), ..Departures::default() }
}

/// A process of the pod that does nothing.
fn resident(scene: &Scene) -> Child {
    let child = Command::new("bash")
        .args(["-c", "echo $$ > $0/pods/cgroup.procs && exec ip netns exec $1 sleep 600"])
        .args([scene.lab.cgroup.to_str().unwrap(), &scene.net.pod])
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    child.expect("bash and ip")
}

/// Nothing goes out or comes in.
async fn assert_closed(scene: &Scene) {
    assert_eq!(scene.dial(false).await, Connected::TimedOut, "past the connect hooks");
    assert_ne!(scene.dial_from_peer().await, Connected::Yes, "plaintext from outside");
    assert_eq!(scene.arrived(), 0);
}

/// Looks until nobody is kept any more.
async fn gone(capture: &Capture, in_sync: bool) -> bool {
    for _ in 0..3 {
        if capture.release_gone(in_sync).await.pods == 0 {
            return true;
        }
    }
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_vanished_stays_closed_until_it_leaves_on_purpose() {
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    assert_eq!(scene.dial_from_peer().await, Connected::Yes, "PERMISSIVE");
    assert_eq!(scene.arrived(), 1);

    capture.keep(&scene.web.key, Reason::Absent).await;
    assert!(capture.pods().is_empty() && pod.kept() == Some(Reason::Absent));
    let kept = capture.kept();
    assert_eq!((kept.len(), kept[0].key.as_ref(), kept[0].reason), (1, Some(&scene.web.key), Reason::Absent));
    assert_eq!(scene.attached(), 2);
    assert_closed(&scene).await;
    // What is opened for everybody is not open here, and a look at a namespace that has a name
    // changes nothing.
    let exclude = Exclusions { inbound_ports: vec![PORT], ..Exclusions::default() };
    let settings = MeshSettings { exclude, ..MeshSettings::default() };
    capture.apply(&snapshot(settings, vec![workload("peer", PEER, None)])).unwrap();
    assert!(!gone(&capture, true).await);
    assert_closed(&scene).await;
    // Nor does it mean anything that another pod leaves.
    capture.release_departed(&leaves(&workload("other", POD, None))).await;
    assert_closed(&scene).await;

    capture.release_departed(&leaves(&scene.web)).await;
    assert!(capture.kept().is_empty());
    drop(pod);
    scene.no_rule().await;
    scene.assert_plain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_pod_that_comes_back_is_the_same_one() {
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    let _listeners = pod.take_listeners().unwrap();
    capture.keep(&scene.web.key, Reason::Absent).await;
    assert_closed(&scene).await;
    let again = capture.enroll(&scene.web, None).await.unwrap();
    assert!(std::sync::Arc::ptr_eq(&pod, &again) && again.kept().is_none());
    assert!(capture.kept().is_empty() && capture.pods().len() == 1);
    assert_eq!(scene.dial_from_peer().await, Connected::Yes, "PERMISSIVE again");
    assert_eq!((scene.dial(true).await, scene.dial(false).await), (Connected::Yes, Connected::TimedOut));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_under_the_name_of_another_does_not_open_that_one() {
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    let first = capture.enroll(&scene.web, None).await.unwrap();
    let other = scene.lab.pod("other");
    let second = capture.enroll(&workload("web", "10.7.0.9", Some(&other.path())), None).await.unwrap();
    assert_ne!(first.netns_cookie, second.netns_cookie);
    assert_eq!(capture.kept().iter().map(|pod| pod.reason).collect::<Vec<_>>(), [Reason::Replaced]);
    assert_closed(&scene).await;
    capture.unenroll(&scene.web.key).await;
    assert_eq!((capture.pods().len(), capture.kept().len()), (0, 1), "the one that has the name leaves");
    assert_closed(&scene).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_is_gone_without_its_name_and_processes() {
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    let mut process = resident(&scene);
    let inside = format!("/proc/{}/ns/net", process.id().unwrap());
    until("the process is in the namespace", || {
        let id = |path: &str| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
        id(&inside) == id(&scene.net.path())
    })
    .await;
    capture.keep(&scene.web.key, Reason::Absent).await;
    ip(&format!("netns del {}", scene.net.pod));
    assert!(!gone(&capture, true).await, "a process is in it");
    process.kill().await.unwrap();
    process.wait().await.unwrap();
    let before = capture.release_gone(true).await;
    assert!(before.pods == 1 && before.vanishing, "one look proves nothing");
    assert_eq!(capture.release_gone(true).await.pods, 0);
    assert_eq!(scene.tc_links(), 0);
    drop(pod);
    // So that the lab finds what it takes away.
    ip(&format!("netns add {}", scene.net.pod));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_alive_while_its_cgroup_has_a_process() {
    let mut scene = Scene::new().await;
    let cgroup = scene.lab.cgroup.join("pods");
    scene.web.local.as_mut().unwrap().cgroup = Some(cgroup.clone());
    let capture = scene.start(TcMode::Auto).await;
    let _pod = capture.enroll(&scene.web, None).await.unwrap();
    // It could hold sockets of the pod's namespace, and is in another one.
    let mut process = Command::new("bash")
        .args(["-c", "echo $$ > $0/cgroup.procs && exec unshare -n sleep 600", cgroup.to_str().unwrap()])
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    until("it is there", || fs::read_to_string(cgroup.join("cgroup.procs")).is_ok_and(|pids| !pids.is_empty())).await;
    capture.keep(&scene.web.key, Reason::Absent).await;
    ip(&format!("netns del {}", scene.net.pod));
    assert!(!gone(&capture, true).await);
    process.kill().await.unwrap();
    process.wait().await.unwrap();
    assert!(gone(&capture, true).await);
    ip(&format!("netns add {}", scene.net.pod));
}

async fn orphan(tc: TcMode) {
    let scene = Scene::new().await;
    let capture = scene.start(tc).await;
    drop(capture.enroll(&scene.web, None).await.unwrap());
    drop(capture);
    let capture = scene.start(tc).await;
    // It is not in what this agent knows.
    capture.collect_garbage().await;
    let kept = capture.kept();
    assert_eq!((kept.len(), kept[0].key.as_ref(), kept[0].reason), (1, Some(&scene.web.key), Reason::Orphaned));
    assert_eq!(scene.dial(true).await, Connected::Refused);
    assert_closed(&scene).await;
    assert_eq!(records::kept(&scene.lab.pins).unwrap().len(), 1, "also told without an agent");
    // New interfaces are guarded, too.
    let links = scene.attached();
    ip(&format!("-n {} link add more type veth peer name less", scene.net.pod));
    if tc == TcMode::Tcx {
        until("the new interfaces are guarded", || scene.attached() == links + 4).await;
    }
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    assert!(capture.kept().is_empty() && records::kept(&scene.lab.pins).unwrap().is_empty());
    assert_eq!((pod.id, scene.dial_from_peer().await), (1, Connected::Yes));
    assert_eq!(scene.dial(false).await, Connected::TimedOut);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_earlier_agents_pod_that_nobody_knows_is_kept() {
    orphan(TcMode::Tcx).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_earlier_agents_pod_that_nobody_knows_is_kept_with_clsact() {
    orphan(TcMode::Clsact).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orphan_that_is_gone_is_released_when_the_source_has_said_everything() {
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    drop(capture.enroll(&scene.web, None).await.unwrap());
    drop(capture);
    ip(&format!("netns del {}", scene.net.pod));
    let capture = scene.start(TcMode::Auto).await;
    capture.collect_garbage().await;
    assert!(!gone(&capture, false).await, "from a copy nobody is given up");
    assert!(gone(&capture, true).await);
    ip(&format!("netns add {}", scene.net.pod));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_of_an_older_version_stays_closed_when_that_version_is_removed() {
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    drop(capture.enroll(&scene.web, None).await.unwrap());
    drop(capture);
    let old = Layout::new(&scene.lab.pins, "0000000000000000");
    fs::rename(scene.lab.layout().dir(), old.dir()).unwrap();
    let capture = scene.start(TcMode::Auto).await;
    // The new version knows nothing of the pod.
    capture.collect_garbage().await;
    assert!(!old.dir().exists());
    assert_eq!(capture.kept()[0].key.as_ref(), Some(&scene.web.key));
    assert_eq!(scene.dial(true).await, Connected::Refused);
    assert_closed(&scene).await;
    capture.release_departed(&leaves(&scene.web)).await;
    scene.assert_plain().await;
}

#[tokio::test]
async fn records_go_with_what_they_describe() {
    let lab = Lab::new();
    let (net, capture) = (lab.pod("pod"), lab.start().await);
    let records = || fs::read_dir(lab.layout().pods()).unwrap().count();
    let web = workload("web", POD, Some(&net.path()));
    drop(capture.enroll(&web, None).await.unwrap());
    assert_eq!(records(), 1);
    capture.unenroll(&web.key).await;
    assert_eq!(records(), 0);
}
