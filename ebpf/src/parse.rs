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

impl Link {
    /// Length of the header without tags, in bytes.
    #[inline(always)]
    pub fn header(self) -> usize {
        match self {
            Self::Ethernet => 14,
            Self::None => 0,
        }
    }
}

/// A packet with readable addresses. Flat and always initialised: values left undefined in some variant of an enum
/// become reads of unwritten registers, which the verifier refuses.
pub struct Packet {
    pub src: Address,
    pub dst: Address,
    /// Where the IP header begins, in bytes from the start of the packet.
    pub network: usize,
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
    /// Not 0 when the rest of it is in other fragments; known for TCP only. The bits as they are in
    /// the packet, which no path decides: the verifier would walk through all that follows once for
    /// each answer.
    pub fragmented: u16,
    /// Where the TCP header begins, in bytes from the start of the packet; 0 for other kinds.
    pub offset: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// TCP with its whole header.
    Tcp,
    /// UDP with its ports.
    Udp,
    /// A fragment that may hold a part of the TCP header, but not all of it: ports and flags would
    /// be judged on bytes that are not there, or that another fragment replaces.
    TcpPiece,
    /// A fragment that begins behind the TCP header. The receiver needs the first fragment to make
    /// a packet of it, and that one is judged like a whole packet. Linux discards a packet whose
    /// fragments overlap (RFC 5722; IPv4 since 4.19).
    TcpRest,
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
        Self { kind, src_port: 0, dst_port: 0, flags: 0, fragmented: 0, offset: 0 }
    }
}

pub const TCP_SYN: u8 = 0x02;
pub const TCP_RST: u8 = 0x04;
pub const TCP_ACK: u8 = 0x10;

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

/// Lengths of the IP headers without options and extension headers.
pub const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
/// Length of a TCP header without options, which ports and flags are in.
pub const TCP_HEADER: usize = 20;
/// Fragments begin at multiples of 8 bytes: this one and those above lie behind the TCP header.
const REST: u16 = 3;

/// IPv6 extension headers that are walked. RFC 8200 section 4.1 recommends each at most once, destination options twice.
const MAX_EXTENSIONS: usize = 6;

/// Parses a packet; `None` when it is not IP or too short for the addresses, which no IP stack accepts either.
#[inline(always)]
pub fn parse(ctx: &TcContext, link: Link) -> Option<Packet> {
    let (ethertype, offset) = match link {
        Link::Ethernet => ethernet(ctx)?,
        Link::None => (version(ctx)?, 0),
    };
    match ethertype {
        ETHERTYPE_IPV4 => ipv4(ctx, offset),
        ETHERTYPE_IPV6 => ipv6(ctx, offset),
        _ => None,
    }
}

/// Reads a packet with TCP that has nothing between its headers; `None` for any other.
#[inline(always)]
pub fn plain(ctx: &TcContext, link: Link) -> Option<Packet> {
    let network = link.header();
    let ethertype = match link {
        Link::Ethernet => u16::from_be_bytes(ctx.load(network - 2).ok()?),
        Link::None => version(ctx)?,
    };
    let (src, dst, header) = if ethertype == ETHERTYPE_IPV4 {
        let header: [u8; IPV4_HEADER] = ctx.load(network).ok()?;
        if header[0] != 0x45 || header[9] != TCP {
            return None;
        }
        let (src, dst) = ipv4_addresses(&header);
        (src, dst, IPV4_HEADER)
    } else {
        let header: [u8; 8] = ctx.load(network).ok()?;
        if ethertype != ETHERTYPE_IPV6 || header[0] >> 4 != 6 || header[6] != TCP {
            return None;
        }
        (ctx.load(network + 8).ok()?, ctx.load(network + 24).ok()?, IPV6_HEADER)
    };
    Some(Packet { src, dst, network, payload: tcp(ctx, network + header, 0, usize::MAX) })
}

/// EtherType of a packet without a link-layer header.
#[inline(always)]
fn version(ctx: &TcContext) -> Option<u16> {
    Some(if ctx.load::<u8>(0).ok()? >> 4 == 6 { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 })
}

/// EtherType behind up to two tags in the packet itself (tags the device strips are not in the data), and where it ends.
#[inline(always)]
fn ethernet(ctx: &TcContext) -> Option<(u16, usize)> {
    let mut offset = 12;
    for _ in 0..2 {
        let ethertype = u16::from_be_bytes(ctx.load(offset).ok()?);
        if !is_tag(ethertype) {
            return Some((ethertype, offset + 2));
        }
        offset += 4;
    }
    Some((u16::from_be_bytes(ctx.load(offset).ok()?), offset + 2))
}

/// Are there more VLAN tags than [`parse`] looks behind? A receiver takes off any number of tags
/// that carry a priority only, so anything could be there, to any address. For what [`parse`] has
/// given up on: as another kind of packet it would multiply the states that the verifier walks
/// through.
#[inline(always)]
pub fn is_hidden_by_tags(ctx: &TcContext, link: Link) -> bool {
    let tag = |at| ctx.load(at).is_ok_and(|bytes| is_tag(u16::from_be_bytes(bytes)));
    matches!(link, Link::Ethernet) && tag(12) && tag(16) && tag(20)
}

#[inline(always)]
fn is_tag(ethertype: u16) -> bool {
    ethertype == ETHERTYPE_VLAN[0] || ethertype == ETHERTYPE_VLAN[1]
}

#[inline(always)]
fn ipv4(ctx: &TcContext, offset: usize) -> Option<Packet> {
    let header: [u8; IPV4_HEADER] = ctx.load(offset).ok()?;
    if header[0] >> 4 != 4 {
        return None;
    }
    let length = usize::from(header[0] & 0xf) * 4;
    let fragment = u16::from_be_bytes([header[6], header[7]]);
    let (more, later) = (fragment & 0x2000, fragment & 0x1fff);
    let end = offset + usize::from(u16::from_be_bytes([header[2], header[3]]));
    let payload = match header[9] {
        TCP if later != 0 => later_fragment(later).into(),
        TCP if length < 20 => Kind::Unparsable.into(),
        TCP => tcp(ctx, offset + length, more, end),
        UDP if later == 0 => udp(ctx, offset + length),
        _ => Kind::Other.into(),
    };
    let (src, dst) = ipv4_addresses(&header);
    Some(Packet { src, dst, network: offset, payload })
}

/// Source and destination.
#[inline(always)]
fn ipv4_addresses(header: &[u8; IPV4_HEADER]) -> (Address, Address) {
    (
        socket::mapped(u32::from_ne_bytes([header[12], header[13], header[14], header[15]])),
        socket::mapped(u32::from_ne_bytes([header[16], header[17], header[18], header[19]])),
    )
}

#[inline(always)]
fn ipv6(ctx: &TcContext, offset: usize) -> Option<Packet> {
    let header: [u8; 8] = ctx.load(offset).ok()?;
    let src: Address = ctx.load(offset + 8).ok()?;
    let dst: Address = ctx.load(offset + 24).ok()?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let end = offset + IPV6_HEADER + usize::from(u16::from_be_bytes([header[4], header[5]]));
    Some(Packet { src, dst, network: offset, payload: ipv6_payload(ctx, offset + IPV6_HEADER, header[6], end) })
}

#[inline(always)]
fn ipv6_payload(ctx: &TcContext, mut offset: usize, mut next: u8, end: usize) -> Payload {
    let mut first_fragment = 0;
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
                    let later = fragment >> 3;
                    return if next == TCP || is_extension(next) { later_fragment(later) } else { Kind::Other }.into();
                }
                first_fragment |= fragment & 1;
                offset += 8;
            }
            AUTHENTICATION => offset += (usize::from(extension[1]) + 2) * 4,
            _ => offset += (usize::from(extension[1]) + 1) * 8,
        }
    }
    match next {
        TCP => tcp(ctx, offset, first_fragment, end),
        UDP => udp(ctx, offset),
        next if is_extension(next) => Kind::Unparsable.into(),
        _ => Kind::Other.into(),
    }
}

#[inline(always)]
fn is_extension(header: u8) -> bool {
    matches!(header, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS)
}

/// `at` is where the fragment begins in the packet, in units of 8 bytes.
#[inline(always)]
fn later_fragment(at: u16) -> Kind {
    if at < REST { Kind::TcpPiece } else { Kind::TcpRest }
}

/// `end` is where the packet ends by its IP header: what a first fragment has behind it is padding,
/// and the receiver takes that part of the TCP header from another fragment.
#[inline(always)]
fn tcp(ctx: &TcContext, offset: usize, first_fragment: u16, end: usize) -> Payload {
    if offset + TCP_HEADER > end && first_fragment != 0 {
        return Kind::TcpPiece.into();
    }
    match ctx.load::<[u8; TCP_HEADER]>(offset) {
        Ok(header) => Payload {
            kind: Kind::Tcp,
            src_port: u16::from_be_bytes([header[0], header[1]]),
            dst_port: u16::from_be_bytes([header[2], header[3]]),
            flags: header[13],
            fragmented: first_fragment,
            offset,
        },
        Err(_) if first_fragment != 0 => Kind::TcpPiece.into(),
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
            ..Kind::Udp.into()
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
