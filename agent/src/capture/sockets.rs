//! The agent's sockets inside a pod.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use socket2::{Domain, Socket, TcpKeepalive, Type};
use tokio::net::TcpListener;
use tracing::debug;
use underpass_abi::{AGENT_MARK, OUTBOUND_PORT, OUTBOUND_PORTS_V6, PLAINTEXT_PORT, TUNNEL_PORT};

use super::{
    EnrollError,
    inheritance::Purpose,
    netns::{Netns, has_ipv6_here},
    pod::PodListeners,
    processes, routes, sockdiag,
};

/// Connections that may wait for `accept`; the kernel takes `net.core.somaxconn` (4096 by default) where that is less.
const BACKLOG: i32 = 4096;
/// First probe of a silent peer, and the time between probes. With [`KEEPALIVE_PROBES`] a vanished node is noticed after 25 s.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;
/// The same limit for data that is not acknowledged: keepalive does not run while some is in flight.
const USER_TIMEOUT: Duration = Duration::from_secs(25);

/// Flags a socket as the agent's own.
pub(super) type Mark = dyn Fn(BorrowedFd<'_>) -> io::Result<()> + Send + Sync;

/// Opens the agent's listeners inside the namespace.
pub async fn listen(netns: &Netns, mark: &Arc<Mark>) -> Result<PodListeners, EnrollError> {
    let mark = Arc::clone(mark);
    let opened = netns
        .try_run(move || listen_here(&*mark))
        .await
        .unwrap_or_else(|error| Err(Failure::Setup("enter the namespace for the listeners", error)));
    let sockets = match opened {
        Ok(sockets) => sockets,
        Err(Failure::Enroll(error)) => return Err(error),
        Err(Failure::Setup(action, error)) => return Err(EnrollError::Setup { action, reason: error.to_string() }),
        Err(Failure::Taken(address)) => {
            return Err(EnrollError::PortTaken { port: address.port(), holder: holder(netns, address).await });
        }
    };
    polled(sockets)
}

/// Takes up listeners that an earlier agent has opened inside the namespace.
pub fn inherit(sockets: Vec<(Purpose, OwnedFd)>, mark: &Arc<Mark>) -> Result<PodListeners, EnrollError> {
    // The map with the flags may be another one than the earlier agent's.
    let marked = sockets.into_iter().map(|(purpose, socket)| mark(socket.as_fd()).map(|()| (purpose, socket.into())));
    let marked = marked.collect::<io::Result<_>>().map_err(|error| EnrollError::Setup {
        action: "flag a listener of an earlier agent",
        reason: error.to_string(),
    })?;
    polled(marked)
}

fn polled(sockets: Vec<(Purpose, Socket)>) -> Result<PodListeners, EnrollError> {
    let mut listeners = PodListeners::default();
    for (purpose, socket) in sockets {
        let listener = TcpListener::from_std(socket.into())
            .map_err(|error| EnrollError::Setup { action: "poll a listener", reason: error.to_string() })?;
        listeners.of(purpose).push(Arc::new(listener));
    }
    Ok(listeners)
}

/// Who listens on `address`, for people.
async fn holder(netns: &Netns, address: SocketAddr) -> String {
    let unknown =
        || "a socket whose owner cannot be told (bound without listening, or in another PID namespace)".to_owned();
    let inodes = match sockdiag::listeners(netns, address.port()).await {
        Ok(inodes) => inodes,
        Err(error) => {
            debug!(%error, %address, "cannot list the sockets of the pod");
            return unknown();
        }
    };
    let holder = tokio::task::spawn_blocking(move || processes::holder_of_any(&inodes)).await;
    holder.ok().flatten().map_or_else(unknown, |(pid, command)| format!("process {pid} ({command})"))
}

/// Why the listeners are not there.
enum Failure {
    Enroll(EnrollError),
    Setup(&'static str, io::Error),
    Taken(SocketAddr),
}

fn listen_here(mark: &Mark) -> Result<Vec<(Purpose, Socket)>, Failure> {
    routes::loopback_up_here().map_err(Failure::Enroll)?;
    let v4 = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let v6 = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let mut wanted = vec![
        (Purpose::Outbound, v4(OUTBOUND_PORT)),
        (Purpose::Tunnel, v4(TUNNEL_PORT)),
        (Purpose::Plaintext, v4(PLAINTEXT_PORT)),
    ];
    if has_ipv6_here() {
        // Loopback only: nothing outside the pod reaches them.
        wanted.extend(OUTBOUND_PORTS_V6.map(|port| (Purpose::Outbound, (Ipv6Addr::LOCALHOST, port).into())));
        wanted.extend([(Purpose::Tunnel, v6(TUNNEL_PORT)), (Purpose::Plaintext, v6(PLAINTEXT_PORT))]);
    } else {
        debug!("the namespace has no IPv6: no listeners for it");
    }
    wanted
        .into_iter()
        .map(|(purpose, address)| match listener(purpose, address, mark) {
            Ok(socket) => Ok((purpose, socket)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(Failure::Taken(address)),
            Err(error) => {
                Err(Failure::Setup("open a listener", io::Error::new(error.kind(), format!("{address}: {error}"))))
            }
        })
        .collect()
}

/// Options set here are those of every accepted socket: the kernel copies them.
fn listener(purpose: Purpose, address: SocketAddr, mark: &Mark) -> io::Result<Socket> {
    let socket = tcp(Domain::for_address(address), mark)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    match purpose {
        Purpose::Outbound => socket.set_linger(Some(Duration::ZERO))?,
        Purpose::Tunnel => notice_vanished_peer(&socket)?,
        Purpose::Plaintext => {
            socket.set_linger(Some(Duration::ZERO))?;
            notice_vanished_peer(&socket)?;
            transparent(&socket, address.is_ipv6())?;
        }
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// A socket for dialling upstreams, in the namespace of the calling thread.
pub(super) fn upstream(domain: Domain, mark: &Mark) -> io::Result<Socket> {
    let socket = tcp(domain, mark)?;
    notice_vanished_peer(&socket)?;
    Ok(socket)
}

/// A socket for connecting to the application, in the namespace of the calling thread; not bound yet.
pub(super) fn application(domain: Domain, mark: &Mark) -> io::Result<Socket> {
    let socket = tcp(domain, mark)?;
    // A killed agent is a reset for the application, never a clean end.
    socket.set_linger(Some(Duration::ZERO))?;
    transparent(&socket, domain == Domain::IPV6)?;
    socket.set_mark(AGENT_MARK)?;
    // The port is chosen at connect, where only the whole 4-tuple has to be free.
    setsockopt(&socket, IpBindAddressNoPort, &true)?;
    Ok(socket)
}

/// Binds an [`application`] socket to the client's address. Needs no namespace: the socket is in one.
pub(super) fn bind_to_client(socket: &Socket, source: IpAddr) -> io::Result<()> {
    socket.bind(&SocketAddr::new(source, 0).into())
}

fn tcp(domain: Domain, mark: &Mark) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::STREAM.nonblocking().cloexec(), Some(socket2::Protocol::TCP))?;
    // What the relay counts on: small messages leave at once, and a byte sent as urgent stays in its place in the stream.
    socket.set_tcp_nodelay(true)?;
    socket.set_out_of_band_inline(true)?;
    mark(socket.as_fd())?;
    Ok(socket)
}

fn transparent(socket: &Socket, v6: bool) -> io::Result<()> {
    if v6 { socket.set_ip_transparent_v6(true) } else { socket.set_ip_transparent_v4(true) }
}

fn notice_vanished_peer(socket: &Socket) -> io::Result<()> {
    let keepalive =
        TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))
}

#[cfg(test)]
#[path = "netns_tests/sockets.rs"]
mod tests;
