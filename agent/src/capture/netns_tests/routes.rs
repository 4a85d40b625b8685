//! Tests of the reply route: what is in the kernel, and that connections from foreign addresses work with it.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use socket2::Domain;

use super::*;
use crate::capture::{
    netns::tests::{PATIENCE, TestNamespace, counting_mark, pod_and_client},
    sockets,
};

/// Rules and routes of the agent, both families, as text.
fn installed(namespace: &TestNamespace) -> Vec<String> {
    let mut lines = Vec::new();
    for family in ["-4", "-6"] {
        lines.push(namespace.ip(&[family, "rule", "show"]));
        // An unknown table is an error for `ip`, not an empty list.
        lines.push(namespace.ip(&[family, "route", "show", "table", "all"]));
    }
    let ours = |line: &&str| line.contains("table 100") || line.contains("lookup 100") || line.contains("fwmark");
    lines.iter().flat_map(|text| text.lines().filter(ours)).map(str::to_owned).collect()
}

async fn sysctls(netns: &Netns) -> Vec<String> {
    netns
        .run(|| {
            let names = SYSCTLS_V4.iter().chain(&SYSCTLS_V6);
            names.map(|name| fs::read_to_string(Path::new("/proc/sys/net").join(name)).expect("sysctl")).collect()
        })
        .await
}

#[tokio::test]
async fn installing_and_removing_leaves_nothing_behind() {
    let namespace = TestNamespace::new();
    let netns = namespace.open();
    namespace.sysctl("net.ipv4.fwmark_reflect", "1");
    let before = sysctls(&netns).await;
    assert_eq!(before, ["0\n", "1\n", "0\n"]);
    assert_eq!(installed(&namespace), Vec::<String>::new());

    install(&netns).await.expect("install");
    let lines = installed(&namespace);
    assert_eq!(lines.len(), 4, "{lines:?}");
    assert!(lines.iter().any(|line| line.starts_with("100:") && line.contains("fwmark 0x539 lookup 100")), "{lines:?}");
    assert!(lines.iter().any(|line| line.starts_with("local default dev lo table 100")), "{lines:?}");
    assert_eq!(sysctls(&netns).await, ["1\n", "1\n", "1\n"]);

    remove(&netns).await;
    assert_eq!(installed(&namespace), Vec::<String>::new());
    assert_eq!(sysctls(&netns).await, before);
    remove(&netns).await;
    assert_eq!(sysctls(&netns).await, before);
}

#[tokio::test]
async fn the_last_user_removes() {
    let namespace = TestNamespace::new();
    // As after a second enrolment while connections of the first live: another descriptor of the same namespace.
    let (first, second) = (namespace.open(), namespace.open());
    install(&first).await.expect("install");
    install(&second).await.expect("install");
    assert_eq!(installed(&namespace).len(), 4);
    remove(&first).await;
    assert_eq!(installed(&namespace).len(), 4);
    remove(&second).await;
    assert_eq!(installed(&namespace).len(), 0);
}

#[tokio::test]
async fn what_an_earlier_agent_left_is_adopted_and_removed() {
    let namespace = TestNamespace::new();
    let netns = namespace.open();
    let forget = |netns: &Netns| INSTALLED.lock().expect("lock").remove(&netns.cookie()).expect("installed");
    install(&netns).await.expect("install");
    forget(&netns);
    install(&netns).await.expect("install over it");
    assert_eq!(installed(&namespace).len(), 4);
    remove(&netns).await;
    assert_eq!((installed(&namespace).len(), sysctls(&netns).await), (0, vec!["0\n".to_owned(); 3]));

    install(&netns).await.expect("install");
    forget(&netns);
    remove(&netns).await;
    assert_eq!((installed(&namespace).len(), sysctls(&netns).await), (0, vec!["0\n".to_owned(); 3]));
}

#[tokio::test]
async fn somebody_elses_entries_in_the_table_stay() {
    let namespace = TestNamespace::new();
    let netns = namespace.open();
    namespace.ip(&["route", "add", "local", "0.0.0.0/0", "dev", "lo", "table", "100"]);
    namespace.ip(&["rule", "add", "fwmark", "0x111/0xfff", "lookup", "100"]);
    let before = installed(&namespace);
    assert_eq!(before.len(), 2);
    install(&netns).await.expect("install");
    remove(&netns).await;
    assert_eq!(installed(&namespace), before);
}

#[tokio::test]
async fn without_ipv6_there_is_an_ipv4_route() {
    let namespace = TestNamespace::new();
    namespace.sysctl("net.ipv6.conf.all.disable_ipv6", "1");
    let netns = namespace.open();
    install(&netns).await.expect("install");
    assert_eq!(installed(&namespace).len(), 2);
    remove(&netns).await;
    assert_eq!(installed(&namespace).len(), 0);
}

/// Connects as the agent would, from `source` to `to`, inside the namespace.
async fn connect_as(netns: &Netns, source: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let (mark, _) = counting_mark();
    netns
        .run(move || {
            let socket = sockets::application(Domain::for_address(to), &*mark)?;
            sockets::bind_to_client(&socket, source)?;
            socket.set_nonblocking(false)?;
            // Long enough for a loaded machine, shorter than a lost reset would take.
            socket.connect_timeout(&to.into(), *PATIENCE)?;
            Ok(socket.into())
        })
        .await
}

#[tokio::test]
async fn an_application_sees_the_client_and_answers_reach_the_agent() {
    let (pod, _client) = pod_and_client();
    // The strictest reverse path check there is.
    pod.sysctl("net.ipv4.conf.all.rp_filter", "1");
    let netns = pod.open();
    install(&netns).await.expect("install");
    for (listen, to, source) in [
        ("0.0.0.0", "10.77.0.2", "192.0.2.7"),
        ("10.77.0.2", "10.77.0.2", "10.77.0.1"),
        ("127.0.0.1", "127.0.0.1", "192.0.2.7"),
        ("::", "10.77.0.2", "192.0.2.7"),
        ("::", "fd77::2", "2001:db8::7"),
        ("fd77::2", "fd77::2", "fd77::1"),
        ("::1", "::1", "2001:db8::7"),
        // A pod that dials a service and is chosen itself.
        ("0.0.0.0", "10.77.0.2", "10.77.0.2"),
    ] {
        let case = format!("{source} to {to}, application on {listen}");
        let source: IpAddr = source.parse().expect("address");
        let address = SocketAddr::new(listen.parse().expect("address"), 0);
        let application = netns.run(move || TcpListener::bind(address)).await.expect("listen");
        let port = application.local_addr().expect("address").port();
        let to = SocketAddr::new(to.parse().expect("address"), port);
        let mut agent = connect_as(&netns, source, to).await.unwrap_or_else(|error| panic!("{case}: {error}"));
        let (mut accepted, peer) = application.accept().expect("accept");
        for stream in [&agent, &accepted] {
            stream.set_read_timeout(Some(*PATIENCE)).expect("timeout");
        }
        assert_eq!(peer.ip().to_canonical(), source, "{case}");
        assert_eq!(accepted.peer_addr().expect("peer").ip().to_canonical(), source, "{case}");
        let mut bytes = [0; 4];
        accepted.write_all(b"pong").expect("write");
        agent.read_exact(&mut bytes).unwrap_or_else(|error| panic!("{case}: {error}"));
        agent.write_all(b"ping").expect("write");
        accepted.read_exact(&mut bytes).unwrap_or_else(|error| panic!("{case}: {error}"));
        // A killed agent: the application sees a reset, not an end.
        drop(agent);
        let error = accepted.read(&mut bytes).expect_err("a reset");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{case}");
    }
    remove(&netns).await;
}

#[tokio::test]
async fn a_closed_port_refuses_at_once() {
    let (pod, _client) = pod_and_client();
    let netns = pod.open();
    install(&netns).await.expect("install");
    for (to, source) in [("10.77.0.2:81", "192.0.2.7"), ("[fd77::2]:81", "2001:db8::7")] {
        let (to, source) = (to.parse().expect("address"), source.parse().expect("address"));
        let error = connect_as(&netns, source, to).await.expect_err("nobody listens");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{to}");
    }
    remove(&netns).await;
}

#[tokio::test]
async fn without_the_route_answers_do_not_come_back() {
    // The positive control of the tests above.
    let (pod, _client) = pod_and_client();
    let netns = pod.open();
    let application = netns.run(|| TcpListener::bind("0.0.0.0:0")).await.expect("listen");
    let to = SocketAddr::new([10, 77, 0, 2].into(), application.local_addr().expect("address").port());
    let (mark, _) = counting_mark();
    let error = netns
        .run(move || {
            let socket = sockets::application(Domain::IPV4, &*mark)?;
            sockets::bind_to_client(&socket, [192, 0, 2, 7].into())?;
            socket.set_nonblocking(false)?;
            socket.connect_timeout(&to.into(), Duration::from_millis(300))
        })
        .await
        .expect_err("no way back");
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
}
