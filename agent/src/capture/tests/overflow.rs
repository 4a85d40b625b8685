//! Maps that are too small, pods that want too much, and counts that are wrong.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use underpass_abi::{POD_CAPTURE_ALL, POD_OWN_RULES_ONLY, POD_STRICT, capacity};

use super::{
    super::{Capture, CaptureOptions, Pod, TcMode},
    lab::{Connected, Lab, PEER, snapshot, until},
    scene::{PORT, Scene, accept},
    workload,
};
use crate::mesh::{Exclusions, MeshSettings, Workload};

fn flags(capture: &Capture, pod: &Pod) -> u32 {
    capture.inner.maps.tables().pods()[&pod.netns_cookie].flags
}

/// How many connections of a pod wait, by the count.
fn waiting(capture: &Capture) -> (u64, Option<(u32, u64)>) {
    capture.inner.maps.flows.fullest()
}

#[tokio::test(flavor = "multi_thread")]
async fn more_addresses_than_fit_capture_everything_until_they_fit() {
    let scene = Scene::new().await;
    let capture = Capture::start(CaptureOptions { mesh_entries: 2, ..scene.lab.options() }).await.unwrap();
    let few = || vec![scene.web.clone(), workload("peer", "192.0.2.1", None)];
    let many = || [few(), vec![workload("late", PEER, None)]].concat();
    capture.apply(&snapshot(MeshSettings::default(), few())).unwrap();
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    let listeners = pod.take_listeners().unwrap();
    assert_eq!((flags(&capture, &pod) & POD_CAPTURE_ALL, capture.problems()), (0, vec![]));

    // The address that does not fit is captured all the same, and so is that of a pod that comes now.
    capture.apply(&snapshot(MeshSettings::default(), many())).unwrap();
    assert_eq!(flags(&capture, &pod) & POD_CAPTURE_ALL, POD_CAPTURE_ALL);
    let problems = capture.problems();
    assert!(matches!(&problems[..], [one] if one.contains("--mesh-entries")), "{problems:?}");
    assert_eq!(scene.dial(true).await, Connected::Yes);
    assert_eq!(accept(&capture, &pod, &listeners, true).await, Some(SocketAddr::new(PEER.parse().unwrap(), PORT)));
    assert_eq!(scene.dial(false).await, Connected::TimedOut, "the guard holds, too");
    assert_eq!(scene.arrived(), 0);
    let late = scene.lab.namespace("late");
    let late = workload("new", "192.0.2.9", Some(&format!("/run/netns/{late}")));
    let late = capture.enroll(&late, None).await.unwrap();
    assert_eq!(flags(&capture, &late) & POD_CAPTURE_ALL, POD_CAPTURE_ALL, "pods come all the same");

    capture.apply(&snapshot(MeshSettings::default(), few())).unwrap();
    assert_eq!((flags(&capture, &pod) & POD_CAPTURE_ALL, capture.problems()), (0, vec![]));
    assert_eq!(flags(&capture, &late) & POD_CAPTURE_ALL, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_with_too_many_rules_is_strict_and_the_next_pod_has_all_of_its_own() {
    let lab = Lab::new();
    let capture = lab.start().await;
    let pod = |name: &str, ports: u16| {
        let net = lab.pod(name);
        let mut workload = workload(name, "192.0.2.1", Some(&net.path()));
        let local = workload.local.as_mut().unwrap();
        local.exclude = Exclusions { inbound_ports: (20_000..20_000 + ports).collect(), ..Exclusions::default() };
        workload
    };
    let greedy = pod("greedy", 40_000);
    capture.apply(&snapshot(MeshSettings::default(), vec![greedy.clone()])).unwrap();
    let enrolled = capture.enroll(&greedy, None).await.unwrap();
    assert_eq!(flags(&capture, &enrolled), POD_STRICT | POD_OWN_RULES_ONLY);
    let rules = |pod: &Pod| capture.inner.maps.tables().rules(pod.id).ports.len();
    assert_eq!(rules(&enrolled), capacity::RULES_PER_POD_MOST);
    let problems = capture.problems();
    assert!(
        matches!(&problems[..], [one] if one.contains("greedy") && one.contains("40000 port rules")),
        "{problems:?}"
    );
    assert_eq!(capture.shares()[1].fullest, Some((enrolled.id, capacity::RULES_PER_POD_MOST as u64)));

    let modest = capture.enroll(&pod("modest", 3), None).await.unwrap();
    assert_eq!((flags(&capture, &modest), rules(&modest)), (0, 3));

    // Fewer rules are a change like any other, and the pod is what it asks to be.
    let mut fewer = greedy.clone();
    fewer.local.as_mut().unwrap().exclude.inbound_ports.truncate(3);
    let enrolled = capture.enroll(&fewer, None).await.unwrap();
    assert_eq!((flags(&capture, &enrolled), rules(&enrolled), capture.problems()), (0, 3, vec![]));
}

/// Opens so many connections, which nobody accepts, prints how many were made and what the next attempt said, and holds them
/// for some seconds. They end with a reset.
fn pile_up(connections: usize, seconds: u32) -> String {
    let script = r#"
import socket, struct, time
kept, why = [], "nothing"
for n in range(COUNT):
    s = socket.socket()
    s.setblocking(False)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    try:
        s.connect(("HOST", PORT))
    except BlockingIOError:
        pass
    except OSError as error:
        why = error.strerror
        break
    kept.append(s)
print(len(kept), why, sep=";", flush=True)
time.sleep(SECONDS)
"#;
    let script = script.replace("COUNT", &connections.to_string()).replace("SECONDS", &seconds.to_string());
    format!("ulimit -n 65536; exec python3 -c '{}'", script.replace("HOST", PEER).replace("PORT", &PORT.to_string()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_lets_connections_pile_up_is_refused_and_nobody_else_is() {
    let scene = Arc::new(Scene::new().await);
    let capture = scene.start(TcMode::Auto).await;
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    let net = scene.lab.pod("other");
    let second = capture.enroll(&workload("other", "192.0.2.7", Some(&net.path())), None).await.unwrap();

    let output = scene.lab.shell(&scene.net.pod, true, &pile_up(capacity::FLOWS, 0)).await;
    let output = String::from_utf8_lossy(&output.stdout).into_owned();
    // The more entries there are, the smaller is the share: a sixteenth of what is left is a seventeenth of all.
    assert_eq!(output.trim(), format!("{};Operation not permitted", capacity::FLOWS / 17));
    assert_eq!(capture.counters()["refused_flows_share"], 1);
    // The process has ended and its connections were reset.
    until("abandoned entries are gone", || waiting(&capture) == (0, None)).await;

    // While a pod has its share, another one connects and its connection is known.
    let holder = tokio::spawn({
        let scene = Arc::clone(&scene);
        async move { scene.lab.shell(&scene.net.pod, true, &pile_up(capacity::FLOWS, 120)).await }
    });
    until("the pod has its share", || waiting(&capture).0 == capacity::FLOWS as u64 / 17).await;
    let listeners = second.take_listeners().unwrap();
    assert_eq!(scene.lab.connects(&net.pod, true, PEER, PORT).await, Connected::Yes);
    assert_eq!(accept(&capture, &second, &listeners, true).await, Some(SocketAddr::new(PEER.parse().unwrap(), PORT)));
    let refused = scene.lab.shell(&scene.net.pod, true, &pile_up(1, 0)).await;
    assert_eq!(String::from_utf8_lossy(&refused.stdout).trim(), "0;Operation not permitted");
    assert_eq!(waiting(&capture).1.map(|(id, _)| id), Some(pod.id));

    // Whatever is left of a pod goes with it, while its process still holds the connections.
    capture.unenroll(&scene.web.key).await;
    until("nothing waits", || waiting(&capture) == (0, None)).await;
    holder.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn counts_follow_what_is_accepted_and_a_wrong_one_is_corrected() {
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    let listeners = pod.take_listeners().unwrap();
    let dial = format!("exec 3<>/dev/tcp/{PEER}/{PORT}; echo x >&3; sleep 5");
    let dialling = tokio::spawn({
        let (name, lab) = (scene.net.pod.clone(), scene.lab.cgroup.clone());
        async move {
            let enter =
                format!("echo $$ > {}/pods/cgroup.procs && exec ip netns exec {name} bash -c \"$0\"", lab.display());
            tokio::process::Command::new("bash").args(["-c", &enter, &dial]).kill_on_drop(true).output().await
        }
    });
    until("a connection waits", || waiting(&capture) == (1, Some((pod.id, 1)))).await;
    accept(&capture, &pod, &listeners, true).await;
    assert_eq!(waiting(&capture), (0, None));
    dialling.abort();

    // An agent that was killed between an entry and its count has left this.
    capture.inner.maps.flows.miscount(pod.id, 3);
    assert_eq!(waiting(&capture).1, Some((pod.id, 3)));
    drop((capture, listeners, pod));
    let capture = scene.lab.start().await;
    assert_eq!(waiting(&capture), (0, None));
}

/// As many addresses as the largest clusters have: 150,000 pods with an IPv4 and an IPv6 address each.
#[tokio::test(flavor = "multi_thread")]
async fn the_addresses_of_the_largest_clusters_fit() {
    const PODS: u32 = 150_000;
    let lab = Lab::new();
    let capture = lab.start().await;
    let pods: Vec<Workload> = (0..PODS)
        .map(|n| {
            let mut pod = workload(&format!("w{n}"), &Ipv4Addr::from(0x0a00_0000 + n).to_string(), None);
            pod.addresses.push(Ipv6Addr::from((0xfd00_u128 << 112) + u128::from(n)).into());
            pod
        })
        .collect();
    let before = slab();
    capture.apply(&snapshot(MeshSettings::default(), pods)).unwrap();
    let (grown, entries) = (slab() - before, capture.map_sizes().iter().find(|(name, ..)| *name == "MESH").unwrap().1);
    println!(
        "{entries} entries, {grown} KiB of kernel memory more, {} bytes each",
        grown * 1024 / i64::try_from(entries).unwrap()
    );
    assert_eq!((entries, capture.problems()), (2 * PODS as usize, vec![]));
}

/// Kernel memory in objects, in KiB.
fn slab() -> i64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Slab:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
