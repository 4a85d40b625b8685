//! TCP connections from inside a pod's namespace.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use tokio::net::{TcpSocket, TcpStream};

use crate::capture::Pod;

/// Connects to `to` from the pod, as the pod: from `from` when the application had bound that address, else from the
/// address the pod's routes choose.
pub(super) async fn upstream(
    pod: &Pod,
    from: Option<IpAddr>,
    to: SocketAddr,
    limit: Duration,
) -> io::Result<TcpStream> {
    let socket = pod.upstream_socket(to.ip()).await?;
    if let Some(from) = from {
        // Only the address is wanted: connect() then picks the port by the whole 4-tuple.
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(&SocketAddr::new(from, 0).into())?;
    }
    connect(socket, to, limit).await
}

/// Connects to the pod's application as the original client.
pub(super) async fn application(
    pod: &Pod,
    as_client: IpAddr,
    to: SocketAddr,
    limit: Duration,
) -> io::Result<TcpStream> {
    connect(pod.application_socket(as_client).await?, to, limit).await
}

async fn connect(socket: socket2::Socket, to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let socket = TcpSocket::from_std_stream(socket.into());
    tokio::time::timeout(limit, socket.connect(to))
        .await
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {limit:?}"))))
}
