//! Pods with real traffic: a shell in the pod dials, a listener on the pod's or the peer's side shows whether it
//! arrived in plaintext.

use std::{
    io::{self, Read},
    net::{IpAddr, SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use testbed::pace::patience;
use tokio::time::timeout;
use underpass_abi::OUTBOUND_PORT;

use super::{
    super::{EnrollError, TcMode},
    lab::{Connected, Lab, Net, PEER, PEER6, POD, ip, snapshot, tool, until},
    scene::{PORT, SOON, Scene, accept, inside},
    workload,
};
use crate::mesh::{InboundMode, MeshSettings};

#[tokio::test(flavor = "multi_thread")]
async fn an_enrolled_pod_is_captured_and_guarded_and_gets_plain_traffic_back() {
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    scene.assert_plain().await; // the positive control

    let pod = capture.enroll(&scene.web, None).await.unwrap();
    assert_eq!(capture.pods().len(), 1);
    assert_eq!((pod.id, scene.attached()), (1, 2));
    let listeners = pod.take_listeners().unwrap();
    for (host, v4) in [(PEER, true), (PEER6, false)] {
        let address: IpAddr = host.parse().unwrap();
        assert_eq!(scene.lab.connects(&scene.net.pod, true, host, PORT).await, Connected::Yes);
        let original = accept(&capture, &pod, &listeners, v4).await;
        assert_eq!(original, Some(SocketAddr::new(address, PORT)));
    }
    // A v4-mapped destination is IPv4 on the wire and to the agent.
    let mapped = format!(
        "python3 -c 'import socket; s = socket.socket(socket.AF_INET6); s.connect((\"::ffff:{PEER}\", {PORT})); print(s.getpeername())'"
    );
    let output = scene.lab.shell(&scene.net.pod, true, &mapped).await;
    assert!(String::from_utf8_lossy(&output.stdout).contains(PEER), "{output:?}");
    let original = accept(&capture, &pod, &listeners, true).await;
    assert_eq!(original, Some(SocketAddr::new(PEER.parse().unwrap(), PORT)));

    // Nobody dialled this.
    let direct = format!("exec 3<>/dev/tcp/127.0.0.1/{OUTBOUND_PORT}");
    scene.lab.shell(&scene.net.pod, false, &direct).await;
    assert_eq!(accept(&capture, &pod, &listeners, true).await, None);

    // A process the connect hooks do not see.
    assert_eq!(scene.dial(false).await, Connected::TimedOut);
    assert!(capture.counters()["guard_dropped"] > 0);
    assert_eq!(capture.counters()["captured"], 3);
    // The agent's own sockets pass, from the host's point of view like that of any process in the pod.
    let own = pod.upstream_socket(PEER.parse().unwrap()).await.unwrap();
    own.set_nonblocking(false).unwrap();
    let to: SocketAddr = format!("{PEER}:{PORT}").parse().unwrap();
    tokio::task::spawn_blocking(move || own.connect_timeout(&to.into(), *SOON)).await.unwrap().unwrap();
    assert_eq!(scene.arrived(), 1, "and nothing else arrived in plaintext");
    assert_eq!(scene.dial_from_peer().await, Connected::Yes, "PERMISSIVE");
    assert_eq!(scene.arrived(), 1);

    capture.unenroll(&scene.web.key).await;
    timeout(*SOON, pod.unenrolled()).await.unwrap();
    drop((pod, listeners));
    assert!(capture.pods().is_empty());
    scene.no_rule().await;
    scene.assert_plain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_ends_what_was_admitted_and_admits_no_more() {
    let mut scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    let pod = capture.enroll(&scene.web, None).await.unwrap();

    let (mut client, server) = plaintext_connection(&scene).await;
    scene.web.mode = InboundMode::Strict;
    let again = capture.enroll(&scene.web, None).await.unwrap();
    assert!(Arc::ptr_eq(&pod, &again), "an update, not another enrolment");
    let read = tokio::task::spawn_blocking(move || {
        client.set_read_timeout(Some(*SOON))?;
        client.read(&mut [0; 1])
    });
    assert_eq!(read.await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    drop(server);
    assert_eq!(scene.dial_from_peer().await, Connected::Refused);
    assert!(capture.counters()["inbound_strict_dropped"] > 0);

    scene.web.mode = InboundMode::Permissive;
    capture.enroll(&scene.web, None).await.unwrap();
    assert_eq!(scene.dial_from_peer().await, Connected::Yes);
}

/// A connection from the peer that the pod admitted.
async fn plaintext_connection(scene: &Scene) -> (std::net::TcpStream, std::net::TcpStream) {
    let address: SocketAddr = format!("{POD}:{PORT}").parse().unwrap();
    let client = inside(&scene.net.peer, move || std::net::TcpStream::connect_timeout(&address, *SOON)).await.unwrap();
    let mut accepted = None;
    until("the connection is accepted", || {
        accepted = scene.listeners[2].accept().ok();
        accepted.is_some()
    })
    .await;
    (client, accepted.unwrap().0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mesh_wide_exclusion_that_goes_away_ends_plaintext_too() {
    let mut scene = Scene::new().await;
    scene.web.mode = InboundMode::Strict;
    let capture = scene.start(TcMode::Auto).await;
    let mut settings = MeshSettings::default();
    settings.exclude.inbound_ports = vec![PORT];
    capture.apply(&snapshot(settings, vec![scene.web.clone()])).unwrap();
    let _pod = capture.enroll(&scene.web, None).await.unwrap();
    let (mut client, _server) = plaintext_connection(&scene).await;
    capture.apply(&snapshot(MeshSettings::default(), vec![scene.web.clone()])).unwrap();
    let read = tokio::task::spawn_blocking(move || {
        client.set_read_timeout(Some(*SOON))?;
        client.read(&mut [0; 1])
    });
    assert_eq!(read.await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread")]
async fn capture_all_reaches_pods_that_are_enrolled_already() {
    let scene = Scene::new().await;
    let capture = scene.lab.start().await;
    let only_web = |capture_all| {
        let settings = MeshSettings { capture_all, ..MeshSettings::default() };
        capture.apply(&snapshot(settings, vec![scene.web.clone()])).unwrap();
    };
    only_web(false);
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    let listeners = pod.take_listeners().unwrap();
    assert_eq!((scene.dial(true).await, scene.arrived()), (Connected::Yes, 1), "the peer is not in the mesh");
    only_web(true);
    assert_eq!((scene.dial(true).await, scene.arrived()), (Connected::Yes, 0));
    assert!(accept(&capture, &pod, &listeners, true).await.is_some());
    only_web(false);
    assert_eq!((scene.dial(true).await, scene.arrived()), (Connected::Yes, 1));
}

async fn second_interface(tc: TcMode) {
    let scene = Scene::new().await;
    let capture = scene.start(tc).await;
    let _pod = capture.enroll(&scene.web, None).await.unwrap();
    let Net { pod, peer } = &scene.net;
    ip(&format!("link add eth1 netns {pod} type veth peer name eth1 netns {peer}"));
    for (ns, address) in [(pod, "10.8.0.1"), (peer, "10.8.0.2")] {
        ip(&format!("-n {ns} addr add {address}/24 dev eth1"));
        ip(&format!("-n {ns} link set eth1 up"));
    }
    ip(&format!("-n {pod} route add {PEER}/32 via 10.8.0.2 dev eth1"));
    if tc == TcMode::Clsact {
        let show = || tool("tc", &format!("-n {pod} filter show dev eth1 egress"));
        until("the new interface is guarded", || show().contains("up_guard")).await;
    } else {
        until("the new interface is guarded", || scene.tc_links() == 4).await;
    }
    assert_eq!(scene.dial(false).await, Connected::TimedOut);
    assert_eq!(scene.arrived(), 0);

    ip(&format!("-n {pod} link del eth1"));
    if tc != TcMode::Clsact {
        until("the pins are gone with the interface", || scene.tc_links() == 2).await;
    }
    assert_eq!(scene.dial(false).await, Connected::TimedOut, "the first interface is still guarded");
    capture.unenroll(&scene.web.key).await;
    assert_eq!(scene.tc_links(), 0);
    assert_eq!(scene.filters(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interface_that_comes_later_is_guarded() {
    second_interface(TcMode::Tcx).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interface_that_comes_later_is_guarded_with_clsact() {
    second_interface(TcMode::Clsact).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_is_enrolled_once() {
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    let _pod = capture.enroll(&scene.web, None).await.unwrap();
    let twin = workload("twin", "10.7.0.3", Some(&scene.net.path()));
    let error = capture.enroll(&twin, None).await.unwrap_err();
    assert!(matches!(&error, EnrollError::Duplicate { other, .. } if other == "default/web"), "{error}");
    assert_eq!((capture.pods().len(), scene.attached()), (1, 2));
    capture.unenroll(&twin.key).await;
    assert_eq!(scene.attached(), 2, "un-enrolling who was refused touches nobody");
    capture.unenroll(&scene.web.key).await;
    capture.enroll(&twin, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_pod_is_left_as_it_was() {
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    let taken = inside(&scene.net.pod, || TcpListener::bind("0.0.0.0:15008")).await.unwrap();
    let error = capture.enroll(&scene.web, None).await.unwrap_err();
    assert!(matches!(error, EnrollError::PortTaken { port: 15008, .. }), "{error}");
    drop(taken);
    assert!(capture.pods().is_empty());
    scene.no_rule().await;
    scene.assert_plain().await;

    // And when it fails at the last step but one: the object's maps are not the agent's any more.
    let pods = scene.lab.layout().map("PODS");
    std::fs::rename(&pods, pods.with_file_name("AWAY")).unwrap();
    let error = capture.enroll(&scene.web, None).await.unwrap_err();
    assert!(error.to_string().contains("PODS"), "{error}");
    scene.no_rule().await;
    scene.assert_plain().await;
    std::fs::rename(pods.with_file_name("AWAY"), &pods).unwrap();
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    assert_eq!(pod.id, 1, "numbers of failed enrolments are free again");
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_get_numbers_of_their_own_and_give_them_back() {
    let lab = Lab::new();
    let capture = lab.start().await;
    let workloads: Vec<_> = (0..3)
        .map(|n| {
            let ns = lab.namespace(&format!("n{n}"));
            workload(&format!("w{n}"), &format!("10.7.1.{n}"), Some(&format!("/run/netns/{ns}")))
        })
        .collect();
    let enrolled = workloads.iter().map(|w| capture.enroll(w, None));
    let mut ids: Vec<_> =
        futures_util::future::try_join_all(enrolled).await.unwrap().into_iter().map(|p| p.id).collect();
    ids.sort_unstable();
    assert_eq!(ids, [1, 2, 3]);
    let second = capture.pods().into_iter().find(|p| p.id == 2).unwrap();
    capture.unenroll(&second.key).await;
    let again = workloads.iter().find(|w| w.key == second.key).unwrap();
    assert_eq!(capture.enroll(again, None).await.unwrap().id, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_identity_is_another_pod_and_nothing_gets_out_meanwhile() {
    let mut scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    let before = capture.enroll(&scene.web, None).await.unwrap();
    let links = scene.lab.links();
    // Accept loops hold the listeners and close them some time after they are told.
    let listeners = before.take_listeners().unwrap();
    let waiting = Arc::clone(&before);
    let closing = tokio::spawn(async move {
        waiting.unenrolled().await;
        drop(listeners);
    });
    scene.web.identity = "spiffe://cluster.local/ns/default/sa/other".parse().unwrap();
    let after = capture.enroll(&scene.web, None).await.unwrap();
    closing.await.unwrap();
    assert_eq!((after.id, &after.identity), (before.id, &scene.web.identity));
    assert_eq!(capture.pods().len(), 1);
    let now = scene.lab.links();
    for (name, link) in &links {
        assert_eq!(now[name].id, link.id, "{name} was never detached");
    }
    drop(before);
    let listeners = after.take_listeners().unwrap();
    assert_eq!(scene.dial(true).await, Connected::Yes);
    assert!(accept(&capture, &after, &listeners, true).await.is_some());
    assert_eq!(scene.arrived(), 0);
    assert!(scene.has_rule(), "the reply route belongs to the new pod");
}

#[tokio::test(flavor = "multi_thread")]
async fn interfaces_that_come_and_go_do_not_fail_an_enrolment() {
    /// Attaching takes less on a real processor.
    const QUIET: Duration = Duration::from_millis(20);
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    let flap = {
        let (pod, peer) = (scene.net.pod.clone(), scene.net.peer.clone());
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let task = tokio::task::spawn_blocking(move || {
            while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                ip(&format!("link add flap netns {pod} type veth peer name flap netns {peer}"));
                // Not from within the pod, where a process outside the attach point has no business.
                ip(&format!("-n {peer} link del flap"));
                // On a slow processor attaching takes long, and the interface would never be the same for that time.
                std::thread::sleep(patience(QUIET).saturating_sub(QUIET));
            }
        });
        (stop, task)
    };
    for _ in 0..10 {
        let pod = capture.enroll(&scene.web, None).await.unwrap();
        capture.unenroll(&scene.web.key).await;
        drop(pod);
    }
    flap.0.store(true, std::sync::atomic::Ordering::Relaxed);
    flap.1.await.unwrap();
    scene.no_rule().await;
    scene.assert_plain().await;
}
