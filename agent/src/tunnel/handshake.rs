//! Drives rustls' unbuffered API over a non-blocking socket until traffic keys can be taken out.

use tokio::net::TcpStream;

use super::{Session, TlsConfigs, TunnelError};
use crate::mesh::SpiffeId;

/// Handshakes as a client. The peer must prove `peer` and choose [`super::ALPN_NATIVE`]. The caller bounds the time.
pub async fn connect(
    stream: TcpStream,
    configs: &TlsConfigs,
    local: &SpiffeId,
    peer: &SpiffeId,
) -> Result<Session, TunnelError> {
    let _ = (stream, configs, local, peer);
    todo!()
}

/// Handshakes as a server. Refusals have been sent to the peer as alerts (drained as [`Session::refuse`] does) when this returns
/// an error. The caller bounds the time.
pub async fn accept(stream: TcpStream, configs: &TlsConfigs, local: &SpiffeId) -> Result<Session, TunnelError> {
    let _ = (stream, configs, local);
    todo!()
}
