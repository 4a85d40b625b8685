//! What the sniffer wants to know of one packet.

use etherparse::{LaxSlicedPacket, TransportSlice};

/// A packet from its IP header on, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Packet<'a> {
    Tcp {
        source: u16,
        destination: u16,
        opening: bool,
        payload: &'a [u8],
    },
    Udp,
    /// Neither, or not the first fragment.
    Other,
}

impl<'a> Packet<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Self {
        match LaxSlicedPacket::from_ip(bytes).ok().and_then(|packet| packet.transport) {
            Some(TransportSlice::Tcp(tcp)) => Self::Tcp {
                source: tcp.source_port(),
                destination: tcp.destination_port(),
                opening: tcp.syn() && !tcp.ack(),
                payload: tcp.payload(),
            },
            Some(TransportSlice::Udp(_)) => Self::Udp,
            _ => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Packet;
    use etherparse::PacketBuilder;

    #[test]
    fn tcp_and_udp_are_told_apart() {
        let mut bytes = Vec::new();
        PacketBuilder::ipv6([1; 16], [2; 16], 64).tcp(40000, 15008, 1, 1000).write(&mut bytes, b"abc").unwrap();
        assert_eq!(
            Packet::parse(&bytes),
            Packet::Tcp { source: 40000, destination: 15008, opening: false, payload: b"abc" }
        );
        bytes.clear();
        PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .tcp(40000, 80, 1, 1000)
            .syn()
            .write(&mut bytes, b"")
            .unwrap();
        assert_eq!(Packet::parse(&bytes), Packet::Tcp { source: 40000, destination: 80, opening: true, payload: b"" });
        bytes.clear();
        PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64).udp(53, 53).write(&mut bytes, b"q").unwrap();
        assert_eq!(Packet::parse(&bytes), Packet::Udp);
        assert_eq!(Packet::parse(b"\x45"), Packet::Other);
    }
}
