//! Tests of listeners and of single sockets: options as the kernel reports them.

use std::{
    net::{TcpListener as StdListener, TcpStream},
    os::fd::OwnedFd,
    process::Child,
    sync::atomic::Ordering,
};

use nix::{
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    sys::socket::getsockopt,
};
use socket2::SockRef;
use tokio::{io::AsyncReadExt, time::timeout};

use super::*;
use crate::capture::netns::tests::{PATIENCE, TestNamespace, counting_mark};

fn assert_close_on_exec_and_non_blocking(socket: &impl AsFd) {
    let descriptor = FdFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFD).expect("flags"));
    let file = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL).expect("flags"));
    assert!(descriptor.contains(FdFlag::FD_CLOEXEC) && file.contains(OFlag::O_NONBLOCK));
}

fn assert_notices_vanished_peer(socket: &SockRef<'_>) {
    assert!(socket.keepalive().expect("keepalive"));
    assert_eq!(socket.tcp_keepalive_time().expect("idle"), Duration::from_secs(10));
    assert_eq!(socket.tcp_keepalive_interval().expect("interval"), Duration::from_secs(5));
    assert_eq!(socket.tcp_keepalive_retries().expect("count"), 3);
    assert_eq!(socket.tcp_user_timeout().expect("timeout"), Some(Duration::from_secs(25)));
}

fn addresses(listeners: &[Arc<TcpListener>]) -> Vec<String> {
    listeners.iter().map(|listener| listener.local_addr().expect("address").to_string()).collect()
}

#[tokio::test]
async fn listeners_are_where_they_belong_with_the_options_they_need() {
    let namespace = TestNamespace::new();
    let netns = namespace.open();
    let (mark, marked) = counting_mark();
    let listeners = listen(&netns, &mark).await.expect("listen");
    let outbound = OUTBOUND_PORTS_V6.map(|port| format!("[::1]:{port}"));
    assert_eq!(addresses(&listeners.outbound), [&["0.0.0.0:15001".to_owned()], &outbound[..]].concat());
    assert_eq!(addresses(&listeners.tunnel), ["0.0.0.0:15008", "[::]:15008"]);
    assert_eq!(addresses(&listeners.plaintext), ["0.0.0.0:15006", "[::]:15006"]);
    assert_eq!(marked.load(Ordering::Relaxed), 13);
    for (listener, linger, transparent) in listeners
        .outbound
        .iter()
        .map(|listener| (listener, Some(Duration::ZERO), false))
        .chain(listeners.tunnel.iter().map(|listener| (listener, None, false)))
        .chain(listeners.plaintext.iter().map(|listener| (listener, Some(Duration::ZERO), true)))
    {
        let address = listener.local_addr().expect("address");
        let socket = SockRef::from(listener);
        assert_close_on_exec_and_non_blocking(listener);
        assert_eq!(socket.linger().expect("linger"), linger, "{address}");
        if address.is_ipv6() {
            assert!(socket.only_v6().expect("v6only"), "{address}");
            assert_eq!(socket.ip_transparent_v6().expect("transparent"), transparent, "{address}");
        } else {
            assert_eq!(socket.ip_transparent_v4().expect("transparent"), transparent, "{address}");
        }
        assert_eq!(crate::sys::net::netns_cookie(listener.as_fd()).expect("cookie"), netns.cookie());
    }
}

#[tokio::test]
async fn accepted_sockets_inherit_the_options_and_work_on_the_runtime() {
    let namespace = TestNamespace::new();
    let netns = namespace.open();
    let (mark, _) = counting_mark();
    let listeners = listen(&netns, &mark).await.expect("listen");
    let all = listeners.outbound.iter().chain(&listeners.tunnel).chain(&listeners.plaintext);
    for listener in all {
        let mut to = listener.local_addr().expect("address");
        // Outbound connections come spread over 127/8.
        to.set_ip(if to.is_ipv6() { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::new(127, 9, 8, 7).into() });
        let mut client = netns.run(move || TcpStream::connect(to)).await.expect("connect");
        let (mut accepted, _) = timeout(*PATIENCE, listener.accept()).await.expect("in time").expect("accept");
        assert_eq!(accepted.local_addr().expect("address"), to);
        let socket = SockRef::from(&accepted);
        assert!(socket.tcp_nodelay().expect("nodelay"), "{to}");
        assert_eq!(socket.linger().expect("linger").is_some(), to.port() != TUNNEL_PORT, "{to}");
        if [TUNNEL_PORT, PLAINTEXT_PORT].contains(&to.port()) {
            assert_notices_vanished_peer(&socket);
        }
        std::io::Write::write_all(&mut client, b"hello").expect("write");
        let mut bytes = [0; 5];
        timeout(*PATIENCE, accepted.read_exact(&mut bytes)).await.expect("in time").expect("read");
        drop(accepted);
        let end = std::io::Read::read(&mut client, &mut bytes);
        if to.port() == TUNNEL_PORT {
            assert_eq!(end.expect("a clean end"), 0);
        } else {
            assert_eq!(end.expect_err("a reset").kind(), io::ErrorKind::ConnectionReset, "{to}");
        }
    }
}

#[tokio::test]
async fn without_ipv6_there_are_ipv4_listeners() {
    let namespace = TestNamespace::new();
    namespace.sysctl("net.ipv6.conf.all.disable_ipv6", "1");
    let (mark, _) = counting_mark();
    let listeners = listen(&namespace.open(), &mark).await.expect("listen");
    assert_eq!(addresses(&listeners.outbound), ["0.0.0.0:15001"]);
    assert_eq!(addresses(&listeners.tunnel), ["0.0.0.0:15008"]);
    assert_eq!(addresses(&listeners.plaintext), ["0.0.0.0:15006"]);
}

#[tokio::test]
async fn loopback_is_brought_up() {
    let namespace = TestNamespace::new();
    namespace.ip(&["link", "set", "lo", "down"]);
    let (mark, _) = counting_mark();
    let listeners = listen(&namespace.open(), &mark).await.expect("listen");
    assert_eq!(listeners.outbound.len(), 9);
}

#[tokio::test]
async fn a_taken_port_names_its_holder_and_nothing_stays() {
    let namespace = TestNamespace::new();
    let netns = namespace.open();
    let (mark, _) = counting_mark();
    for address in ["0.0.0.0:15001", "127.0.0.1:15008", "[::]:15008", "[::1]:15103"] {
        let application = netns.run(move || StdListener::bind(address)).await.expect("bind");
        let error = listen(&netns, &mark).await.expect_err("taken");
        let port = address.parse::<SocketAddr>().expect("address").port();
        let EnrollError::PortTaken { port: named, holder } = &error else { panic!("{address}: {error}") };
        assert_eq!(*named, port);
        assert!(holder.starts_with(&format!("process {} (", std::process::id())), "{holder}");
        drop(application);
        // All the listeners that were opened before the taken one are gone.
        drop(listen(&netns, &mark).await.unwrap_or_else(|error| panic!("after {address}: {error}")));
    }
}

/// Killed and reaped when dropped.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_holder_in_another_process_is_found_by_name() {
    let namespace = TestNamespace::new();
    let netns = namespace.open();
    let script =
        "import socket; s=socket.create_server(('127.0.0.1',15006)); print(flush=True); import time; time.sleep(60)";
    let mut child = Reaped(
        namespace
            .command("python3")
            .args(["-c", script])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("python3"),
    );
    // The line says that it listens.
    std::io::Read::read_exact(child.0.stdout.as_mut().expect("piped"), &mut [0]).expect("a line");
    let (mark, _) = counting_mark();
    let error = listen(&netns, &mark).await.expect_err("taken");
    assert_eq!(
        error.to_string(),
        format!("port 15006 in the pod is already in use by process {} (python3); the agent needs it", child.0.id())
    );
}

#[tokio::test]
async fn a_failing_mark_fails_the_whole() {
    let namespace = TestNamespace::new();
    let mark: Arc<Mark> = Arc::new(|_| Err(io::Error::other("map is full")));
    let error = listen(&namespace.open(), &mark).await.expect_err("no mark");
    assert!(error.to_string().contains("0.0.0.0:15001: map is full"), "{error}");
}

#[tokio::test]
async fn sockets_have_the_options_their_use_needs() {
    let namespace = TestNamespace::new();
    let netns = namespace.open();
    let (mark, marked) = counting_mark();
    let made = netns.run(move || {
        [Domain::IPV4, Domain::IPV6].map(|domain| {
            (domain, upstream(domain, &*mark).expect("upstream"), application(domain, &*mark).expect("application"))
        })
    });
    for (domain, upstream, application) in made.await {
        for socket in [&upstream, &application] {
            assert_close_on_exec_and_non_blocking(socket);
            assert!(socket.tcp_nodelay().expect("nodelay"));
            assert_eq!(crate::sys::net::netns_cookie(socket.as_fd()).expect("cookie"), netns.cookie());
        }
        assert_notices_vanished_peer(&SockRef::from(&upstream));
        assert_eq!((upstream.linger().expect("linger"), upstream.mark().expect("mark")), (None, 0));
        assert_eq!(application.linger().expect("linger"), Some(Duration::ZERO));
        assert_eq!(application.mark().expect("mark"), AGENT_MARK);
        assert!(getsockopt(&application, IpBindAddressNoPort).expect("no port"));
        let (transparent, source): (_, IpAddr) = if domain == Domain::IPV6 {
            (application.ip_transparent_v6(), "2001:db8::9".parse().expect("address"))
        } else {
            (application.ip_transparent_v4(), [192, 0, 2, 9].into())
        };
        assert!(transparent.expect("transparent"));
        bind_to_client(&application, source).expect("bind");
        let bound = application.local_addr().expect("address").as_socket().expect("internet address");
        assert_eq!(bound, SocketAddr::new(source, 0), "no port is taken before connect");
        drop(OwnedFd::from(upstream));
    }
    assert_eq!(marked.load(Ordering::Relaxed), 4);
}
