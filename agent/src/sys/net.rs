//! Network namespaces as the kernel names them.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// `NS_GET_NSTYPE` of `linux/nsfs.h`, `_IO(0xb7, 0x3)`: libc has no name for it.
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;

/// Cookie of the network namespace that `socket` lives in (`SO_NETNS_COOKIE`, kernel 5.14). It is never used twice while the
/// machine runs, unlike the inode number of the namespace.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the descriptor is borrowed for the call; the kernel writes at most `length` bytes, which is the size of `cookie`,
    // and both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

/// Which kind of namespace an nsfs descriptor stands for: one `CLONE_NEW*` flag. `ENOTTY` for anything that is no namespace.
pub fn namespace_kind(namespace: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    // SAFETY: the descriptor is borrowed for the call; the request takes no argument and only returns a number.
    let kind = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_NSTYPE) };
    if kind < 0 { Err(io::Error::last_os_error()) } else { Ok(kind) }
}
