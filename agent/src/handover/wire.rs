//! Messages as JSON behind their length (4 bytes, big endian), descriptors with the first byte.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
};

use nix::sys::socket::MsgFlags;
use underpass_cni::descriptors;

use super::Message;

/// Largest message, in bytes; a pod's has some hundred.
const LIMIT: usize = 64 * 1024;

pub(super) fn send(mut stream: &UnixStream, message: &Message, with: &[OwnedFd]) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let length = u32::try_from(text.len()).ok().filter(|_| text.len() <= LIMIT && with.len() <= descriptors::MOST);
    let length = length.ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "too much for one message"))?;
    let bytes: Vec<u8> = length.to_be_bytes().into_iter().chain(text).collect();
    let with: Vec<_> = with.iter().map(|descriptor| descriptor.as_fd()).collect();
    let sent = descriptors::send(stream, &bytes, &with, MsgFlags::empty())?;
    stream.write_all(&bytes[sent..])
}

pub(super) fn receive(mut stream: &UnixStream) -> io::Result<(Message, Vec<OwnedFd>)> {
    let mut length = [0; 4];
    let (received, descriptors) = descriptors::receive(stream, &mut length, MsgFlags::empty())?;
    if received == 0 {
        return Err(io::Error::new(ErrorKind::UnexpectedEof, "the other agent has gone"));
    }
    stream.read_exact(&mut length[received..])?;
    let length = u32::from_be_bytes(length) as usize;
    if length > LIMIT {
        let problem = format!("a message of {length} bytes; at most {LIMIT} are read");
        return Err(io::Error::new(ErrorKind::InvalidData, problem));
    }
    let mut text = vec![0; length];
    stream.read_exact(&mut text)?;
    Ok((serde_json::from_slice(&text)?, descriptors))
}
