//! Sockets: our state on them, and their addresses as the programs' contexts present them.

use aya_ebpf::{bindings::bpf_sock, helpers::generated::bpf_sk_storage_get};
use underpass_abi::{Address, OUTBOUND_PORT, OUTBOUND_V6_EXTRA, SOCKET_AGENT, SocketState, V4_MAPPED_PREFIX};

use crate::maps::SOCKETS;

/// `AF_INET` and `AF_INET6`, the same on every Linux architecture.
pub const AF_INET: u32 = 2;
pub const AF_INET6: u32 = 10;

/// `BPF_SK_STORAGE_GET_F_CREATE`.
const CREATE: u64 = 1;

/// Our state on a socket, if it has one.
///
/// # Safety
/// `sk` comes from the program's context or a helper and is known not to be null.
#[inline(always)]
pub unsafe fn state<'a>(sk: *mut bpf_sock) -> Option<&'a mut SocketState> {
    let map = (&raw const SOCKETS).cast_mut().cast();
    // SAFETY: the storage is the socket's, which the context keeps alive while the program runs.
    unsafe { bpf_sk_storage_get(map, sk.cast(), core::ptr::null_mut(), 0).cast::<SocketState>().as_mut() }
}

/// Attaches state to a socket that has none. False when the kernel has no memory for it.
///
/// # Safety
/// As [`state`].
#[inline(always)]
pub unsafe fn create_state(sk: *mut bpf_sock, mut state: SocketState) -> bool {
    let map = (&raw const SOCKETS).cast_mut().cast();
    // SAFETY: the kernel copies the value during the call.
    unsafe { !bpf_sk_storage_get(map, sk.cast(), (&raw mut state).cast(), CREATE).is_null() }
}

/// Is the socket the agent's own?
///
/// # Safety
/// As [`state`].
#[inline(always)]
pub unsafe fn is_agents(sk: *mut bpf_sock) -> bool {
    // SAFETY: the caller's promise.
    unsafe { state(sk) }.is_some_and(|state| state.flags & SOCKET_AGENT != 0)
}

/// An IPv4 address, in memory order, as an [`Address`].
#[inline(always)]
pub fn mapped(v4: u32) -> Address {
    let [a, b, c, d] = v4.to_ne_bytes();
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// An IPv6 address from the words of a context.
#[inline(always)]
pub fn address(words: [u32; 4]) -> Address {
    let [a0, a1, a2, a3] = words[0].to_ne_bytes();
    let [b0, b1, b2, b3] = words[1].to_ne_bytes();
    let [c0, c1, c2, c3] = words[2].to_ne_bytes();
    let [d0, d1, d2, d3] = words[3].to_ne_bytes();
    [a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3]
}

/// The words of an [`Address`], for a context; the last one is an IPv4 address.
#[inline(always)]
pub fn words(address: &Address) -> [u32; 4] {
    let &[a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3] = address;
    [
        u32::from_ne_bytes([a0, a1, a2, a3]),
        u32::from_ne_bytes([b0, b1, b2, b3]),
        u32::from_ne_bytes([c0, c1, c2, c3]),
        u32::from_ne_bytes([d0, d1, d2, d3]),
    ]
}

#[inline(always)]
pub fn is_v4_mapped(address: &Address) -> bool {
    let [a, b, c, _] = words(address);
    a == 0 && b == 0 && c == MAPPED_WORD
}

/// Third word of a v4-mapped address.
pub const MAPPED_WORD: u32 =
    u32::from_ne_bytes([V4_MAPPED_PREFIX[8], V4_MAPPED_PREFIX[9], V4_MAPPED_PREFIX[10], V4_MAPPED_PREFIX[11]]);

/// 127/8 in either form, or `::1`.
#[inline(always)]
pub fn is_loopback(address: &Address) -> bool {
    let [a, b, c, d] = words(address);
    a == 0 && b == 0 && ((c == MAPPED_WORD && address[12] == 127) || (c == 0 && d == 1u32.to_be()))
}

/// `0.0.0.0` in either form, or `::`.
#[inline(always)]
pub fn is_unspecified(address: &Address) -> bool {
    let [a, b, c, d] = words(address);
    a == 0 && b == 0 && (c == 0 || c == MAPPED_WORD) && d == 0
}

/// Is this where captured connections really go? State outlives a disconnect, the peer does not.
#[inline(always)]
pub fn is_outbound_port(port: u16) -> bool {
    port == OUTBOUND_PORT || (port >= OUTBOUND_V6_EXTRA.0 && port <= OUTBOUND_V6_EXTRA.1)
}
