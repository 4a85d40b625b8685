//! Packets, byte by byte.

use std::net::{IpAddr, SocketAddr};

/// TCP flags.
pub const SYN: u8 = 0x02;
/// See [`SYN`].
pub const ACK: u8 = 0x10;
/// See [`SYN`].
pub const RST: u8 = 0x04;

/// What precedes the IP header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// An Ethernet header.
    Ethernet,
    /// An Ethernet header and one 802.1Q tag.
    Vlan,
    /// An Ethernet header, an 802.1ad and an 802.1Q tag.
    DoubleVlan,
    /// Nothing: a point-to-point interface.
    None,
}

impl Link {
    /// All of them.
    pub const ALL: [Link; 4] = [Link::Ethernet, Link::Vlan, Link::DoubleVlan, Link::None];

    fn header(self, ethertype: u16) -> Vec<u8> {
        let tags: &[u16] = match self {
            Link::Ethernet => &[],
            Link::Vlan => &[0x8100],
            Link::DoubleVlan => &[0x88a8, 0x8100],
            Link::None => return Vec::new(),
        };
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        for (id, tag) in (1u16..).zip(tags) {
            bytes.extend(tag.to_be_bytes());
            bytes.extend(id.to_be_bytes());
        }
        bytes.extend(ethertype.to_be_bytes());
        bytes
    }

    /// Length of the header, in bytes.
    pub fn len(self) -> usize {
        self.header(0).len()
    }

    /// Is there no header?
    pub fn is_empty(self) -> bool {
        self == Link::None
    }
}

/// An IPv6 extension header. `Padded` lengths are in bytes and multiples of 8.
#[derive(Debug, Clone, Copy)]
pub enum Extension {
    /// Hop-by-hop options of this many bytes.
    HopByHop(u8),
    /// A routing header of this many bytes, with no segments left.
    Routing(u8),
    /// A fragment header: offset in units of 8 bytes, more fragments follow.
    Fragment(u16, bool),
    /// An authentication header of 24 bytes.
    Authentication,
    /// Destination options of this many bytes.
    Destination(u8),
}

impl Extension {
    fn number(self) -> u8 {
        match self {
            Extension::HopByHop(_) => 0,
            Extension::Routing(_) => 43,
            Extension::Fragment(..) => 44,
            Extension::Authentication => 51,
            Extension::Destination(_) => 60,
        }
    }

    fn bytes(self, next: u8) -> Vec<u8> {
        match self {
            Extension::HopByHop(length) | Extension::Routing(length) | Extension::Destination(length) => {
                let mut bytes = vec![0; usize::from(length)];
                (bytes[0], bytes[1]) = (next, length / 8 - 1);
                bytes
            }
            Extension::Fragment(offset, more) => {
                let [high, low] = (offset << 3 | u16::from(more)).to_be_bytes();
                vec![next, 0, high, low, 0, 0, 0, 7]
            }
            Extension::Authentication => {
                let mut bytes = vec![0; 24];
                (bytes[0], bytes[1]) = (next, 24 / 4 - 2);
                bytes
            }
        }
    }
}

/// A packet under construction.
#[derive(Debug, Clone)]
pub struct Packet {
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    payload: Vec<u8>,
    extensions: Vec<Extension>,
    options: u8,
    fragment: (u16, bool),
}

impl Packet {
    /// A TCP packet without data.
    pub fn tcp(src: SocketAddr, dst: SocketAddr, flags: u8) -> Self {
        let mut header = vec![0; 20];
        header[0..2].copy_from_slice(&src.port().to_be_bytes());
        header[2..4].copy_from_slice(&dst.port().to_be_bytes());
        (header[12], header[13]) = (5 << 4, flags);
        Self::new(src.ip(), dst.ip(), 6, header)
    }

    /// A UDP packet with 12 bytes of data.
    pub fn udp(src: SocketAddr, dst: SocketAddr) -> Self {
        let mut header = vec![0; 20];
        header[0..2].copy_from_slice(&src.port().to_be_bytes());
        header[2..4].copy_from_slice(&dst.port().to_be_bytes());
        header[5] = 20;
        Self::new(src.ip(), dst.ip(), 17, header)
    }

    /// Any protocol.
    pub fn new(src: IpAddr, dst: IpAddr, protocol: u8, payload: Vec<u8>) -> Self {
        assert_eq!(src.is_ipv4(), dst.is_ipv4(), "one family per packet");
        Self { src, dst, protocol, payload, extensions: Vec::new(), options: 0, fragment: (0, false) }
    }

    /// Makes it a fragment; the offset is in units of 8 bytes.
    #[must_use]
    pub fn fragment(mut self, offset: u16, more: bool) -> Self {
        if self.src.is_ipv4() {
            self.fragment = (offset, more);
        } else {
            self.extensions.push(Extension::Fragment(offset, more));
        }
        self
    }

    /// Appends IPv6 extension headers.
    #[must_use]
    pub fn extensions(mut self, extensions: &[Extension]) -> Self {
        assert!(self.src.is_ipv6(), "extension headers are IPv6's");
        self.extensions.extend(extensions);
        self
    }

    /// Adds bytes of IPv4 options, a multiple of 4.
    #[must_use]
    pub fn options(mut self, length: u8) -> Self {
        assert!(self.src.is_ipv4() && length.is_multiple_of(4) && length <= 40);
        self.options = length;
        self
    }

    /// Keeps only the first bytes of what follows the IP headers.
    #[must_use]
    pub fn payload_of(mut self, length: usize) -> Self {
        self.payload.truncate(length);
        self
    }

    /// The bytes, behind a link header.
    pub fn bytes(&self, link: Link) -> Vec<u8> {
        let mut bytes = link.header(if self.src.is_ipv4() { 0x0800 } else { 0x86dd });
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut header = vec![0; 20 + usize::from(self.options)];
                let total = (header.len() + self.payload.len()) as u16;
                header[0] = 4 << 4 | (header.len() / 4) as u8;
                header[2..4].copy_from_slice(&total.to_be_bytes());
                let (offset, more) = self.fragment;
                header[6..8].copy_from_slice(&(offset | u16::from(more) << 13).to_be_bytes());
                (header[8], header[9]) = (64, self.protocol);
                header[12..16].copy_from_slice(&src.octets());
                header[16..20].copy_from_slice(&dst.octets());
                header[20..].fill(1); // no-operation
                bytes.extend(header);
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let mut next = self.protocol;
                let mut chain = Vec::new();
                for extension in self.extensions.iter().rev() {
                    chain.splice(0..0, extension.bytes(next));
                    next = extension.number();
                }
                let length = (chain.len() + self.payload.len()) as u16;
                bytes.extend([6 << 4, 0, 0, 0]);
                bytes.extend(length.to_be_bytes());
                bytes.extend([next, 64]);
                bytes.extend(src.octets());
                bytes.extend(dst.octets());
                bytes.extend(chain);
            }
            _ => unreachable!("checked when it was made"),
        }
        bytes.extend(&self.payload);
        bytes
    }
}
