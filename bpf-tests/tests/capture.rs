//! The cgroup hooks on real sockets: what the application sees, and what the agent is told.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    cgroup::Cgroup,
    namespace::{Namespace, accept, eventually},
    object::{Loaded, POD, address},
};
use libbpf_rs::Link;
use socket2::{Domain, SockAddr, Socket, Type};
use underpass_abi::{
    ALL_FLOWS,
    Counter::{Captured, FlowsAbandoned, RefusedFlowsFull, RefusedFlowsShare},
    DIRECTION_OUTBOUND, FlowKey, OUTBOUND_PORT, OUTBOUND_PORTS_V6, POD_CAPTURE_ALL, PORT_EXCLUDED, PendingFlows,
    flow_share, programs,
};

const POD_V4: &str = "10.9.0.1";
const POD_V6: &str = "fd09::1";

const HOOKS: [&str; 7] = [
    programs::SOCKOPS,
    programs::GETPEERNAME4,
    programs::GETPEERNAME6,
    programs::GETSOCKNAME4,
    programs::GETSOCKNAME6,
    programs::CONNECT4,
    programs::CONNECT6,
];

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address in a test")
}

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address and port in a test")
}

/// An enrolled namespace whose processes are captured. Mesh addresses exist on its `lo`, so what is not captured connects too.
struct Pod {
    loaded: Loaded,
    cookie: u64,
    _links: Vec<Link>,
    cgroup: Cgroup,
}

impl Pod {
    fn new(namespace: &Namespace, cookie: u64) -> Result<Self> {
        Self::loaded(namespace, cookie, Loaded::new()?)
    }

    fn loaded(namespace: &Namespace, cookie: u64, loaded: Loaded) -> Result<Self> {
        for network in ["10.9.0.1/32", "10.1.2.3/32", "10.1.2.4/32", "10.2.2.3/32"] {
            namespace.ip(&format!("addr add {network} dev lo"))?;
        }
        for network in ["fd09::1/128", "fd01::5/128", "fd02::5/128"] {
            namespace.ip(&format!("addr add {network} dev lo nodad"))?;
        }
        for address in ["fd09::1", "fd01::5", "fd02::5"] {
            namespace.wait_for_address(address.parse()?)?;
        }
        loaded.mesh(ip("10.1.0.0"), 16, true)?;
        loaded.mesh(ip("fd01::"), 32, true)?;
        loaded.pod(cookie, 0, Some(ip(POD_V4)), Some(ip(POD_V6)))?;
        let cgroup = Cgroup::join()?;
        let mut links = Vec::new();
        for program in HOOKS {
            links.push(loaded.attach_cgroup(program, cgroup.directory())?);
        }
        Ok(Self { loaded, cookie, _links: links, cgroup })
    }

    /// The key of an accepted connection, built from what `accept` and `getsockname` say.
    fn key(&self, accepted: &TcpStream) -> Result<FlowKey> {
        let (client, listener) = (accepted.peer_addr()?, accepted.local_addr()?);
        Ok(FlowKey {
            netns: self.cookie,
            client: address(client.ip()),
            listener: address(listener.ip()),
            client_port: client.port(),
            listener_port: listener.port(),
            _pad: 0,
        })
    }

    /// The original destination of an accepted connection, from the only flow there is.
    fn original(&self, accepted: &TcpStream) -> Result<SocketAddr> {
        let flows = self.loaded.flows()?;
        ensure!(flows.len() == 1, "one flow: {flows:?}");
        assert_eq!(flows[0].0, self.key(accepted)?);
        assert_ne!(flows[0].1.cookie, 0);
        Ok(SocketAddr::new(Ipv6Addr::from(flows[0].1.addr).to_canonical(), flows[0].1.port))
    }
}

/// Runs a test as a process of an enrolled pod.
fn in_pod(test: impl FnOnce(Pod) -> Result<()> + Send) -> Result<()> {
    let namespace = Namespace::new()?;
    let cookie = namespace.cookie()?;
    namespace.enter(|| test(Pod::new(&namespace, cookie)?))?
}

/// The agent's listeners.
fn agent() -> Result<Vec<TcpListener>> {
    let v4 = [TcpListener::bind(("0.0.0.0", OUTBOUND_PORT))];
    let v6 = OUTBOUND_PORTS_V6.map(|port| TcpListener::bind(("::1", port)));
    Ok(v4.into_iter().chain(v6).collect::<std::io::Result<_>>()?)
}

/// Connects a fresh socket of the address's own family, even to a v4-mapped address.
fn dial(to: &str) -> Result<TcpStream> {
    let to = at(to);
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.connect(&to.into()).with_context(|| format!("connecting to {to}"))?;
    Ok(socket.into())
}

#[test]
fn mesh_destinations_are_captured() -> Result<()> {
    in_pod(|pod| {
        let listeners = agent()?;
        for (count, (dst, own)) in (1..).zip([
            ("10.1.2.3:80", "10.9.0.1"),
            ("10.1.255.255:65535", "10.9.0.1"),
            ("[fd01::5]:443", "fd09::1"),
            ("[::ffff:10.1.2.3]:8080", "::ffff:10.9.0.1"),
        ]) {
            let mut client = dial(dst)?;
            let mut server = accept(&listeners)?;
            assert_eq!(pod.original(&server)?, SocketAddr::new(at(dst).ip().to_canonical(), at(dst).port()), "{dst}");
            assert_eq!(client.peer_addr()?, at(dst), "{dst}: getpeername");
            assert_eq!(
                client.local_addr()?,
                SocketAddr::new(ip(own), server.peer_addr()?.port()),
                "{dst}: getsockname"
            );
            match server.local_addr()? {
                SocketAddr::V4(listener) => {
                    let [net, _, _, host] = listener.ip().octets();
                    assert!(net == 127 && (1..=254).contains(&host), "{dst}: {listener}");
                    assert_eq!(listener.port(), OUTBOUND_PORT);
                }
                SocketAddr::V6(listener) => assert!(OUTBOUND_PORTS_V6.contains(&listener.port()), "{dst}: {listener}"),
            }
            client.write_all(b"ping")?;
            let mut bytes = [0; 4];
            server.read_exact(&mut bytes)?;
            assert_eq!(&bytes, b"ping");
            assert_eq!(pod.loaded.counter(Captured)?, count);
            pod.loaded.delete("FLOWS", &pod.key(&server)?)?;
        }
        assert_eq!(pod.loaded.counter(FlowsAbandoned)?, 0, "an accepted connection is not an abandoned one");
        Ok(())
    })
}

#[test]
fn connections_are_spread() -> Result<()> {
    in_pod(|pod| {
        let listeners = agent()?;
        let (mut addresses, mut ports) = (Vec::new(), Vec::new());
        for _ in 0..64 {
            let _v4 = dial("10.1.2.3:80")?;
            addresses.push(accept(&listeners)?.local_addr()?.ip());
            let _v6 = dial("[fd01::5]:80")?;
            ports.push(accept(&listeners)?.local_addr()?.port());
        }
        assert_eq!(pod.loaded.counter(Captured)?, 128);
        addresses.sort_unstable();
        addresses.dedup();
        assert!(addresses.len() > 60, "64 draws out of 16 million gave {} addresses", addresses.len());
        ports.sort_unstable();
        ports.dedup();
        // 64 draws out of 8 miss four of them or more with a probability below 10^-17
        assert!(ports.len() > 4, "only {ports:?}");
        Ok(())
    })
}

#[test]
fn everything_else_is_untouched() -> Result<()> {
    in_pod(|pod| {
        let _agent = agent()?;
        pod.loaded.port_rule(POD, 81, DIRECTION_OUTBOUND, PORT_EXCLUDED)?;
        pod.loaded.port_rule(0, 82, DIRECTION_OUTBOUND, PORT_EXCLUDED)?;
        pod.loaded.exclude(POD, ip("10.1.2.4"), 32)?;
        pod.loaded.exclude(0, ip("fd01::5"), 128)?;
        for address in [
            "10.2.2.3:80",
            "[fd02::5]:80",
            "127.0.0.1:80",
            "127.1.2.3:80",
            "[::1]:80",
            "10.1.2.3:81",
            "10.1.2.3:82",
            "10.1.2.4:80",
            "[fd01::5]:80",
        ] {
            let listener = TcpListener::bind(address)?;
            let client = dial(address)?;
            accept(&[listener]).with_context(|| format!("accepting on {address}"))?;
            assert_eq!(client.peer_addr()?, at(address));
        }
        for (listen, dialled) in [("127.0.0.1:83", "[::ffff:127.0.0.1]:83"), ("10.2.2.3:83", "[::ffff:10.2.2.3]:83")] {
            let listener = TcpListener::bind(listen)?;
            let client = dial(dialled)?;
            let server = accept(&[listener])?;
            assert_eq!(client.peer_addr()?, at(dialled));
            assert_eq!(server.local_addr()?, at(listen));
        }
        let unspecified = TcpListener::bind("127.0.0.1:84")?;
        dial("0.0.0.0:84")?;
        accept(&[unspecified])?;

        let udp = UdpSocket::bind("10.9.0.1:0")?;
        udp.connect("10.1.2.3:80")?;
        assert_eq!(udp.peer_addr()?, at("10.1.2.3:80"));

        let listener = TcpListener::bind("10.1.2.3:80")?;
        let own = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        pod.loaded.mark_agents(&own)?;
        own.connect(&at("10.1.2.3:80").into())?;
        accept(&[listener]).context("accepting the agent's own connection")?;

        assert_eq!(pod.loaded.counter(Captured)?, 0);
        assert_eq!(pod.loaded.flows()?, []);
        Ok(())
    })
}

#[test]
fn other_namespaces_are_untouched() -> Result<()> {
    in_pod(|pod| {
        let other = Namespace::new()?;
        other.ip("addr add 10.1.2.3/32 dev lo")?;
        other.enter(|| -> Result<()> {
            let listener = TcpListener::bind("10.1.2.3:80")?;
            dial("10.1.2.3:80")?;
            accept(&[listener])?;
            Ok(())
        })??;
        assert_eq!(pod.loaded.counter(Captured)?, 0);
        Ok(())
    })
}

#[test]
fn capture_all_takes_every_destination_but_loopback() -> Result<()> {
    in_pod(|pod| {
        let listeners = agent()?;
        pod.loaded.pod(pod.cookie, POD_CAPTURE_ALL, Some(ip(POD_V4)), None)?;
        pod.loaded.exclude(POD, ip("10.2.2.3"), 32)?;
        let client = dial("192.0.2.1:80")?;
        let server = accept(&listeners)?;
        assert_eq!(pod.original(&server)?, at("192.0.2.1:80"));
        assert_eq!(client.peer_addr()?, at("192.0.2.1:80"));
        for address in ["127.0.0.1:80", "[::1]:80", "10.2.2.3:80"] {
            let listener = TcpListener::bind(address)?;
            dial(address)?;
            accept(&[listener]).with_context(|| format!("accepting on {address}"))?;
        }
        let unspecified = [TcpListener::bind("[::]:84")?];
        for dst in ["0.0.0.0:84", "[::]:84", "[::ffff:0.0.0.0]:84"] {
            dial(dst)?;
            accept(&unspecified).with_context(|| format!("accepting what was dialled as {dst}"))?;
        }
        // the pod has no IPv6 address to answer with
        let client = dial("[2001:db8::1]:80")?;
        assert_eq!(client.peer_addr()?, at("[2001:db8::1]:80"));
        assert_eq!(client.local_addr()?.ip(), ip("::1"));
        Ok(())
    })
}

#[test]
fn a_bound_source_is_kept() -> Result<()> {
    in_pod(|pod| {
        let listeners = agent()?;
        for (source, dst) in [("10.9.0.1:0", "10.1.2.3:80"), ("[fd09::1]:0", "[fd01::5]:80")] {
            let socket = Socket::new(Domain::for_address(at(source)), Type::STREAM, None)?;
            socket.bind(&at(source).into())?;
            socket.connect(&at(dst).into())?;
            let client = TcpStream::from(socket);
            let server = accept(&listeners)?;
            assert_eq!(server.peer_addr()?.ip(), at(source).ip());
            assert_eq!(client.local_addr()?, server.peer_addr()?);
            assert_eq!(pod.original(&server)?, at(dst));
            pod.loaded.delete("FLOWS", &pod.key(&server)?)?;
        }
        Ok(())
    })
}

/// Connections that nobody will accept leave nothing behind.
#[test]
fn failed_connects_are_forgotten() -> Result<()> {
    in_pod(|pod| {
        for (count, dst) in (1..).zip(["10.1.2.3:80", "[fd01::5]:80", "[::ffff:10.1.2.3]:80"]) {
            let error = dial(dst).expect_err("no agent listens").downcast::<std::io::Error>()?;
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{dst}");
            assert_eq!(pod.loaded.flows()?, [], "{dst}");
            assert_eq!(pod.loaded.counter(FlowsAbandoned)?, count, "{dst}");
        }

        // a reset before the agent accepts
        let agent = agent()?;
        let client = Socket::from(dial("10.1.2.3:80")?);
        client.set_linger(Some(std::time::Duration::ZERO))?;
        assert_eq!(pod.loaded.flows()?.len(), 1);
        drop(client);
        eventually("the flow is gone", || Ok(pod.loaded.flows()?.is_empty()))?;
        assert_eq!(pod.loaded.counter(FlowsAbandoned)?, 4);

        // unless the entry has become another connection's
        let client = Socket::from(dial("10.1.2.3:80")?);
        client.set_linger(Some(std::time::Duration::ZERO))?;
        let (key, mut flow) = pod.loaded.flows()?[0];
        flow.cookie += 1;
        pod.loaded.update("FLOWS", &key, &flow)?;
        drop(client);
        let server = accept(&agent)?;
        let reset = (&server).read(&mut [0]).expect_err("the client has reset the connection");
        assert_eq!(reset.kind(), ErrorKind::ConnectionReset);
        assert_eq!(pod.loaded.flows()?, [(key, flow)]);
        Ok(())
    })
}

/// A client may write and close before the agent gets to accept; what it wrote must still find its way.
#[test]
fn a_closed_connection_in_the_accept_queue_keeps_its_destination() -> Result<()> {
    in_pod(|pod| {
        let listeners = agent()?;
        for dst in ["10.1.2.3:80", "[fd01::5]:80"] {
            let mut client = dial(dst)?;
            client.write_all(b"fire and forget")?;
            let port = client.local_addr()?.port();
            drop(client);
            eventually("the agent's end has acknowledged everything", || is_time_wait(port))?;
            let mut server = accept(&listeners)?;
            assert_eq!(pod.original(&server)?, at(dst));
            let mut text = String::new();
            server.read_to_string(&mut text)?;
            assert_eq!(text, "fire and forget");
            pod.loaded.delete("FLOWS", &pod.key(&server)?)?;
        }
        assert_eq!(pod.loaded.counter(FlowsAbandoned)?, 0);
        Ok(())
    })
}

/// Is of a connection with this local port only a TIME-WAIT entry left? Its state may still be called FIN-WAIT-2; its timer tells.
fn is_time_wait(port: u16) -> Result<bool> {
    let tables = ["tcp", "tcp6"].map(|table| std::fs::read_to_string(format!("/proc/thread-self/net/{table}")));
    let local = format!(":{port:04X}");
    Ok(tables.into_iter().collect::<std::io::Result<Vec<_>>>()?.iter().flat_map(|table| table.lines()).any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields[1].ends_with(&local) && fields[5].starts_with("03:")
    }))
}

/// A socket that connects again, elsewhere, has no memory of having been captured.
#[test]
fn a_socket_can_be_captured_and_then_not() -> Result<()> {
    in_pod(|pod| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        let refused = socket.connect(&at("10.1.2.3:80").into()).expect_err("no agent listens");
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);

        // the agent's port number elsewhere is nothing special
        let plain = [TcpListener::bind("10.2.2.3:15001")?];
        socket.connect(&at("10.2.2.3:15001").into())?;
        let server = accept(&plain)?;
        assert_eq!(socket.peer_addr()?.as_socket(), Some(at("10.2.2.3:15001")));
        assert_eq!(socket.local_addr()?.as_socket(), Some(server.peer_addr()?));
        assert_eq!(pod.loaded.flows()?, []);
        drop((socket, server, plain));
        Ok(())
    })
}

/// While an agent replaces another, or when it is attached at two levels, two copies of each hook run one after the other.
#[test]
fn two_copies_of_the_hooks_agree() -> Result<()> {
    in_pod(|pod| {
        let mut copies = Vec::new();
        for program in HOOKS {
            copies.push(pod.loaded.attach_cgroup(program, pod.cgroup.inner())?);
        }
        let listeners = agent()?;
        for (dst, own) in
            [("10.1.2.3:80", POD_V4), ("[fd01::5]:80", POD_V6), ("[::ffff:10.1.2.3]:80", "::ffff:10.9.0.1")]
        {
            let client = dial(dst)?;
            let server = accept(&listeners)?;
            assert_eq!(pod.original(&server)?, SocketAddr::new(at(dst).ip().to_canonical(), 80));
            assert_eq!(client.peer_addr()?, at(dst));
            assert_eq!(client.local_addr()?.ip(), ip(own));
            pod.loaded.delete("FLOWS", &pod.key(&server)?)?;
        }
        assert_eq!(pod.loaded.counter(Captured)?, 3);
        Ok(())
    })
}

#[test]
fn names_of_a_listening_socket_are_its_own() -> Result<()> {
    in_pod(|_pod| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.connect(&at("10.1.2.3:80").into()).expect_err("no agent listens");
        socket.bind(&SockAddr::from(at("127.0.0.1:0"))).context("binding after a failed connect")?;
        socket.listen(1)?;
        let local = socket.local_addr()?.as_socket().context("an IP socket")?;
        assert_eq!(local.ip(), ip("127.0.0.1"));
        Ok(())
    })
}

#[test]
fn a_full_flow_table_is_reported() -> Result<()> {
    let namespace = Namespace::new()?;
    let cookie = namespace.cookie()?;
    namespace.enter(|| {
        let loaded = Loaded::with(|open| {
            let mut flows = open.maps_mut().find(|map| map.name() == "FLOWS").context("no map FLOWS")?;
            Ok(flows.set_max_entries(1)?)
        })?;
        let pod = Pod::loaded(&namespace, cookie, loaded)?;
        let listeners = agent()?;
        let _first = dial("10.1.2.3:80")?;
        let first = accept(&listeners)?;
        let _second = dial("10.1.2.4:81")?;
        let second = accept(&listeners)?;
        assert_eq!(pod.original(&first)?, at("10.1.2.3:80"));
        assert_eq!(pod.loaded.counter(RefusedFlowsFull)?, 1);
        let events = pod.loaded.events()?;
        assert_eq!(events.len(), 1, "{events:?}");
        assert_eq!((events[0].kind, events[0].pod_id), (RefusedFlowsFull as u32, POD));
        assert_eq!((events[0].dst, events[0].dst_port), (address(ip("10.1.2.4")), 81));
        assert_eq!(events[0].src_port, second.peer_addr()?.port());
        Ok(())
    })?
}

#[test]
fn a_pod_that_has_its_share_of_flows_is_refused() -> Result<()> {
    in_pod(|pod| {
        let share = flow_share(0);
        let counts = |index| pod.loaded.pending(index).map(|pending| pending.count());
        pod.loaded.update("PENDING_FLOWS", &POD, &PendingFlows { added: share + 5, taken: 5 })?;
        for destination in ["10.1.2.3:80", "[fd01::5]:80", "[::ffff:10.1.2.3]:80"] {
            let error = dial(destination).expect_err("more than the share");
            assert_eq!(
                error.downcast_ref::<std::io::Error>().map(std::io::Error::kind),
                Some(ErrorKind::PermissionDenied)
            );
        }
        assert_eq!((pod.loaded.counter(RefusedFlowsShare)?, pod.loaded.counter(Captured)?), (3, 0));
        let events = pod.loaded.events()?;
        assert_eq!(events.len(), 3, "{events:?}");
        assert_eq!((events[0].kind, events[0].pod_id, events[0].dst_port), (RefusedFlowsShare as u32, POD, 80));
        assert_eq!(
            (counts(POD)?, counts(ALL_FLOWS)?, pod.loaded.flows()?.len()),
            (share, 0, 0),
            "nothing else has happened"
        );

        // The share shrinks with what all pods have.
        pod.loaded.update("PENDING_FLOWS", &POD, &PendingFlows { added: 1000, taken: 0 })?;
        pod.loaded.update("PENDING_FLOWS", &ALL_FLOWS, &PendingFlows { added: 262_144 - 16 * 1000, taken: 0 })?;
        dial("10.1.2.3:80").expect_err("more than a sixteenth of what is free");
        pod.loaded.update("PENDING_FLOWS", &ALL_FLOWS, &PendingFlows { added: 262_144 - 16 * 1001, taken: 0 })?;
        let listeners = agent()?;
        let _client = dial("10.1.2.3:80")?;
        accept(&listeners)?;
        Ok(())
    })
}

#[test]
fn flows_are_counted_for_their_pod_as_long_as_they_wait() -> Result<()> {
    in_pod(|pod| {
        let counts =
            || -> Result<(u64, u64)> { Ok((pod.loaded.pending(POD)?.count(), pod.loaded.pending(ALL_FLOWS)?.count())) };
        dial("10.1.2.3:80").expect_err("no agent listens");
        assert_eq!((counts()?, pod.loaded.counter(FlowsAbandoned)?), ((0, 0), 1));
        let listeners = agent()?;
        let client = dial("10.1.2.3:80")?;
        assert_eq!(counts()?, (1, 1));
        let server = accept(&listeners)?;
        let flow = pod.loaded.flows()?[0];
        assert_eq!((flow.0, flow.1.pod_id), (pod.key(&server)?, POD));
        let reset = socket2::SockRef::from(&client);
        reset.set_linger(Some(std::time::Duration::ZERO))?;
        drop(client);
        assert_eq!((counts()?, pod.loaded.flows()?.len()), ((0, 0), 0));
        Ok(())
    })
}
