//! `underpass/1`: one PROXY protocol v2 header, then the application's bytes.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crc::{CRC_32_ISCSI, Crc};
use ppp::v2::{Addresses, Builder, Command, Header, IPv4, IPv6, PROTOCOL_PREFIX, Protocol, Type, Version};
use underpass_abi::is_agent_port;

use crate::{
    mesh::{Snapshot, Workload},
    telemetry::RefusalReason,
};

/// Longest header accepted, bytes: 16 fixed, 36 of addresses, the TLVs we know with a 253-byte host name, and room for TLVs we do not.
pub const MAX_HEADER: usize = 1024;

/// Bytes before the addresses: signature, version and command, family and protocol, length.
const FIXED: usize = 16;
/// Bytes of a TLV before its value: type and length.
const TLV_HEADER: usize = 3;
/// Version 2, command PROXY (PROXY protocol specification, section 2.2).
const VERSION_COMMAND: u8 = 0x21;
/// TCP over IPv4.
const TCP4: u8 = 0x11;
/// TCP over IPv6.
const TCP6: u8 = 0x21;
/// Longest authority, bytes: a host name has 253, and there may be a port.
const MAX_AUTHORITY: usize = 255;
/// Longest unique id, bytes (specification, section 2.2.5).
const MAX_UNIQUE_ID: usize = 128;
/// The checksum of TLV `PP2_TYPE_CRC32C`.
const CRC32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

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
///
/// Addresses are written in one family: as IPv4 when both are (IPv4-mapped ones included), else as IPv6. An authority or
/// unique id that no receiver would accept is left out.
pub fn encode(preamble: &Preamble) -> Vec<u8> {
    let authority = preamble.authority.as_deref().filter(|a| plausible_authority(a));
    let unique_id = preamble.unique_id.as_deref().filter(|id| !id.is_empty() && id.len() <= MAX_UNIQUE_ID);
    let addresses = addresses(preamble.source, preamble.destination);
    let crc_at = FIXED + addresses.len() + TLV_HEADER;

    let tlvs = [
        (Type::CRC32C, Some([0; 4].as_slice())),
        (Type::Authority, authority.map(str::as_bytes)),
        (Type::UniqueId, unique_id),
    ];
    let mut header = tlvs
        .into_iter()
        .filter_map(|(kind, value)| Some((kind, value?)))
        .try_fold(
            Builder::with_addresses(Version::Two | Command::Proxy, Protocol::Stream, addresses),
            |builder, (kind, value)| builder.write_tlv(kind, value),
        )
        .and_then(Builder::build)
        .expect("all parts are bounded far below the format's 64 KiB");
    let crc = CRC32C.checksum(&header);
    header[crc_at..crc_at + 4].copy_from_slice(&crc.to_be_bytes());
    header
}

/// Reads a header from the start of `bytes`: `Ok(None)` when more bytes are needed, else the preamble and the header's length.
///
/// IPv4-mapped addresses come out as IPv4. Bytes that can not become a header are refused at the first wrong one.
pub fn decode(bytes: &[u8]) -> Result<Option<(Preamble, usize)>, String> {
    let Some(length) = announced_length(bytes)? else { return Ok(None) };
    let Some(header) = bytes.get(..length) else { return Ok(None) };
    let header = Header::try_from(header).map_err(|e| e.to_string())?;
    let (source, destination): (SocketAddr, SocketAddr) = match header.addresses {
        Addresses::IPv4(a) => {
            ((a.source_address, a.source_port).into(), (a.destination_address, a.destination_port).into())
        }
        Addresses::IPv6(a) => {
            ((a.source_address, a.source_port).into(), (a.destination_address, a.destination_port).into())
        }
        Addresses::Unix(_) | Addresses::Unspecified => return Err("address family is neither IPv4 nor IPv6".into()),
    };
    let mut preamble =
        Preamble { source: canonical(source), destination: canonical(destination), authority: None, unique_id: None };
    read_tlvs(&header, &mut preamble)?;
    Ok(Some((preamble, length)))
}

/// The receiver's checks: trusts nothing. Returns the application's port, or why not.
pub fn check(preamble: &Preamble, tunnel_peer: IpAddr, me: &Workload, mesh: &Snapshot) -> Result<u16, RefusalReason> {
    let destination = canonical(preamble.destination);
    if !reachable(destination.ip()) {
        return Err(RefusalReason::ProxyDestination);
    }
    let port = mesh.accepts(me, destination).ok_or(RefusalReason::ProxyDestination)?;
    if port == 0 || is_agent_port(port) {
        return Err(RefusalReason::ProxyDestination);
    }
    let source = preamble.source.ip().to_canonical();
    if source != tunnel_peer.to_canonical() || !reachable(source) {
        return Err(RefusalReason::ProxySource);
    }
    Ok(port)
}

/// Could this be the address of a pod?
fn reachable(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(a) if a.is_broadcast());
    !(address.is_loopback() || address.is_unspecified() || address.is_multicast() || broadcast)
}

/// Checks the fixed part as far as it is there. The length of the whole header once it is known.
fn announced_length(bytes: &[u8]) -> Result<Option<usize>, String> {
    if let Some(at) = bytes.iter().zip(PROTOCOL_PREFIX).position(|(a, b)| a != b) {
        return Err(format!("byte {at} is {:#04x}: not the PROXY v2 signature", bytes[at]));
    }
    let Some(&[version_command, ref rest @ ..]) = bytes.get(PROTOCOL_PREFIX.len()..) else { return Ok(None) };
    if version_command != VERSION_COMMAND {
        return Err(format!(
            "version and command are {version_command:#04x}, only PROXY v2 ({VERSION_COMMAND:#04x}) is accepted"
        ));
    }
    let &[family, ref rest @ ..] = rest else { return Ok(None) };
    if !matches!(family, TCP4 | TCP6) {
        return Err(format!("family and protocol are {family:#04x}, only TCP over IPv4 or IPv6 is accepted"));
    }
    let &[high, low, ..] = rest else { return Ok(None) };
    let length = FIXED + usize::from(u16::from_be_bytes([high, low]));
    if length > MAX_HEADER {
        return Err(format!("header of {length} bytes, at most {MAX_HEADER} are accepted"));
    }
    Ok(Some(length))
}

fn read_tlvs(header: &Header<'_>, preamble: &mut Preamble) -> Result<(), String> {
    let bytes = header.as_bytes();
    let mut offset = bytes.len() - header.tlv_bytes().len();
    let mut seen = [false; 256];
    for tlv in header.tlvs() {
        let tlv = tlv.map_err(|e| e.to_string())?;
        if std::mem::replace(&mut seen[usize::from(tlv.kind)], true) {
            return Err(format!("TLV {:#04x} occurs twice", tlv.kind));
        }
        let value = offset + TLV_HEADER;
        offset = value + tlv.len();
        if tlv.kind == u8::from(Type::CRC32C) {
            check_crc(bytes, value, &tlv.value)?;
        } else if tlv.kind == u8::from(Type::Authority) {
            let authority = std::str::from_utf8(&tlv.value).ok().filter(|a| plausible_authority(a));
            preamble.authority = Some(authority.ok_or("authority is not a host name")?.to_owned());
        } else if tlv.kind == u8::from(Type::UniqueId) {
            if tlv.is_empty() || tlv.len() > MAX_UNIQUE_ID {
                return Err(format!("unique id of {} bytes, 1 to {MAX_UNIQUE_ID} are accepted", tlv.len()));
            }
            preamble.unique_id = Some(tlv.value.into_owned());
        }
    }
    Ok(())
}

/// The checksum covers the whole header with its own value as zeros.
fn check_crc(header: &[u8], at: usize, value: &[u8]) -> Result<(), String> {
    let announced = <[u8; 4]>::try_from(value).map_err(|_| format!("CRC32C of {} bytes", value.len()))?;
    let mut digest = CRC32C.digest();
    digest.update(&header[..at]);
    digest.update(&[0; 4]);
    digest.update(&header[at + 4..]);
    if digest.finalize() == u32::from_be_bytes(announced) { Ok(()) } else { Err("CRC32C does not match".into()) }
}

fn plausible_authority(authority: &str) -> bool {
    !authority.is_empty()
        && authority.len() <= MAX_AUTHORITY
        && !authority.chars().any(|c| c.is_control() || c.is_whitespace())
}

fn addresses(source: SocketAddr, destination: SocketAddr) -> Addresses {
    match (source.ip().to_canonical(), destination.ip().to_canonical()) {
        (IpAddr::V4(s), IpAddr::V4(d)) => IPv4::new(s, d, source.port(), destination.port()).into(),
        (s, d) => IPv6::new(v6(s), v6(d), source.port(), destination.port()).into(),
    }
}

fn v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(a) => a.to_ipv6_mapped(),
        IpAddr::V6(a) => a,
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
