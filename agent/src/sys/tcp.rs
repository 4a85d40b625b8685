//! What the kernel tells of a TCP connection.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use nix::{getsockopt_impl, sockopt_impl, sys::socket::getsockopt};

/// The start of the kernel's `struct tcp_info`, as far as Linux 5.4 has it. The kernel fills as much as is asked for, so newer fields, which
/// `libc::tcp_info` has, would come out differently from kernel to kernel.
#[repr(C)]
pub struct TcpState {
    before_unacked: [u32; 6],
    /// Segments on their way.
    pub unacked: u32,
    before_last_ack_recv: [u32; 7],
    /// Milliseconds since the peer's kernel last acknowledged anything.
    pub last_ack_recv: u32,
    before_bytes_acked: [u32; 15],
    /// Bytes acknowledged so far.
    pub bytes_acked: u64,
    before_notsent_bytes: [u32; 4],
    /// Bytes not sent yet.
    pub notsent_bytes: u32,
    before_snd_wnd: [u32; 20],
    /// The peer's window.
    pub snd_wnd: u32,
}

sockopt_impl!(
    /// State of a TCP socket.
    TcpInfo,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    TcpState
);

/// The state of a TCP socket.
pub fn state(socket: BorrowedFd<'_>) -> io::Result<TcpState> {
    Ok(getsockopt(&socket, TcpInfo)?)
}

/// Bytes that TCP has taken to send since the connection was made, plus a constant. May come out smaller when acknowledgements arrive
/// meanwhile, never larger.
pub fn accepted(socket: BorrowedFd<'_>) -> io::Result<u64> {
    // In this order: what is acknowledged in between is missed, not counted twice.
    let acknowledged = state(socket)?.bytes_acked;
    Ok(acknowledged + u64::from(queued(socket)?))
}

/// Bytes that can be received at once (`SIOCINQ`, which is `FIONREAD`).
pub fn available(socket: BorrowedFd<'_>) -> io::Result<u32> {
    count(socket, libc::FIONREAD)
}

/// Bytes taken to send but not acknowledged (`SIOCOUTQ`, which is `TIOCOUTQ`).
fn queued(socket: BorrowedFd<'_>) -> io::Result<u32> {
    count(socket, libc::TIOCOUTQ)
}

fn count(socket: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is borrowed for the call; both requests write one int, which outlives the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut bytes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes.cast_unsigned()) }
}
