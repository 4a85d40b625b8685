//! The testbed itself: what tests of the agent rely on.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::Result;
use nix::mount::MsFlags;
use testbed::{Iperf, Nginx, Pod, Process, Redis, Sniffer, SnifferOptions, Stream, Testbed};

const SOON: Duration = Duration::from_secs(10);

/// A TCP connection from one pod to another says hello, in one family.
fn reaches(from: &Pod, to: &Pod, address: IpAddr) -> Result<()> {
    let listener = to.enter(|| TcpListener::bind(SocketAddr::new(address, 7000)))??;
    let dialled = from.enter(|| TcpStream::connect_timeout(&SocketAddr::new(address, 7000), SOON))?;
    let mut client = dialled.map_err(|e| anyhow::anyhow!("{} -> {address}: {e}", from.name()))?;
    let (mut server, peer) = listener.accept()?;
    assert!([IpAddr::from(from.ipv4()), from.ipv6().into()].contains(&peer.ip()), "{peer} is not {}", from.name());
    client.write_all(b"hello")?;
    drop(client);
    let mut text = String::new();
    server.read_to_string(&mut text)?;
    assert_eq!(text, "hello");
    Ok(())
}

#[test]
fn pods_reach_each_other_in_both_families() -> Result<()> {
    let testbed = Testbed::new("topo")?;
    let (one, two) = (testbed.node("a").pod("one")?, testbed.node("a").pod("two")?);
    let far = testbed.node("b").pod("far")?;
    let nested = one.nested("inner")?;
    for (from, to) in [(&one, &two), (&one, &far), (&far, &two), (&one, &one), (&nested, &far), (&far, &nested)] {
        reaches(from, to, to.ipv4().into())?;
        reaches(from, to, to.ipv6().into())?;
    }
    Ok(())
}

#[test]
fn a_second_interface_reaches_the_other_nodes_pods_directly() -> Result<()> {
    let testbed = Testbed::new("second")?;
    let pod = testbed.node("a").pod("pod")?;
    let far = testbed.node("b").pod("far")?;
    let (second, _) = pod.add_interface("eth1", testbed.node("b"))?;
    let sniffer = Sniffer::start(testbed.node("a").namespace(), &SnifferOptions::default())?;
    let listener = far.enter(|| TcpListener::bind((far.ipv4(), 7000)))??;
    let client = pod.enter(|| TcpStream::connect((far.ipv4(), 7000)))??;
    assert_eq!(client.local_addr()?.ip(), IpAddr::from(second));
    drop((listener, client));
    let seen = sniffer.stop()?;
    assert_eq!(seen.opened_ports.get(&7000), None, "the connection went over node a: {seen:?}");
    Ok(())
}

#[test]
fn vips_lead_nowhere() -> Result<()> {
    let testbed = Testbed::new("vip")?;
    let pod = testbed.node("a").pod("pod")?;
    for vip in testbed::addresses::vips(1) {
        let result = pod.enter(|| TcpStream::connect_timeout(&SocketAddr::new(vip, 80), SOON))?;
        let error = result.expect_err("nothing answers a VIP");
        assert_ne!(error.kind(), std::io::ErrorKind::TimedOut, "refused at once, not after a timeout");
    }
    Ok(())
}

#[test]
fn programs_are_in_the_pods_namespace_and_cgroup() -> Result<()> {
    let testbed = Testbed::new("place")?;
    let pod = testbed.node("a").pod("pod")?;
    let expected = format!("0::/underpass-{}/a/pods/pod", testbed.id());
    let cgroup = pod.check(&["cat", "/proc/self/cgroup"])?;
    assert!(cgroup.lines().any(|line| line.ends_with(&expected[3..])), "{cgroup}");
    let namespace = pod.check(&["readlink", "/proc/self/ns/net"])?;
    let inode = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(pod.namespace().path())?);
    assert_eq!(namespace.trim(), format!("net:[{inode}]"));

    let outside =
        Process::spawn(pod.command_outside_cgroup("cat").arg("/proc/self/cgroup"))?.output(SOON)?.success()?;
    assert!(outside.contains(&format!("/underpass-{}/a/node", testbed.id())), "{outside}");
    Ok(())
}

#[test]
fn the_sniffer_sees_plaintext_and_nothing_else() -> Result<()> {
    const MARKER: &str = "the-quick-brown-marker";
    let testbed = Testbed::new("sniff")?;
    let (client, server) = (testbed.node("a").pod("client")?, testbed.node("b").pod("web")?);
    let nginx = Nginx::start(&server, 8080, &format!("{MARKER}\n"))?;
    let url = format!("http://{}:8080/", server.ipv4());

    let options = SnifferOptions::markers([MARKER]).on("wire");
    let sniffer = Sniffer::start(testbed.node("a").namespace(), &options)?;
    assert_eq!(client.check(&["curl", "-sS", &url])?, format!("{MARKER}\n"));
    let seen = sniffer.stop()?;
    assert_eq!(seen.marker_hits, 1, "once on the wire: {seen:?}");
    assert_eq!(seen.first_marker_hit.as_deref().map(|s| s.starts_with("tcp 8080 ->")), Some(true));
    assert!(seen.plaintext_payload >= 2, "a request and a response: {seen:?}");
    assert_eq!(seen.plaintext_ports.get(&8080), Some(&seen.plaintext_payload));
    assert_eq!(seen.opened_ports.get(&8080), Some(&1));
    assert_eq!((seen.tcp_15008_payload, seen.dropped_by_kernel), (0, 0));

    // Both the interface to the other node and the bridge.
    let sniffer = Sniffer::start(testbed.node("b").namespace(), &SnifferOptions::markers([MARKER]))?;
    client.check(&["curl", "-sS", &url])?;
    assert!(sniffer.stop()?.marker_hits >= 2);

    // Another marker is not found, and what happened before the start is not seen.
    let sniffer = Sniffer::start(testbed.node("a").namespace(), &SnifferOptions::markers(["never-sent"]))?;
    client.check(&["curl", "-sS", &url])?;
    let seen = sniffer.stop()?;
    assert_eq!(seen.marker_hits, 0);
    assert!(seen.plaintext_payload > 0);

    let log = nginx.access_log(3)?;
    assert!(log[0].starts_with(&format!("{} ", client.ipv4())), "{log:?}");
    Ok(())
}

#[test]
fn the_sniffer_keeps_up_with_bulk() -> Result<()> {
    const BYTES: u64 = 100_000_000;
    let testbed = Testbed::new("bulk")?;
    let (client, server) = (testbed.node("a").pod("client")?, testbed.node("b").pod("web")?);
    let nginx = Nginx::start(&server, 8080, "")?;
    std::fs::File::create(nginx.root().join("bulk"))?.set_len(BYTES)?;
    let sniffer = Sniffer::start(testbed.node("a").namespace(), &SnifferOptions::markers(["GET /bulk"]).on("wire"))?;
    client.check(&["curl", "-sS", "-o", "/dev/null", &format!("http://[{}]:8080/bulk", server.ipv6())])?;
    let seen = sniffer.stop()?;
    assert_eq!(seen.dropped_by_kernel, 0, "{seen:?}");
    assert!(seen.bytes > BYTES, "{seen:?}");
    assert_eq!(seen.marker_hits, 1);
    Ok(())
}

#[test]
fn redis_and_iperf_run_in_pods() -> Result<()> {
    let testbed = Testbed::new("servers")?;
    let (client, server) = (testbed.node("a").pod("client")?, testbed.node("b").pod("server")?);
    let _redis = Redis::start(&server, 6379)?;
    let _iperf = Iperf::start(&server, 5201)?;
    let address = server.ipv4().to_string();
    assert_eq!(client.check(&["redis-cli", "-h", &address, "SET", "key", "value"])?.trim(), "OK");
    assert_eq!(client.check(&["redis-cli", "-h", &server.ipv6().to_string(), "GET", "key"])?.trim(), "value");
    assert!(Iperf::measure(&client, &address, 5201, 1)? > 0.0);
    Ok(())
}

#[test]
fn nothing_is_left_after_a_drop() -> Result<()> {
    let testbed = Testbed::new("gone")?;
    let id = testbed.id().to_owned();
    let pod = testbed.node("a").pod("pod")?;
    // A program that nobody stops, and one that has left its parent.
    let process = pod.spawn(&["sleep", "1000"])?;
    let shell = pod.spawn(&["sh", "-c", "sleep 2000 & echo started $!; exec sleep 3000"])?;
    let line = shell.wait_line("started", SOON)?;
    let orphan: u32 = line.trim_start_matches("started ").parse()?;
    assert!(std::path::Path::new(&format!("/proc/{orphan}")).exists());
    assert!(!Testbed::leftovers(&id)?.is_empty());
    drop(testbed);
    assert_eq!(Testbed::leftovers(&id)?, Vec::<std::path::PathBuf>::new());
    assert!(process.wait(SOON).is_ok() && shell.wait(SOON).is_ok(), "killed with the testbed");
    // Whoever adopted it may not have reaped it yet.
    let state = std::fs::read_to_string(format!("/proc/{orphan}/stat")).unwrap_or_else(|_| ") Z".into());
    assert!(state.contains(") Z"), "{state}");
    assert!(pod.node().pod("late").is_err(), "a removed testbed makes nothing new");
    Ok(())
}

#[test]
fn a_panic_leaves_nothing() {
    let (send, receive) = std::sync::mpsc::channel();
    let result = std::thread::spawn(move || {
        let testbed = Testbed::new("panic").unwrap();
        let _pod = testbed.node("b").pod("pod").unwrap();
        send.send(testbed.id().to_owned()).unwrap();
        std::panic::resume_unwind(Box::new("as a failing assertion would"));
    })
    .join();
    assert!(result.is_err());
    assert!(Testbed::leftovers(&receive.recv().unwrap()).unwrap().is_empty());
}

#[test]
fn a_sweep_spares_the_living() -> Result<()> {
    let one = Testbed::new("alive")?;
    let two = Testbed::new("alive")?;
    assert_ne!(one.id(), two.id());
    Testbed::sweep()?;
    // Same addresses, no collision.
    for testbed in [&one, &two] {
        let (near, far) = (testbed.node("a").pod("near")?, testbed.node("b").pod("far")?);
        reaches(&near, &far, far.ipv4().into())?;
    }
    drop(one);
    assert!(!Testbed::leftovers(two.id())?.is_empty());
    Ok(())
}

#[test]
fn a_sweep_removes_what_a_killed_process_left() -> Result<()> {
    // Process 0 is never alive in /proc.
    let cgroup = std::fs::read_to_string("/proc/mounts")?;
    let mount = cgroup.lines().find(|l| l.split(' ').nth(2) == Some("cgroup2")).and_then(|l| l.split(' ').nth(1));
    let id = format!("dead-0-{}", std::process::id());
    let directory = std::path::Path::new(mount.expect("cgroup2 is mounted")).join(format!("underpass-{id}/a/pods/x"));
    std::fs::create_dir_all(&directory)?;
    let added = std::process::Command::new("ip").args(["netns", "add", &format!("up-{id}-a")]).status()?;
    assert!(added.success());
    // A killed process unmounts nothing either.
    let mounted = std::env::temp_dir().join(format!("underpass-{id}/run"));
    std::fs::create_dir_all(&mounted)?;
    nix::mount::mount(Some("tmpfs"), &mounted, Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
    std::fs::write(mounted.join("file"), "")?;
    assert_eq!(Testbed::leftovers(&id)?.len(), 3);
    Testbed::sweep()?;
    assert!(Testbed::leftovers(&id)?.is_empty());
    Ok(())
}

#[test]
fn processes_report_output_and_ends() -> Result<()> {
    let testbed = Testbed::new("proc")?;
    let pod = testbed.node("a").pod("pod")?;
    let mut cat = pod.spawn(&["cat"])?;
    cat.write_stdin(b"{\"answer\": 42}\n")?;
    assert_eq!(cat.wait_json("answer", SOON)?["answer"], 42);
    assert_eq!(cat.text(Stream::Stderr), "");
    let missing = cat.wait_line("never", Duration::from_millis(50)).unwrap_err();
    assert!(format!("{missing:#}").contains("not within"), "{missing:#}");
    cat.close_stdin();
    assert!(cat.wait(SOON)?.success());
    assert!(cat.wait_line("never", SOON).is_err(), "ended, without waiting for the time to run out");
    let failed = pod.check(&["sh", "-c", "echo reason >&2; exit 3"]).unwrap_err();
    assert!(format!("{failed:#}").contains("reason"), "{failed:#}");
    Ok(())
}
