//! UDP there and back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tokio::net::UdpSocket;

use crate::{print, sockets::Target};

/// Largest datagram.
const LARGEST: usize = 65_535;

/// Sends every datagram back.
pub(crate) async fn serve(listen: SocketAddr) -> Result<Value> {
    let socket = UdpSocket::bind(listen).await.with_context(|| format!("binding to {listen}"))?;
    print(&json!({ "listening": socket.local_addr()? }));
    let mut datagram = vec![0; LARGEST];
    loop {
        let (length, peer) = socket.recv_from(&mut datagram).await.context("receiving")?;
        socket.send_to(&datagram[..length], peer).await.with_context(|| format!("answering {peer}"))?;
    }
}

/// One datagram there and back on a connected socket: `{"peer", "local"}`.
pub(crate) async fn ask(target: &Target) -> Result<Value> {
    let any: IpAddr =
        if target.address().is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(target.bind_address().unwrap_or(any), 0)).await.context("binding")?;
    socket.connect(target.address()).await.with_context(|| format!("connecting to {}", target.address()))?;
    socket.send(b"ping").await.context("sending")?;
    let mut datagram = [0; 16];
    let length = socket.recv(&mut datagram).await.context("receiving")?;
    ensure!(&datagram[..length] == b"ping", "got {:?} back", &datagram[..length]);
    Ok(json!({ "peer": socket.peer_addr()?, "local": socket.local_addr()? }))
}
