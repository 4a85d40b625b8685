//! The TCP sockets of a pod as `sock_diag` shows them, and ending those that policy no longer admits or whose other end is gone.

use std::{
    collections::{BTreeSet, HashSet},
    io,
    net::{IpAddr, SocketAddr},
};

use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, IPPROTO_TCP, SockDiagDestroy, SockDiagMessage, TCP_LISTEN, TCP_SYN_SENT,
    inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags, Timer},
};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use tracing::debug;
use underpass_abi::is_agent_port;

use super::netns::{Netns, netlink::Channel};

/// Any socket (`INET_DIAG_NOCOOKIE` of `linux/inet_diag.h`, twice).
const NO_COOKIE: [u8; 8] = [0xff; 8];

/// Ends every inbound plaintext connection that `forbidden` holds for, given its local and its remote address, and returns how many
/// there were. The applications on both sides see a reset.
///
/// Inbound is a connection whose local port has a listener in the namespace, other than one of the agent's. It is plaintext
/// from outside unless its other end is in the same namespace: so are the agent's own connections to the application, and the
/// pod's over loopback. That is told by finding the other end, not by the mark, which any process with `CAP_NET_RAW` can set.
/// Outbound connections are left alone; so is an inbound one whose listener is closed, as nothing tells it apart.
pub async fn destroy_plaintext(
    netns: &Netns,
    forbidden: impl Fn(SocketAddr, SocketAddr) -> bool + Send + 'static,
) -> io::Result<usize> {
    let mut channel = netns.try_run(|| Channel::open(NETLINK_SOCK_DIAG)).await??;
    // Reading many sockets takes a while; the channel stays in its namespace on any thread.
    tokio::task::spawn_blocking(move || {
        let first = sockets(&mut channel, &StateFlags::all())?;
        // Again, because the list is no snapshot: the other end of something seen above is in one of the two.
        let second = sockets(&mut channel, &StateFlags::all())?;
        let (mut destroyed, mut failure) = (0, None);
        for id in plaintext(&first, &second, forbidden) {
            match destroy(&mut channel, &id) {
                Ok(()) => destroyed += 1,
                // Ended by itself meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                // Whatever stands in the way of one must not save the others.
                Err(error) => failure = Some(error),
            }
        }
        debug!(destroyed, sockets = first.len(), "plaintext connections ended");
        match failure {
            None => Ok(destroyed),
            Some(error) => Err(io::Error::new(
                error.kind(),
                format!(
                    "not every plaintext connection could be ended ({destroyed} were): {error}; the kernel needs \
                     CONFIG_INET_DIAG_DESTROY, without it restart the pod"
                ),
            )),
        }
    })
    .await
    .map_err(io::Error::other)?
}

/// Ends what is left at the `application`'s address of a connection that the agent made there as `client`, and has closed. Returns whether
/// there was something: the application sees that its connection was aborted.
///
/// A reset is one packet, and one that is behind what the application's kernel had no room for is ignored. Nothing answers the application
/// any more then: for an address that is not its own, as the client's is not, the kernel sends no reset once the socket is gone.
pub(super) async fn end_abandoned(netns: &Netns, application: SocketAddr, client: SocketAddr) -> io::Result<bool> {
    netns
        .try_run(move || {
            let mut channel = Channel::open(NETLINK_SOCK_DIAG)?;
            let Some(left) = find(&mut channel, application, client)? else { return Ok(false) };
            // The agent may have connected once more with the same addresses and ports.
            if find(&mut channel, client, application)?.is_some() {
                return Ok(false);
            }
            // With its cookie, which no other socket has.
            match destroy(&mut channel, &left) {
                Ok(()) => Ok(true),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
                Err(error) => Err(error),
            }
        })
        .await?
}

/// The socket at `here` that is connected to `there`.
fn find(channel: &mut Channel, here: SocketAddr, there: SocketAddr) -> io::Result<Option<SocketId>> {
    let wanted = SocketId {
        source_address: here.ip(),
        source_port: here.port(),
        destination_address: there.ip(),
        destination_port: there.port(),
        cookie: NO_COOKIE,
        ..if here.is_ipv4() { SocketId::new_v4() } else { SocketId::new_v6() }
    };
    let answer = channel.get(SockDiagMessage::InetRequest(request(wanted, StateFlags::all())))?;
    // Where nothing is connected, the kernel finds what listens.
    Ok(match answer {
        Some(SockDiagMessage::InetResponse(found))
            if local(&found.header) == here && remote(&found.header) == there =>
        {
            Some(found.header.socket_id)
        }
        _ => None,
    })
}

/// Inodes of the sockets that listen on `port` in the namespace.
pub(super) async fn listeners(netns: &Netns, port: u16) -> io::Result<BTreeSet<u32>> {
    netns
        .try_run(move || {
            let sockets = sockets(&mut Channel::open(NETLINK_SOCK_DIAG)?, &StateFlags::LISTEN)?;
            let on_port = sockets.into_iter().filter(|socket| socket.socket_id.source_port == port);
            Ok(on_port.map(|socket| socket.inode).collect())
        })
        .await?
}

/// The connections to end, from two lists of all sockets, of which the second was read after the first.
fn plaintext(
    first: &[InetResponseHeader],
    second: &[InetResponseHeader],
    forbidden: impl Fn(SocketAddr, SocketAddr) -> bool,
) -> Vec<SocketId> {
    let listening: HashSet<u16> =
        first.iter().filter(|socket| socket.state == TCP_LISTEN).map(|socket| socket.socket_id.source_port).collect();
    // SYN_SENT is no other end: it may be a new connection that happens to use the same addresses and ports.
    let ends: HashSet<_> = first
        .iter()
        .chain(second)
        .filter(|socket| !matches!(socket.state, TCP_LISTEN | TCP_SYN_SENT))
        .map(|socket| (local(socket), remote(socket)))
        .collect();
    first
        .iter()
        .filter(|socket| {
            let port = socket.socket_id.source_port;
            // The time-wait timer also runs for sockets shown as FIN_WAIT2: no application, no data, and kernel 6.1 cannot end them.
            !matches!(socket.state, TCP_LISTEN | TCP_SYN_SENT)
                && socket.timer != Some(Timer::TimeWait)
                && listening.contains(&port)
                && !is_agent_port(port)
                && forbidden(local(socket), remote(socket))
                && !ends.contains(&(remote(socket), local(socket)))
        })
        .map(|socket| socket.socket_id.clone())
        .collect()
}

fn local(socket: &InetResponseHeader) -> SocketAddr {
    SocketAddr::new(socket.socket_id.source_address.to_canonical(), socket.socket_id.source_port)
}

fn remote(socket: &InetResponseHeader) -> SocketAddr {
    SocketAddr::new(socket.socket_id.destination_address.to_canonical(), socket.socket_id.destination_port)
}

fn sockets(channel: &mut Channel, states: &StateFlags) -> io::Result<Vec<InetResponseHeader>> {
    let mut sockets = Vec::new();
    for socket_id in [SocketId::new_v4(), SocketId::new_v6()] {
        let answers = channel.dump(&SockDiagMessage::InetRequest(request(socket_id, states.clone())))?;
        sockets.extend(answers.into_iter().filter_map(|answer| match answer {
            SockDiagMessage::InetResponse(response) => Some(response.header),
            _ => None,
        }));
    }
    Ok(sockets)
}

fn destroy(channel: &mut Channel, id: &SocketId) -> io::Result<()> {
    let request = request(id.clone(), StateFlags::all());
    channel.change(SockDiagDestroy::new(SockDiagMessage::InetRequest(request)), 0)
}

fn request(socket_id: SocketId, states: StateFlags) -> InetRequest {
    let family = match socket_id.source_address {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    };
    InetRequest { family, protocol: IPPROTO_TCP, extensions: ExtensionFlags::empty(), states, socket_id }
}

#[cfg(test)]
#[path = "netns_tests/sockdiag.rs"]
mod tests;
