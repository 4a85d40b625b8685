//! Descriptors that travel over Unix sockets: the agent's from one to the next, and pods' namespaces from the plugin to the agent.

use std::{
    io::{IoSlice, IoSliceMut},
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

use nix::{
    cmsg_space,
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, sendmsg},
};

/// `SCM_MAX_FD` of `net/scm.h`: the kernel passes no more with one message.
pub const MOST: usize = 253;

/// Sends the descriptors with the first of these bytes; how many bytes were sent. A reader that has gone raises no signal.
pub fn send(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>], flags: MsgFlags) -> nix::Result<usize> {
    let numbers: Vec<RawFd> = descriptors.iter().map(std::os::fd::AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() { &[] } else { &rights[..] };
    sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], control, flags | MsgFlags::MSG_NOSIGNAL, None)
}

/// Receives into `buffer`: how many bytes, and all descriptors that came with them.
pub fn receive(stream: &UnixStream, buffer: &mut [u8], flags: MsgFlags) -> nix::Result<(usize, Vec<OwnedFd>)> {
    // Credentials come unasked for where the socket's owner has switched them on.
    let mut control = cmsg_space!([RawFd; MOST], UnixCredentials);
    let mut part = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut part, Some(&mut control), flags | MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    // All of them, before anything can return: what is not taken stays open.
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: the kernel has just opened these for this process, and nothing else knows their numbers.
            descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    Ok((message.bytes, descriptors))
}
