//! The tc programs on a real interface: what depends on the socket behind a packet cannot be tried over crafted packets.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    namespace::{Namespace, accept},
    object::{Loaded, POD},
};
use libbpf_rs::{TC_EGRESS, TC_INGRESS};
use nix::errno::Errno;
use socket2::{Domain, Protocol, Socket, Type};
use underpass_abi::{
    AGENT_MARK,
    Counter::{self, GuardDropped, InboundAssigned, InboundStrictDropped},
    DIRECTION_INBOUND, PLAINTEXT_PORT, POD_STRICT, PORT_ASSIGN, TUNNEL_PORT, programs,
};

const PATIENCE: Duration = Duration::from_secs(10);

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address and port in a test")
}

/// A pod, and a machine outside that it shares a link with.
struct Testbed {
    pod: Namespace,
    outside: Namespace,
}

impl Testbed {
    fn new() -> Result<Self> {
        let (pod, outside) = (Namespace::new()?, Namespace::new()?);
        pod.connect(&outside)?;
        Ok(Self { pod, outside })
    }
}

/// Starts to connect, and gives up; one SYN has left, or was dropped on the way out, when this returns.
fn start(socket: Socket, to: SocketAddr) -> Result<()> {
    socket.set_nonblocking(true)?;
    let error = socket.connect(&to.into()).err().context("the connection cannot be there yet")?;
    ensure!(error.raw_os_error() == Some(Errno::EINPROGRESS as i32), "connecting to {to}: {error}");
    drop(socket);
    Ok(())
}

fn socket(to: SocketAddr) -> Result<Socket> {
    Ok(Socket::new(Domain::for_address(to), Type::STREAM, None)?)
}

/// Waits for the one event that there is.
fn one_event(loaded: &Loaded, kind: Counter) -> Result<()> {
    let events = loaded.events_within(PATIENCE)?;
    let kinds: Vec<_> = events.iter().map(|event| (event.kind, event.pod_id)).collect();
    assert_eq!(kinds, [(kind as u32, POD)], "{events:?}");
    Ok(())
}

fn talk(mut client: TcpStream, mut server: TcpStream) -> Result<()> {
    client.write_all(b"ping")?;
    let mut bytes = [0; 4];
    server.set_read_timeout(Some(PATIENCE))?;
    server.read_exact(&mut bytes)?;
    assert_eq!(&bytes, b"ping");
    Ok(())
}

#[test]
fn only_the_agent_reaches_the_mesh() -> Result<()> {
    let testbed = Testbed::new()?;
    let listeners = testbed
        .outside
        .enter(|| -> Result<_> { Ok([TcpListener::bind("10.9.0.2:80")?, TcpListener::bind("[fd09::2]:80")?]) })??;
    testbed.pod.enter(|| -> Result<()> {
        let loaded = Loaded::new()?;
        loaded.pod_by_id(0)?;
        loaded.mesh("10.9.0.2".parse()?, 32, true)?;
        loaded.mesh("fd09::2".parse()?, 128, true)?;
        loaded.attach_tc(programs::GUARD, "eth0", TC_EGRESS)?;
        let mut dropped = 0;
        for listener in &listeners {
            let to = listener.local_addr()?;
            start(socket(to)?, to)?;
            let marked = socket(to)?;
            marked.set_mark(AGENT_MARK)?;
            start(marked, to)?;
            dropped += 2;
            assert_eq!(loaded.counter(GuardDropped)?, dropped, "{to}");

            let own = socket(to)?;
            loaded.mark_agents(&own)?;
            own.connect(&to.into()).with_context(|| format!("the agent's connection to {to}"))?;
            talk(own.into(), accept(std::slice::from_ref(listener))?)?;
        }
        let multipath = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)).context("MPTCP")?;
        start(multipath, at("10.9.0.2:80"))?;
        assert!(loaded.counter(GuardDropped)? > dropped, "the SYN of an MPTCP subflow is dropped");
        Ok(())
    })?
}

/// What another namespace sends through the pod has no socket here.
#[test]
fn forwarded_connections_are_guarded() -> Result<()> {
    let testbed = Testbed::new()?;
    let nested = Namespace::new()?;
    testbed.pod.ip(&format!("link add nested type veth peer name uplink netns {}", nested.path()))?;
    testbed.pod.ip("addr add 10.8.0.1/24 dev nested")?;
    testbed.pod.ip("link set nested up")?;
    nested.ip("addr add 10.8.0.2/24 dev uplink")?;
    nested.ip("link set uplink up")?;
    nested.ip("route add default via 10.8.0.1")?;
    testbed.pod.enter(|| -> Result<()> {
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("switching forwarding on")?;
        let loaded = Loaded::new()?;
        loaded.pod_by_id(0)?;
        loaded.mesh("10.9.0.2".parse()?, 32, true)?;
        loaded.attach_tc(programs::GUARD, "eth0", TC_EGRESS)?;
        let to = at("10.9.0.2:80");
        nested.enter(|| start(socket(to)?, to))??;
        one_event(&loaded, GuardDropped)
    })?
}

#[test]
fn strict_lets_only_the_tunnel_and_own_connections_in() -> Result<()> {
    let testbed = Testbed::new()?;
    let (applications, tunnels) = testbed.pod.enter(|| -> Result<_> {
        let listen = |port| {
            Ok::<_, std::io::Error>([TcpListener::bind(("10.9.0.1", port))?, TcpListener::bind(("fd09::1", port))?])
        };
        Ok((listen(80)?, listen(TUNNEL_PORT)?))
    })??;
    let servers = testbed
        .outside
        .enter(|| -> Result<_> { Ok([TcpListener::bind("10.9.0.2:80")?, TcpListener::bind("[fd09::2]:80")?]) })??;
    testbed.pod.enter(|| -> Result<()> {
        let loaded = Loaded::new()?;
        loaded.pod_by_id(POD_STRICT)?;
        loaded.attach_tc(programs::INBOUND, "eth0", TC_INGRESS)?;
        for ((application, tunnel), server) in applications.iter().zip(&tunnels).zip(&servers) {
            let to = application.local_addr()?;
            testbed.outside.enter(|| start(socket(to)?, to))??;
            one_event(&loaded, InboundStrictDropped)?;

            let to = tunnel.local_addr()?;
            let client = testbed.outside.enter(|| TcpStream::connect_timeout(&to, PATIENCE))??;
            talk(client, accept(std::slice::from_ref(tunnel))?)?;

            let client =
                TcpStream::connect_timeout(&server.local_addr()?, PATIENCE).context("the pod's own connection")?;
            talk(accept(std::slice::from_ref(server))?, client)?;
        }
        loaded.pod_by_id(0)?;
        for application in &applications {
            let to = application.local_addr()?;
            let client = testbed.outside.enter(|| TcpStream::connect_timeout(&to, PATIENCE))??;
            talk(client, accept(std::slice::from_ref(application))?)?;
        }
        Ok(())
    })?
}

#[test]
fn assigned_ports_reach_the_plaintext_listener() -> Result<()> {
    for (any, host, outside) in
        [("0.0.0.0", "10.9.0.1", "10.9.0.2"), ("::", "fd09::1", "fd09::2"), ("::", "10.9.0.1", "10.9.0.2")]
    {
        let testbed = Testbed::new()?;
        testbed.pod.enter(|| -> Result<()> {
            let loaded = Loaded::new()?;
            loaded.pod_by_id(POD_STRICT)?;
            loaded.port_rule(POD, 80, DIRECTION_INBOUND, PORT_ASSIGN)?;
            loaded.attach_tc(programs::INBOUND, "eth0", TC_INGRESS)?;
            let application = TcpListener::bind((host, 80))?;
            application.set_nonblocking(true)?;
            let agent = [TcpListener::bind((any, PLAINTEXT_PORT))?];
            let to = application.local_addr()?;
            let client = testbed.outside.enter(|| TcpStream::connect_timeout(&to, PATIENCE))?;
            let client = client.with_context(|| format!("connecting to {to}"))?;
            let server = accept(&agent)?;
            let (from, dialled) = (server.peer_addr()?, server.local_addr()?);
            assert_eq!(from.ip().to_canonical(), outside.parse::<IpAddr>()?);
            assert_eq!(from.port(), client.local_addr()?.port());
            assert_eq!(
                (dialled.ip().to_canonical(), dialled.port()),
                (to.ip(), 80),
                "the agent sees the original destination"
            );
            talk(client, server)?;
            assert!(application.accept().is_err(), "the application got the connection too");
            assert_eq!(loaded.counter(InboundAssigned)?, 1);
            Ok(())
        })??;
    }
    Ok(())
}
