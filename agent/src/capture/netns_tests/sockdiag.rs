//! Tests of telling plaintext connections apart and ending them, on real sockets.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use socket2::{Domain, SockRef, Socket};

use super::*;
use crate::capture::{
    netns::tests::{PATIENCE, counting_mark, pod_and_client},
    routes, sockets as agent_sockets,
};

/// Both ends of a connection.
struct Pair {
    name: &'static str,
    dialled: TcpStream,
    accepted: TcpStream,
}

impl Pair {
    fn assert_alive(&mut self) {
        let mut bytes = [0; 1];
        self.dialled.write_all(b"a").unwrap_or_else(|error| panic!("{}: {error}", self.name));
        self.accepted.read_exact(&mut bytes).unwrap_or_else(|error| panic!("{}: {error}", self.name));
        self.accepted.write_all(b"b").unwrap_or_else(|error| panic!("{}: {error}", self.name));
        self.dialled.read_exact(&mut bytes).unwrap_or_else(|error| panic!("{}: {error}", self.name));
    }

    fn assert_reset(&mut self) {
        let name = self.name;
        let error = self.accepted.read(&mut [0]).expect_err(name);
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "{name}, in the pod");
        let error = self.dialled.read(&mut [0]).expect_err(name);
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{name}, outside");
    }
}

async fn listen(netns: &Netns, address: &'static str) -> TcpListener {
    netns.run(move || TcpListener::bind(address)).await.unwrap_or_else(|error| panic!("{address}: {error}"))
}

async fn pair(name: &'static str, from: &Netns, to: &'static str, listener: &TcpListener) -> Pair {
    let dialled = from.run(move || TcpStream::connect(to)).await.unwrap_or_else(|error| panic!("{name}: {error}"));
    accepted(name, dialled, listener)
}

fn accepted(name: &'static str, dialled: TcpStream, listener: &TcpListener) -> Pair {
    let (accepted, _) = listener.accept().expect("accept");
    for stream in [&dialled, &accepted] {
        stream.set_read_timeout(Some(*PATIENCE)).expect("timeout");
    }
    Pair { name, dialled, accepted }
}

/// A connection as the agent makes it after a handshake.
async fn from_agent(name: &'static str, pod: &Netns, source: &str, to: &str, listener: &TcpListener) -> Pair {
    let (source, to): (IpAddr, SocketAddr) = (source.parse().expect("address"), to.parse().expect("address"));
    let (mark, _) = counting_mark();
    let dialled = pod.run(move || {
        let socket = agent_sockets::application(Domain::for_address(to), &*mark)?;
        agent_sockets::bind_to_client(&socket, source)?;
        socket.set_nonblocking(false)?;
        socket.connect_timeout(&to.into(), *PATIENCE).map(|()| TcpStream::from(socket))
    });
    accepted(name, dialled.await.unwrap_or_else(|error| panic!("{name}: {error}")), listener)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_the_plaintext_connections_from_outside_end() {
    let (pod_namespace, client_namespace) = pod_and_client();
    let (pod, client) = (pod_namespace.open(), client_namespace.open());
    routes::install(&pod).await.expect("routes");
    let v4 = listen(&pod, "0.0.0.0:80").await;
    let dual = listen(&pod, "[::]:81").await;
    let permissive = listen(&pod, "0.0.0.0:82").await;
    let tunnel = listen(&pod, "0.0.0.0:15008").await;
    let far = listen(&client, "0.0.0.0:80").await;
    // A pod that sets the agent's mark on its own server, to be taken for the agent.
    let posing = listen(&pod, "0.0.0.0:83").await;
    SockRef::from(&posing).set_mark(underpass_abi::AGENT_MARK).expect("mark");
    posing_route(&pod_namespace);

    let mut doomed = [
        pair("plaintext v4", &client, "10.77.0.2:80", &v4).await,
        pair("plaintext v4 on a dual-stack socket", &client, "10.77.0.2:81", &dual).await,
        pair("plaintext v6", &client, "[fd77::2]:81", &dual).await,
        pair("plaintext to a server with the agent's mark", &client, "10.77.0.2:83", &posing).await,
    ];
    let half_closed = pair("plaintext, half closed", &client, "10.77.0.2:80", &v4).await;
    half_closed.dialled.shutdown(std::net::Shutdown::Write).expect("shutdown");
    let mut spared = [
        from_agent("from the agent, v4", &pod, "10.77.0.1", "10.77.0.2:80", &v4).await,
        from_agent("from the agent, v4 on a dual-stack socket", &pod, "10.77.0.1", "10.77.0.2:81", &dual).await,
        from_agent("from the agent, v6", &pod, "fd77::1", "[fd77::2]:81", &dual).await,
        pair("loopback", &pod, "127.0.0.1:80", &v4).await,
        pair("the pod to itself", &pod, "10.77.0.2:80", &v4).await,
        pair("permissive port", &client, "10.77.0.2:82", &permissive).await,
        pair("tunnel", &client, "10.77.0.2:15008", &tunnel).await,
        pair("outbound to the same port number", &pod, "10.77.0.1:80", &far).await,
    ];
    doomed.iter_mut().chain(&mut spared).for_each(Pair::assert_alive);

    let strict = |local: SocketAddr, _: SocketAddr| local.port() != 82;
    assert_eq!(destroy_plaintext(&pod, |_, _| false).await.expect("nothing is strict"), 0);
    assert_eq!(destroy_plaintext(&pod, strict).await.expect("destroy"), doomed.len() + 1);
    doomed.iter_mut().for_each(Pair::assert_reset);
    let error = (&half_closed.dialled).read(&mut [0]).expect_err("half closed");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    spared.iter_mut().for_each(Pair::assert_alive);
    assert_eq!(destroy_plaintext(&pod, strict).await.expect("again"), 0);
    routes::remove(&pod).await;
}

/// The accepted sockets of a server with the agent's mark would answer over loopback; a rule of the pod's own brings
/// them out, as a pod that poses as the agent would do.
fn posing_route(pod: &crate::capture::netns::tests::TestNamespace) {
    pod.ip(&["rule", "add", "priority", "50", "fwmark", "0x539", "to", "10.77.0.1", "sport", "83", "lookup", "main"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_whose_reset_was_lost_is_told() {
    let (pod_namespace, _client) = pod_and_client();
    let pod = pod_namespace.open();
    for (application, source) in [("10.77.0.2:80", "10.77.0.1"), ("[fd77::2]:80", "fd77::1")] {
        routes::install(&pod).await.expect("routes");
        // For IPv4 its accepted sockets have both families.
        let listener = listen(&pod, "[::]:80").await;
        let mut alive = from_agent("alive", &pod, source, application, &listener).await;
        let lost = from_agent("lost", &pod, source, application, &listener).await;
        let application = application.parse().expect("address");
        let client = |pair: &Pair| {
            let address = pair.accepted.peer_addr().expect("peer");
            SocketAddr::new(address.ip().to_canonical(), address.port())
        };
        assert!(!end_abandoned(&pod, application, client(&alive)).await.expect("looking"));
        alive.assert_alive();

        // Nothing gets out of or into the pod's own addresses: the reset is lost.
        let lost_client = client(&lost);
        let Pair { dialled, mut accepted, .. } = lost;
        pod_namespace.ip(&["link", "set", "lo", "down"]);
        SockRef::from(&dialled).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
        drop(dialled);
        pod_namespace.ip(&["link", "set", "lo", "up"]);
        accepted.set_read_timeout(Some(Duration::from_millis(100))).expect("timeout");
        let error = accepted.read(&mut [0]).expect_err("nothing comes");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "the application waits");

        assert!(end_abandoned(&pod, application, lost_client).await.expect("ending it"));
        let error = accepted.read(&mut [0]).expect_err("it is over");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        assert!(!end_abandoned(&pod, application, lost_client).await.expect("once more"), "there is nothing left");
        assert_eq!(listeners(&pod, 80).await.expect("listeners").len(), 1, "who listens there is left alone");
        routes::remove(&pod).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_nobody_accepted_yet_end_too() {
    let (pod_namespace, client_namespace) = pod_and_client();
    let (pod, client) = (pod_namespace.open(), client_namespace.open());
    let listener = listen(&pod, "0.0.0.0:80").await;
    let mut waiting = client.run(|| TcpStream::connect("10.77.0.2:80")).await.expect("connect");
    waiting.set_read_timeout(Some(*PATIENCE)).expect("timeout");
    assert_eq!(destroy_plaintext(&pod, |_, _| true).await.expect("destroy"), 1);
    assert_eq!(waiting.read(&mut [0]).expect_err("reset").kind(), io::ErrorKind::ConnectionReset);
    // The listener itself goes on.
    drop(listener.accept().expect("the one that was ended is still handed out"));
    pair("after", &client, "10.77.0.2:80", &listener).await.assert_alive();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_of_many_datagrams_is_read_whole() {
    const MANY: usize = 300;
    let (pod_namespace, client_namespace) = pod_and_client();
    let (pod, client) = (pod_namespace.open(), client_namespace.open());
    let listener = pod
        .run(|| {
            let socket = Socket::new(Domain::IPV4, socket2::Type::STREAM, None)?;
            socket.bind(&SocketAddr::from(([0, 0, 0, 0], 80)).into())?;
            socket.listen(1024).map(|()| socket)
        })
        .await
        .expect("listen");
    let dialled = client
        .run(|| {
            (0..MANY)
                .map(|_| TcpStream::connect_timeout(&([10, 77, 0, 2], 80).into(), Duration::from_secs(5)))
                .collect()
        })
        .await;
    let dialled: io::Result<Vec<TcpStream>> = dialled;
    assert_eq!(dialled.as_ref().map(Vec::len).expect("connect"), MANY);
    assert_eq!(destroy_plaintext(&pod, |local, _| local.port() == 80).await.expect("destroy"), MANY);
    drop(listener);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handshake_under_way_does_not_slip_through() {
    let (pod_namespace, client_namespace) = pod_and_client();
    client_namespace.ip(&["addr", "add", "10.77.0.9/24", "dev", "eth0"]);
    // The pod's answers go to nobody, so the connection stays half open.
    pod_namespace.ip(&["neigh", "add", "10.77.0.9", "lladdr", "02:00:00:00:00:99", "dev", "eth0"]);
    let (pod, client) = (pod_namespace.open(), client_namespace.open());
    let _listener = listen(&pod, "0.0.0.0:80").await;
    let dialling = client
        .run(|| {
            let socket = Socket::new(Domain::IPV4, socket2::Type::STREAM.nonblocking(), None)?;
            socket.bind(&SocketAddr::from(([10, 77, 0, 9], 0)).into())?;
            match socket.connect(&SocketAddr::from(([10, 77, 0, 2], 80)).into()) {
                Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
                _ => Ok(socket),
            }
        })
        .await
        .expect("connect");
    let half_open = || async {
        pod.run(|| {
            let states = StateFlags::SYN_RECV;
            sockets(&mut Channel::open(NETLINK_SOCK_DIAG).expect("channel"), &states).expect("list").len()
        })
        .await
    };
    assert_eq!(half_open().await, 1, "the kernel handles the SYN while it sends it");
    assert_eq!(destroy_plaintext(&pod, |_, _| true).await.expect("destroy"), 1);
    drop(dialling);
    assert_eq!(half_open().await, 0);
}

#[tokio::test]
async fn listeners_are_found_by_port() {
    let (pod, _client) = pod_and_client();
    let pod = pod.open();
    let listener = listen(&pod, "[::]:8080").await;
    let inode = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&listener)));
    let inodes = listeners(&pod, 8080).await.expect("list");
    assert_eq!(inodes.len(), 1);
    assert_eq!(inode.expect("link").to_str(), Some(format!("socket:[{}]", inodes.first().expect("one")).as_str()));
    assert_eq!(listeners(&pod, 8081).await.expect("list"), BTreeSet::new());
}
