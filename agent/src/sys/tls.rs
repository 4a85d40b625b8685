//! Kernel TLS: the socket options and control messages of `linux/tls.h`.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr,
};

use ktls::CryptoInfo;
use nix::{
    getsockopt_impl, setsockopt_impl, sockopt_impl,
    sys::socket::{getsockopt, setsockopt, sockopt::TcpUlp},
};
use zeroize::Zeroize as _;

/// Receive without padding: a record that has some is decrypted twice (Linux 6.0).
const TLS_RX_EXPECT_NO_PAD: libc::c_int = 4;

/// Which of a socket's two keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Way {
    /// `TLS_TX`
    Transmit = libc::TLS_TX,
    /// `TLS_RX`
    Receive = libc::TLS_RX,
}

sockopt_impl!(
    /// The transmit key's parameters, AES-128-GCM (`struct tls12_crypto_info_aes_gcm_128`).
    TransmitState40,
    GetOnly,
    libc::SOL_TLS,
    libc::TLS_TX,
    [u8; size_of::<libc::tls12_crypto_info_aes_gcm_128>()]
);
sockopt_impl!(
    /// The transmit key's parameters, AES-256-GCM and ChaCha20-Poly1305, whose structures have the same size.
    TransmitState56,
    GetOnly,
    libc::SOL_TLS,
    libc::TLS_TX,
    [u8; size_of::<libc::tls12_crypto_info_aes_gcm_256>()]
);
sockopt_impl!(
    /// Whether to expect records without padding.
    ExpectNoPad,
    SetOnly,
    libc::SOL_TLS,
    TLS_RX_EXPECT_NO_PAD,
    u32
);

const _: () =
    assert!(size_of::<libc::tls12_crypto_info_aes_gcm_256>() == size_of::<libc::tls12_crypto_info_chacha20_poly1305>());

/// Makes `tls` the socket's upper-layer protocol; without keys it changes nothing. The socket must be connected. `ENOENT`:
/// the kernel has no TLS, or its module could not be loaded.
pub fn install(socket: BorrowedFd<'_>) -> io::Result<()> {
    Ok(setsockopt(&socket, TcpUlp::default(), b"tls")?)
}

/// Gives the kernel the keys of one direction. From then on it protects what is sent, or opens what is received, beginning with what is in
/// the socket's queue. `ENOENT`: the cipher's module could not be loaded. `EBUSY`: there are keys already, and the kernel cannot replace them.
pub fn set_keys(socket: BorrowedFd<'_>, way: Way, keys: &CryptoInfo) -> io::Result<()> {
    // SAFETY: `keys` points to one of the kernel's `tls12_crypto_info_*` structures of the length given, alive for the call; the kernel only reads it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_TLS,
            way as libc::c_int,
            keys.as_ptr(),
            keys.size() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Tells the kernel that records come without padding, which saves it a copy.
pub fn expect_no_padding(socket: BorrowedFd<'_>) -> io::Result<()> {
    Ok(setsockopt(&socket, ExpectNoPad, &1)?)
}

/// Sequence number of the next record that the kernel sends. `size` is that of the keys in place, [`CryptoInfo::size`].
pub fn transmit_sequence(socket: BorrowedFd<'_>, size: usize) -> io::Result<u64> {
    const SMALL: usize = size_of::<libc::tls12_crypto_info_aes_gcm_128>();
    let sequence = if size == SMALL {
        getsockopt(&socket, TransmitState40).map(take_sequence)
    } else {
        getsockopt(&socket, TransmitState56).map(take_sequence)
    };
    Ok(sequence?)
}

/// `rec_seq` is the last field of every `tls12_crypto_info_*`, big-endian. The kernel hands out the key beside it.
fn take_sequence<const N: usize>(mut state: [u8; N]) -> u64 {
    let sequence = state.last_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
    state.zeroize();
    sequence
}

/// Sends one record of another type than application data; all of it or nothing (`WouldBlock`).
pub fn send_record(socket: BorrowedFd<'_>, content_type: u8, payload: &[u8]) -> io::Result<()> {
    let mut control = Control::new(libc::TLS_SET_RECORD_TYPE, content_type);
    let mut slice = libc::iovec { iov_base: payload.as_ptr().cast_mut().cast(), iov_len: payload.len() };
    let message = message(&mut slice, &mut control);
    // SAFETY: every pointer in `message` is to a local or to `payload`, all alive for the call, with their true lengths; sendmsg only reads them.
    let sent =
        unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    match usize::try_from(sent) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(sent) if sent == payload.len() => Ok(()),
        // A short record is whole to the kernel: alerts and key updates have few bytes, which it takes together.
        Ok(sent) => Err(io::Error::other(format!("{sent} of {} bytes of a control record were taken", payload.len()))),
    }
}

/// What one [`receive`] gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// This many bytes of records of this type.
    Records {
        /// `ContentType` of RFC 8446.
        content_type: u8,
        /// May be 0 for an empty record that is no data.
        length: usize,
    },
    /// FIN: TCP's end, which nobody has authenticated.
    Fin,
}

/// Receives, without waiting, records of one type: as much data as fits, or one other record. `buffer` should hold a whole record (16 KiB). `EBADMSG`: a record
/// failed authentication. `EMSGSIZE`, `EINVAL`: a malformed header.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Incoming> {
    let mut control = Control::new(0, 0);
    let mut slice = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut message = message(&mut slice, &mut control);
    // SAFETY: every pointer in `message` is to a local or to `buffer`, all alive and writable for the call, with their true lengths.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    let Ok(length) = usize::try_from(received) else { return Err(io::Error::last_os_error()) };
    let typed = message.msg_controllen >= Control::LENGTH
        && control.header.cmsg_level == libc::SOL_TLS
        && control.header.cmsg_type == libc::TLS_GET_RECORD_TYPE;
    match (typed, length) {
        (true, _) => Ok(Incoming::Records { content_type: control.content_type, length }),
        (false, 0) => Ok(Incoming::Fin),
        (false, _) => Err(io::Error::other("the kernel did not say which type of record it delivered")),
    }
}

/// A control message with one byte: `CMSG_SPACE(1)` is a header and 8 bytes.
#[repr(C, align(8))]
struct Control {
    header: libc::cmsghdr,
    content_type: u8,
    padding: [u8; 7],
}

impl Control {
    /// `CMSG_LEN(1)`
    const LENGTH: usize = size_of::<libc::cmsghdr>() + 1;

    fn new(typ: libc::c_int, content_type: u8) -> Self {
        let header = libc::cmsghdr { cmsg_len: Self::LENGTH, cmsg_level: libc::SOL_TLS, cmsg_type: typ };
        Self { header, content_type, padding: [0; 7] }
    }
}

fn message(slice: &mut libc::iovec, control: &mut Control) -> libc::msghdr {
    libc::msghdr {
        msg_name: ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: slice,
        msg_iovlen: 1,
        msg_control: ptr::from_mut(control).cast(),
        msg_controllen: size_of::<Control>(),
        msg_flags: 0,
    }
}
