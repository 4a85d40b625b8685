//! The guard on the node's side, and what becomes of links when root in the pod moves interfaces.
//! The node is the namespace of the tests.

use std::collections::BTreeSet;

use underpass_abi::programs::NODE_GUARD;

use super::{
    super::{Capture, InterfaceGuard, Pod, TcMode, cleanup::cleanup, pins::Layout, tc::Method},
    lab::{ip, tool, until},
    scene::Scene,
};
use crate::sys::bpf::{Hook, links_on};

/// Gives the pod an interface whose other end is on the node; the name of that end.
fn plug(scene: &Scene, name: &str) -> String {
    let device = format!("n{name}{}", scene.net.pod.trim_start_matches("up").trim_end_matches("-pod"));
    ip(&format!("link add {device} type veth peer name {name} netns {}", scene.net.pod));
    ip(&format!("link set {device} up"));
    ip(&format!("-n {} link set {name} up", scene.net.pod));
    device
}

fn guards(capture: &Capture, pod: &Pod) -> Vec<InterfaceGuard> {
    capture.interfaces(pod.id)
}

fn guard(interface: &str, node_guard: Option<&str>, moved: bool) -> InterfaceGuard {
    InterfaceGuard {
        interface: interface.to_owned(),
        kind: "veth".to_owned(),
        node_guard: node_guard.map(str::to_owned),
        moved,
    }
}

/// Numbers of the pinned tc links.
fn tc_links(scene: &Scene) -> BTreeSet<u32> {
    scene.lab.links().into_iter().filter(|(name, _)| name.starts_with("tc-")).map(|(_, link)| link.id).collect()
}

/// Our filters on a device of the node.
fn filters(device: &str) -> usize {
    let shown = tool("tc", &format!("filter show dev {device} ingress"));
    shown.lines().filter(|line| line.contains(NODE_GUARD)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn links_stay_on_an_interface_that_leaves_the_namespace() {
    let scene = Scene::new().await;
    let device = plug(&scene, "eth1");
    let capture = scene.start(TcMode::Tcx).await;
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    // The other end of eth0 is in a namespace of its own.
    let first = guard("eth0", None, false);
    assert_eq!(guards(&capture, &pod), [first.clone(), guard("eth1", Some(&device), false)]);
    let before = tc_links(&scene);
    assert_eq!(before.len(), 5);

    let nested = scene.lab.namespace("nested");
    let within = &scene.net.pod;
    ip(&format!("-n {within} link set eth1 netns {nested}"));
    until("the agent knows that it moved", || {
        guards(&capture, &pod) == [first.clone(), guard("eth1", Some(&device), true)]
    })
    .await;
    assert_eq!(tc_links(&scene), before);

    // An agent that comes later replaces the programs there, too.
    let program = |scene: &Scene| {
        let links = scene.lab.links();
        links.into_iter().find(|(name, _)| name.ends_with("-node")).map(|(_, link)| link.program_id)
    };
    let old = program(&scene);
    drop((pod, capture));
    let capture = scene.start(TcMode::Tcx).await;
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    capture.collect_garbage().await;
    assert_eq!(tc_links(&scene), before, "what lives is no garbage");
    assert!(old.is_some() && program(&scene) != old);

    // Back again, and under another name: the same links, and no second ones.
    ip(&format!("-n {nested} link set eth1 netns {within} name eth7"));
    until("the agent knows that it is back", || {
        guards(&capture, &pod) == [first.clone(), guard("eth7", Some(&device), false)]
    })
    .await;
    until("the links are the same", || tc_links(&scene) == before).await;
    assert!(scene.lab.links().keys().all(|name| !name.ends_with("-moved")));

    // Gone for good, together with its other end.
    ip(&format!("-n {within} link del eth7"));
    until("its pins are gone", || scene.tc_links() == 2).await;
    assert_eq!(guards(&capture, &pod), [first]);
    capture.unenroll(&scene.web.key).await;
    assert_eq!(scene.tc_links(), 0);
}

/// While one interface is away, another one gets its index: it needs links of its own.
#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_is_used_again_is_another_interface() {
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Tcx).await;
    let _pod = capture.enroll(&scene.web, None).await.unwrap();
    let before = tc_links(&scene);
    let within = &scene.net.pod;
    let shown = ip(&format!("-n {within} -o link show eth0"));
    let index: u32 = shown.split(':').next().unwrap().trim().parse().unwrap();
    let nested = scene.lab.namespace("nested");
    ip(&format!("-n {within} link set eth0 netns {nested}"));
    ip(&format!("-n {within} link add eth0 index {index} type veth peer name other"));
    until("all three have links", || tc_links(&scene).len() == 6).await;
    assert!(tc_links(&scene).is_superset(&before));
    capture.unenroll(&scene.web.key).await;
    assert_eq!(scene.tc_links(), 0, "un-enrolling removes all");
}

/// Indices are counted in every namespace anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_with_the_index_of_another_ones_peer_is_left_alone() {
    let scene = Scene::new().await;
    let (pod, peer) = (&scene.net.pod, &scene.net.peer);
    let decoy = plug(&scene, "eth2");
    let shown = ip(&format!("-o link show {decoy}"));
    let index: u32 = shown.split(':').next().unwrap().trim().parse().unwrap();
    // Few interfaces have been there on some machines, and the peer's namespace has this number
    // already.
    let pad = (ip(&format!("-n {peer} -o link show")).lines()).any(|line| line.starts_with(&format!("{index}:")));
    let (decoy, index) = if pad {
        const FREE: u32 = 7777;
        ip(&format!("link del {decoy}"));
        ip(&format!("link add {decoy} index {FREE} type veth peer name eth2 netns {pod}"));
        ip(&format!("link set {decoy} up"));
        ip(&format!("-n {pod} link set eth2 up"));
        (decoy, FREE)
    } else {
        (decoy, index)
    };
    // From inside: kernels before 6.13 look for the index in the namespace of who asks.
    ip(&format!("-n {peer} link add eth3 index {index} type veth peer name eth3 netns {pod}"));
    let capture = scene.start(TcMode::Auto).await;
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    let expected = [guard("eth0", None, false), guard("eth2", Some(&decoy), false), guard("eth3", None, false)];
    assert_eq!(guards(&capture, &pod), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_on_the_nodes_side_go_with_the_enrolment() {
    let scene = Scene::new().await;
    let device = plug(&scene, "eth1");
    for tc in [TcMode::Clsact, TcMode::Auto, TcMode::Clsact] {
        let capture = scene.start(tc).await;
        let pod = capture.enroll(&scene.web, None).await.unwrap();
        // A kernel without tcx has filters only.
        let expected = if capture.inner.method == Method::Clsact { (1, 0) } else { (0, 5) };
        assert_eq!((filters(&device), scene.tc_links()), expected, "{tc:?}");
        assert_eq!(guards(&capture, &pod)[1], guard("eth1", Some(&device), false));
    }
    let capture = scene.start(TcMode::Clsact).await;
    let _pod = capture.enroll(&scene.web, None).await.unwrap();
    capture.unenroll(&scene.web.key).await;
    assert_eq!(filters(&device), 0);

    // And with everything else.
    let _pod = capture.enroll(&scene.web, None).await.unwrap();
    assert_eq!(filters(&device), 1);
    drop(capture);
    let report = cleanup(&scene.lab.pins, &[], true).await.unwrap();
    assert_eq!(report.filters, 5, "{report:?}");
    assert_eq!(filters(&device), 0);
}

/// What another build has pinned goes, but for the guard of an interface that has left the pod:
/// nobody finds that one again. The pod itself, which this build does not know, is kept: this build
/// guards what the pod still has.
#[tokio::test(flavor = "multi_thread")]
async fn a_moved_interface_stays_guarded_by_another_version() {
    let scene = Scene::new().await;
    let device = plug(&scene, "eth1");
    let stays = plug(&scene, "eth2");
    let capture = scene.start(TcMode::Tcx).await;
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    let nested = scene.lab.namespace("nested");
    ip(&format!("-n {} link set eth1 netns {nested}", scene.net.pod));
    until("the agent knows that it moved", || guards(&capture, &pod).iter().any(|guard| guard.moved)).await;
    drop((pod, capture));
    let old = Layout::new(&scene.lab.pins, "0000000000000000");
    std::fs::rename(scene.lab.layout().dir(), old.dir()).unwrap();

    let capture = scene.start(TcMode::Tcx).await;
    capture.collect_garbage().await;
    assert!(!old.dir().exists());
    let hook = |device: &str| {
        let index = nix::net::if_::if_nametoindex(device).unwrap();
        links_on(index, Hook::TcxIngress).unwrap()
    };
    let kept = scene.lab.links().into_iter().find(|(name, _)| name.starts_with("tc-0-")).expect("a pin").1;
    assert_eq!(hook(&device), [kept.id]);
    // The kernel ends a link a moment after its pin.
    until("the interface that stayed is guarded by this version alone", || hook(&stays).len() == 1).await;
}
