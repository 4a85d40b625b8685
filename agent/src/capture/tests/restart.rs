//! Agents that come and go: what was captured is captured at every moment, or refused.

use std::{fs, net::SocketAddr, process::Stdio, sync::Arc};

use aya::maps::{HashMap, Map, MapData};
use tokio::{io::AsyncBufReadExt, time::timeout};
use underpass_abi::PodConfig;

use super::{
    super::{Capture, CaptureOptions, TcMode, loader::HOOKS, pins::Layout},
    lab::{Connected, PEER},
    scene::{PORT, SOON, Scene, accept, inside},
};

fn pods_in_the_map(scene: &Scene) -> Vec<u32> {
    let data = MapData::from_pin(scene.lab.layout().map("PODS")).unwrap();
    let map: HashMap<_, u64, PodConfig> = Map::from_map_data(data).unwrap().try_into().unwrap();
    map.iter().map(|e| e.unwrap().1.pod_id).collect()
}

/// A program in the pod that connects again and again and prints how each attempt ended.
fn restless(
    scene: &Scene,
) -> (tokio::process::Child, tokio::io::Lines<tokio::io::BufReader<tokio::process::ChildStdout>>) {
    let script = format!(
        "import socket\nwhile True:\n s = socket.socket()\n s.settimeout(2)\n try:\n  s.connect(('{PEER}', {PORT})); print('connected', flush=True)\n except ConnectionRefusedError: print('refused', flush=True)\n except Exception as e: print(repr(e), flush=True)\n s.close()\n"
    );
    let mut child = tokio::process::Command::new("bash")
        .args(["-c", "echo $$ > $0/pods/cgroup.procs && exec ip netns exec $1 python3 -c \"$2\""])
        .args([scene.lab.cgroup.to_str().unwrap(), &scene.net.pod, &script])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let lines = tokio::io::BufReader::new(child.stdout.take().unwrap()).lines();
    (child, lines)
}

async fn restart_under_load(tc: TcMode) {
    let scene = Scene::new().await;
    let capture = scene.start(tc).await;
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    let (mut child, mut lines) = restless(&scene);
    let mut seen = std::collections::BTreeMap::<String, u32>::new();
    let mut attempts = async |seen: &mut std::collections::BTreeMap<String, u32>, outcome: &str| {
        let wait = async {
            // More than one attempt was under way when things changed.
            let goal = seen.get(outcome).copied().unwrap_or_default() + 20;
            while seen.get(outcome).copied().unwrap_or_default() < goal {
                *seen.entry(lines.next_line().await.unwrap().unwrap()).or_default() += 1;
            }
        };
        timeout(*SOON, wait).await.unwrap_or_else(|_| panic!("not {outcome}"));
    };
    attempts(&mut seen, "connected").await;
    let (mut pod, mut capture) = (pod, capture);
    for _ in 0..3 {
        drop((pod, capture));
        attempts(&mut seen, "refused").await;
        capture = scene.start(tc).await;
        attempts(&mut seen, "refused").await;
        pod = capture.enroll(&scene.web, None).await.unwrap();
        assert_eq!(pod.id, 1, "the number stays");
        attempts(&mut seen, "connected").await;
    }
    child.kill().await.unwrap();
    assert_eq!(scene.arrived(), 0, "in plaintext, of {seen:?}");
    assert_eq!(scene.dial(false).await, Connected::TimedOut, "guarded");
    let listeners = pod.take_listeners().unwrap();
    assert_eq!(scene.lab.connects(&scene.net.pod, true, PEER, PORT).await, Connected::Yes);
    let original: Option<SocketAddr> = accept(&capture, &pod, &listeners, true).await;
    // The backlog holds connections whose program was killed; those have no entry any more.
    assert!(original.is_none_or(|o| o == format!("{PEER}:{PORT}").parse().unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_gets_out_while_agents_restart() {
    restart_under_load(TcMode::Tcx).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_gets_out_while_agents_restart_with_clsact() {
    restart_under_load(TcMode::Clsact).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_links_are_adopted() {
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Tcx).await;
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    let before = scene.lab.links();
    assert_eq!(before.len(), HOOKS.len() + 2);
    drop((pod, capture));
    let capture = scene.start(TcMode::Tcx).await;
    let _pod = capture.enroll(&scene.web, None).await.unwrap();
    let after = scene.lab.links();
    assert!(before.keys().eq(after.keys()));
    for (name, before) in before {
        assert_eq!((before.id, before.target), (after[&name].id, after[&name].target), "{name}");
        assert_ne!(before.program_id, after[&name].program_id, "{name}");
    }
    capture.collect_garbage().await;
    assert_eq!(scene.lab.links(), after, "enrolled pods are no garbage");
}

#[tokio::test(flavor = "multi_thread")]
async fn tcx_and_clsact_replace_each_other() {
    let scene = Scene::new().await;
    for (tc, links, filters) in [(TcMode::Tcx, 2, 0), (TcMode::Clsact, 0, 2), (TcMode::Tcx, 2, 0)] {
        let capture = scene.start(tc).await;
        let _pod = capture.enroll(&scene.web, None).await.unwrap();
        assert_eq!((scene.tc_links(), scene.filters()), (links, filters), "{tc:?}");
        assert_eq!(scene.dial(false).await, Connected::TimedOut);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pins_of_interfaces_that_went_away_unseen_are_removed() {
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Tcx).await;
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    drop((pod, capture));
    super::lab::ip(&format!("-n {} link del eth0", scene.net.pod));
    let capture = scene.start(TcMode::Tcx).await;
    let _pod = capture.enroll(&scene.web, None).await.unwrap();
    assert_eq!(scene.tc_links(), 2);
    capture.collect_garbage().await;
    assert_eq!(scene.tc_links(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_captured_pod_that_cannot_be_enrolled_again_stays_captured() {
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    drop(capture.enroll(&scene.web, None).await.unwrap());
    drop(capture);
    // While no agent was there, an application took a port.
    let taken = inside(&scene.net.pod, || std::net::TcpListener::bind("0.0.0.0:15008")).await.unwrap();
    let capture = scene.start(TcMode::Auto).await;
    capture.enroll(&scene.web, None).await.unwrap_err();
    capture.collect_garbage().await;
    assert_eq!(pods_in_the_map(&scene), [1]);
    assert_eq!(scene.dial(true).await, Connected::Refused);
    assert_eq!(scene.dial(false).await, Connected::TimedOut);
    assert_eq!(scene.arrived(), 0);

    drop(taken);
    drop(capture.enroll(&scene.web, None).await.unwrap());
    capture.unenroll(&scene.web.key).await;
    scene.no_rule().await;
    scene.assert_plain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stays_captured_is_released_by_unenrolling() {
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    drop(capture.enroll(&scene.web, None).await.unwrap());
    drop(capture);
    let capture = scene.start(TcMode::Auto).await;
    let _taken = inside(&scene.net.pod, || std::net::TcpListener::bind("0.0.0.0:15008")).await.unwrap();
    capture.enroll(&scene.web, None).await.unwrap_err();
    capture.unenroll(&scene.web.key).await;
    assert!(pods_in_the_map(&scene).is_empty());
    scene.no_rule().await;
    scene.assert_plain().await;
}

/// Makes what is pinned look like another build's.
fn age(scene: &Scene) -> Layout {
    let old = Layout::new(&scene.lab.pins, "0000000000000000");
    fs::rename(scene.lab.layout().dir(), old.dir()).unwrap();
    old
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_version_captures_until_the_new_one_does() {
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    drop((pod, capture));
    let old = age(&scene);

    let capture = scene.start(TcMode::Auto).await;
    assert_eq!(scene.dial(true).await, Connected::Refused, "the old hooks");
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    let listeners = pod.take_listeners().unwrap();
    // Both versions' hooks run. The old ones come first and rewrite; their maps are not this agent's, which finds no
    // entry and resets.
    assert_eq!(scene.dial(true).await, Connected::Yes);
    assert_eq!(accept(&capture, &pod, &listeners, true).await, None);
    assert_eq!(scene.dial(false).await, Connected::TimedOut);
    capture.collect_garbage().await;
    assert!(!old.dir().exists());
    assert_eq!(scene.dial(true).await, Connected::Yes);
    assert!(accept(&capture, &pod, &listeners, true).await.is_some());
    assert_eq!(scene.arrived(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_stays_captured_when_the_attach_point_moves() {
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    drop(capture.enroll(&scene.web, None).await.unwrap());
    drop(capture);
    let options = CaptureOptions { cgroup: scene.lab.cgroup.join("pods"), ..scene.lab.options() };
    let capture: Arc<Capture> = Capture::start(options).await.unwrap();
    assert_eq!(scene.dial(true).await, Connected::Refused);
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    let listeners = pod.take_listeners().unwrap();
    assert_eq!(scene.dial(true).await, Connected::Yes);
    assert!(accept(&capture, &pod, &listeners, true).await.is_some());
    assert_eq!(scene.arrived(), 0);
}
