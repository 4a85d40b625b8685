//! Answers a refused packet with a TCP reset, so that its sender knows at once.
//!
//! The packet itself is turned around and leaves through the interface that it came in by: no
//! route, no socket and no agent is needed. At most one answer for a packet, and none for a reset
//! or for what was not sent to this pod alone, so two pods cannot keep each other busy. Whatever
//! cannot be answered is dropped.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM, TC_ACT_SHOT},
    helpers::generated::{
        bpf_csum_update, bpf_l4_csum_replace, bpf_redirect, bpf_skb_change_tail, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use underpass_abi::POD_SILENT;

use crate::{
    maps::PODS_BY_ID,
    parse::{self, IPV4_HEADER, Link, Packet, Payload, TCP_ACK, TCP_HEADER, TCP_RST},
    socket,
};

/// `PACKET_HOST` of `linux/if_packet.h`: sent to this interface's own link-layer address.
const PACKET_HOST: u32 = 0;
const HOP_LIMIT: u8 = 64;
const TCP: u8 = 6;
/// Where the checksum is in a TCP header.
const CHECKSUM: usize = 16;

/// Sends a reset back, or drops the packet where that is not wanted or not possible. Returns the
/// program's verdict.
#[inline(always)]
pub fn answer(ctx: &TcContext, link: Link, pod_id: u32) -> i32 {
    // A pod without an entry is being released: its client tries again, and then nothing is in the
    // way. SAFETY: the reference is not kept.
    let silent = unsafe { PODS_BY_ID.get(pod_id) }.is_none_or(|pod| pod.flags & POD_SILENT != 0);
    if silent {
        return TC_ACT_SHOT;
    }
    turn(ctx, link).unwrap_or(TC_ACT_SHOT)
}

#[inline(always)]
fn turn(ctx: &TcContext, link: Link) -> Option<i32> {
    let skb = ctx.skb.skb;
    // SAFETY: fields of the context.
    let (kind, interface) =
        unsafe { ((&raw const (*skb).pkt_type).read_volatile(), (&raw const (*skb).ifindex).read_volatile()) };
    // Packets with options or extension headers would need them taken out, and nobody's ordinary
    // SYN has any. Tags are in the packet itself only where there are two: the kernel has taken off
    // the first. The packet is read once more, at the one place where each header is then, so that
    // the verifier does not walk through this once for every way in which the packet was judged.
    let packet = parse::plain(ctx, link)?;
    if kind != PACKET_HOST || !is_one_host(&packet) {
        return None;
    }
    let Packet { network, payload, .. } = packet;
    let header = reset(ctx, &payload)?;
    // SAFETY: the context's packet. From here on it is only sent or dropped.
    let cut = unsafe { bpf_skb_change_tail(skb, (payload.offset + TCP_HEADER) as u32, 0) };
    (cut == 0).then_some(())?;
    if network != 0 {
        let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5] = ctx.load::<[u8; 12]>(0).ok()?;
        // The checksum that a device may have made does not cover these.
        store(skb, 0, &[s0, s1, s2, s3, s4, s5, d0, d1, d2, d3, d4, d5], 0)?;
    }
    let pseudo = if packet.is_ipv4() { ipv4(skb, &packet)? } else { ipv6(skb, &packet)? };
    tcp(skb, payload.offset, header, pseudo)?;
    // SAFETY: numbers only.
    i32::try_from(unsafe { bpf_redirect(interface, 0) }).ok()
}

/// Is the sender one that can be answered?
#[inline(always)]
fn is_one_host(packet: &Packet) -> bool {
    let src = &packet.src;
    let many = if packet.is_ipv4() { src[12] >= 224 || src[12] == 0 } else { src[0] == 0xff };
    !many && !socket::is_unspecified(src) && !socket::is_loopback(src)
}

/// The TCP header of the reset, as words in memory order (RFC 9293, 3.5.2). `None` for what is not
/// answered.
#[inline(always)]
fn reset(ctx: &TcContext, payload: &Payload) -> Option<[u32; 5]> {
    let ports = u32::from(payload.dst_port) << 16 | u32::from(payload.src_port);
    let words = |sequence: u32, acknowledgement: u32, flags: u8| {
        [ports.to_be(), sequence, acknowledgement, (5 << 28 | u32::from(flags) << 16).to_be(), 0]
    };
    let [s0, s1, s2, s3, a0, a1, a2, a3] = ctx.load::<[u8; 8]>(payload.offset + 4).ok()?;
    if payload.flags & TCP_RST != 0 {
        None
    } else if payload.flags & TCP_ACK != 0 {
        Some(words(u32::from_ne_bytes([a0, a1, a2, a3]), 0, TCP_RST))
    } else if payload.is_syn() {
        // Data that a SYN may carry is not acknowledged: the sender need not have received more
        // than the SYN's own answer.
        let next = u32::from_be_bytes([s0, s1, s2, s3]).wrapping_add(1);
        Some(words(0, next.to_be(), TCP_RST | TCP_ACK))
    } else {
        None
    }
}

/// Writes the IPv4 header; returns the sum of the pseudo-header that TCP's checksum covers.
#[inline(always)]
fn ipv4(skb: *mut __sk_buff, packet: &Packet) -> Option<u64> {
    const LENGTH: u32 = (IPV4_HEADER + TCP_HEADER) as u32;
    /// "Don't fragment".
    const DF: u32 = 0x4000;
    let ([.., src], [.., dst]) = (socket::words(&packet.src), socket::words(&packet.dst));
    let [first, second] = [(0x45 << 24 | LENGTH).to_be(), DF.to_be()];
    let third = |checksum: u16| u32::from(HOP_LIMIT) << 24 | u32::from(TCP) << 16 | u32::from(checksum);
    let sum = u64::from(first) + u64::from(second) + u64::from(third(0).to_be()) + u64::from(src) + u64::from(dst);
    let checksum = u16::from_be(!(fold(sum) as u16));
    let header = [first, second, third(checksum).to_be(), dst, src];
    store(skb, packet.network, &header, u64::from(BPF_F_RECOMPUTE_CSUM))?;
    Some(u64::from(src) + u64::from(dst) + u64::from((u32::from(TCP) << 16 | TCP_HEADER as u32).to_be()))
}

/// The same for IPv6.
#[inline(always)]
fn ipv6(skb: *mut __sk_buff, packet: &Packet) -> Option<u64> {
    let length = (TCP_HEADER as u32) << 16 | u32::from(TCP) << 8 | u32::from(HOP_LIMIT);
    let recompute = u64::from(BPF_F_RECOMPUTE_CSUM);
    store(skb, packet.network, &[(6u32 << 28).to_be(), length.to_be()], recompute)?;
    store(skb, packet.network + 8, &packet.dst, recompute)?;
    store(skb, packet.network + 24, &packet.src, recompute)?;
    let ([s0, s1, s2, s3], [d0, d1, d2, d3]) = (socket::words(&packet.src), socket::words(&packet.dst));
    let addresses = [s0, s1, s2, s3, d0, d1, d2, d3];
    let mut sum = u64::from((TCP_HEADER as u32).to_be()) + u64::from(u32::from(TCP).to_be());
    for word in addresses {
        sum += u64::from(word);
    }
    Some(sum)
}

/// Writes the TCP header with its checksum.
///
/// The kernel knows whether the checksum of this packet is complete, or only that of the
/// pseudo-header with the rest left to the device (`CHECKSUM_PARTIAL`); a program does not. So the
/// two sums are added by the helper, which leaves the second out where the device adds that one.
#[inline(always)]
fn tcp(skb: *mut __sk_buff, offset: usize, header: [u32; 5], pseudo: u64) -> Option<()> {
    /// The complement of 0, a checksum over nothing.
    const NOTHING: u32 = 0xffff;
    let [ports, sequence, acknowledgement, flags, _] = header;
    let own = u64::from(ports) + u64::from(sequence) + u64::from(acknowledgement) + u64::from(flags);
    let recompute = u64::from(BPF_F_RECOMPUTE_CSUM);
    store(skb, offset, &[ports, sequence, acknowledgement, flags, (NOTHING << 16).to_be()], recompute)?;
    // Where a device has summed up the packet (`CHECKSUM_COMPLETE`), the header and its own part of
    // the checksum cancel each other out, so the sum must not count this header. Elsewhere this
    // call does nothing.
    // SAFETY: the context's packet.
    unsafe { bpf_csum_update(skb, (fold(own) as u32) ^ 0xffff) };
    let at = (offset + CHECKSUM) as u32;
    // SAFETY: the context's packet, and offsets that the kernel checks.
    let (first, second) = unsafe {
        (
            bpf_l4_csum_replace(skb, at, 0, fold(pseudo), u64::from(BPF_F_PSEUDO_HDR)),
            bpf_l4_csum_replace(skb, at, 0, fold(own), 0),
        )
    };
    (first == 0 && second == 0).then_some(())
}

/// Adds the carries of a one's complement sum of 16-bit words, until it is one such word.
#[inline(always)]
fn fold(sum: u64) -> u64 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum & 0xffff) + (sum >> 16)
}

#[inline(always)]
fn store<T>(skb: *mut __sk_buff, offset: usize, bytes: &T, flags: u64) -> Option<()> {
    let from = core::ptr::from_ref(bytes).cast();
    // SAFETY: the value is read during the call; the kernel checks the offset.
    (unsafe { bpf_skb_store_bytes(skb, offset as u32, from, size_of::<T>() as u32, flags) } == 0).then_some(())
}
