//! `underpass/1`: one PROXY protocol v2 header, then the application's bytes.

use std::net::{IpAddr, SocketAddr};

use crate::{
    mesh::{Snapshot, Workload},
    telemetry::RefusalReason,
};

/// Longest header accepted, bytes: 16 fixed, 36 of addresses, the TLVs we know with a 253-byte host name, and room for TLVs we do not.
pub const MAX_HEADER: usize = 1024;

/// What the header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preamble {
    /// The client as its application knows itself.
    pub source: SocketAddr,
    /// The pod and port to connect to.
    pub destination: SocketAddr,
    /// TLV authority: service host name, for telemetry only.
    pub authority: Option<String>,
    /// TLV unique id: ties the two agents' log lines together.
    pub unique_id: Option<Vec<u8>>,
}

/// Writes the header with its CRC32C.
pub fn encode(preamble: &Preamble) -> Vec<u8> {
    let _ = preamble;
    todo!()
}

/// Reads a header from the start of `bytes`: `Ok(None)` when more bytes are needed, else the preamble and the header's length.
pub fn decode(bytes: &[u8]) -> Result<Option<(Preamble, usize)>, String> {
    let _ = bytes;
    todo!()
}

/// The receiver's checks: trusts nothing. Returns the application's port, or why not.
pub fn check(preamble: &Preamble, tunnel_peer: IpAddr, me: &Workload, mesh: &Snapshot) -> Result<u16, RefusalReason> {
    let _ = (preamble, tunnel_peer, me, mesh);
    todo!()
}
