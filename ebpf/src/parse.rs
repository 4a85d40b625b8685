//! Just enough packet parsing to judge TCP. Bytes are copied out with a helper: a packet need not be linear, and a
//! failed copy is an ordinary answer.

use aya_ebpf::programs::TcContext;
use underpass_abi::Address;

use crate::{events::Ends, socket};

/// What precedes the IP header.
#[derive(Clone, Copy)]
pub enum Link {
    Ethernet,
    None,
}

/// A packet with readable addresses. Flat and always initialised: values left undefined in some variant of an enum
/// become reads of unwritten registers, which the verifier refuses.
pub struct Packet {
    pub src: Address,
    pub dst: Address,
    pub payload: Payload,
}

/// What a packet carries.
#[derive(Clone, Copy)]
pub struct Payload {
    pub kind: Kind,
    /// TCP and UDP ports, host byte order; 0 for other kinds.
    pub src_port: u16,
    pub dst_port: u16,
    /// TCP flags; 0 for other kinds.
    pub flags: u8,
}

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// TCP with its whole header.
    Tcp,
    /// UDP with its ports.
    Udp,
    /// A fragment of TCP (or of what could be TCP) without the whole TCP header.
    TcpPiece,
    /// Could be TCP, and ends or goes on in a way that does not let us find out.
    Unparsable,
    /// Neither.
    Other,
}

impl Payload {
    /// Opens a TCP connection?
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        self.flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }
}

impl From<Kind> for Payload {
    #[inline(always)]
    fn from(kind: Kind) -> Self {
        Self { kind, src_port: 0, dst_port: 0, flags: 0 }
    }
}

const TCP_SYN: u8 = 0x02;
const TCP_ACK: u8 = 0x10;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// 802.1Q and 802.1ad tags.
const ETHERTYPE_VLAN: [u16; 2] = [0x8100, 0x88a8];

const HOP_BY_HOP: u8 = 0;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// IPv6 extension headers that are walked. RFC 8200 section 4.1 recommends each at most once, destination options twice.
const MAX_EXTENSIONS: usize = 6;

/// Parses a packet; `None` when it is not IP or too short for the addresses, which no IP stack accepts either.
#[inline(always)]
pub fn parse(ctx: &TcContext, link: Link) -> Option<Packet> {
    let (ethertype, offset) = match link {
        Link::Ethernet => ethernet(ctx)?,
        Link::None => (if ctx.load::<u8>(0).ok()? >> 4 == 6 { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 }, 0),
    };
    match ethertype {
        ETHERTYPE_IPV4 => ipv4(ctx, offset),
        ETHERTYPE_IPV6 => ipv6(ctx, offset),
        _ => None,
    }
}

/// EtherType behind up to two tags in the packet itself (tags the device strips are not in the data), and where it ends.
#[inline(always)]
fn ethernet(ctx: &TcContext) -> Option<(u16, usize)> {
    let mut offset = 12;
    for _ in 0..2 {
        let ethertype = u16::from_be_bytes(ctx.load(offset).ok()?);
        if ethertype != ETHERTYPE_VLAN[0] && ethertype != ETHERTYPE_VLAN[1] {
            return Some((ethertype, offset + 2));
        }
        offset += 4;
    }
    Some((u16::from_be_bytes(ctx.load(offset).ok()?), offset + 2))
}

#[inline(always)]
fn ipv4(ctx: &TcContext, offset: usize) -> Option<Packet> {
    let header: [u8; 20] = ctx.load(offset).ok()?;
    if header[0] >> 4 != 4 {
        return None;
    }
    let length = usize::from(header[0] & 0xf) * 4;
    let fragment = u16::from_be_bytes([header[6], header[7]]);
    let (more, later) = (fragment & 0x2000 != 0, fragment & 0x1fff != 0);
    let payload = match header[9] {
        TCP if later => Kind::TcpPiece.into(),
        TCP if length < 20 => Kind::Unparsable.into(),
        TCP => tcp(ctx, offset + length, more),
        UDP if !later => udp(ctx, offset + length),
        _ => Kind::Other.into(),
    };
    Some(Packet {
        src: socket::mapped(u32::from_ne_bytes([header[12], header[13], header[14], header[15]])),
        dst: socket::mapped(u32::from_ne_bytes([header[16], header[17], header[18], header[19]])),
        payload,
    })
}

#[inline(always)]
fn ipv6(ctx: &TcContext, offset: usize) -> Option<Packet> {
    let header: [u8; 8] = ctx.load(offset).ok()?;
    let src: Address = ctx.load(offset + 8).ok()?;
    let dst: Address = ctx.load(offset + 24).ok()?;
    if header[0] >> 4 != 6 {
        return None;
    }
    Some(Packet { src, dst, payload: ipv6_payload(ctx, offset + 40, header[6]) })
}

#[inline(always)]
fn ipv6_payload(ctx: &TcContext, mut offset: usize, mut next: u8) -> Payload {
    let mut first_fragment = false;
    for _ in 0..MAX_EXTENSIONS {
        if !is_extension(next) {
            break;
        }
        let Ok(extension) = ctx.load::<[u8; 4]>(offset) else { return Kind::Unparsable.into() };
        let kind = next;
        next = extension[0];
        match kind {
            FRAGMENT => {
                let fragment = u16::from_be_bytes([extension[2], extension[3]]);
                if fragment & 0xfff8 != 0 {
                    // behind an extension header the rest of the packet could be anything
                    return if next == TCP || is_extension(next) { Kind::TcpPiece } else { Kind::Other }.into();
                }
                first_fragment |= fragment & 1 != 0;
                offset += 8;
            }
            AUTHENTICATION => offset += (usize::from(extension[1]) + 2) * 4,
            _ => offset += (usize::from(extension[1]) + 1) * 8,
        }
    }
    match next {
        TCP => tcp(ctx, offset, first_fragment),
        UDP => udp(ctx, offset),
        next if is_extension(next) => Kind::Unparsable.into(),
        _ => Kind::Other.into(),
    }
}

#[inline(always)]
fn is_extension(header: u8) -> bool {
    matches!(header, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS)
}

#[inline(always)]
fn tcp(ctx: &TcContext, offset: usize, first_fragment: bool) -> Payload {
    match ctx.load::<[u8; 20]>(offset) {
        Ok(header) => Payload {
            kind: Kind::Tcp,
            src_port: u16::from_be_bytes([header[0], header[1]]),
            dst_port: u16::from_be_bytes([header[2], header[3]]),
            flags: header[13],
        },
        Err(_) if first_fragment => Kind::TcpPiece.into(),
        Err(_) => Kind::Unparsable.into(),
    }
}

#[inline(always)]
fn udp(ctx: &TcContext, offset: usize) -> Payload {
    match ctx.load::<[u8; 4]>(offset) {
        Ok(header) => Payload {
            kind: Kind::Udp,
            src_port: u16::from_be_bytes([header[0], header[1]]),
            dst_port: u16::from_be_bytes([header[2], header[3]]),
            flags: 0,
        },
        Err(_) => Kind::Other.into(),
    }
}

impl Packet {
    /// Was it an IPv4 packet? (An IPv6 header with v4-mapped addresses is looked up as IPv4 too, and no stack accepts one.)
    #[inline(always)]
    pub fn is_ipv4(&self) -> bool {
        socket::is_v4_mapped(&self.dst)
    }

    /// For an event.
    #[inline(always)]
    pub fn ends(&self) -> Ends {
        Ends { src: self.src, dst: self.dst, src_port: self.payload.src_port, dst_port: self.payload.dst_port }
    }
}
