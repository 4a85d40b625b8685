//! Requests on a netlink socket, without a runtime: the kernel answers while it takes the request, so nothing here waits for long.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};

/// More than the 32 KiB the kernel puts into one datagram of a dump at most (`netlink_dump`).
pub(in crate::capture) const BUFFER: usize = 64 * 1024;
/// How often a dump that changed under the reader is repeated.
const ATTEMPTS: usize = 5;

/// A netlink socket in the namespace of the thread that opened it.
pub(in crate::capture) struct Channel {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Channel {
    /// Opens it; `protocol` is one of `netlink_sys::protocols`.
    pub(in crate::capture) fn open(protocol: isize) -> io::Result<Self> {
        let socket = Socket::new(protocol)?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(BUFFER) })
    }

    /// Makes a change and waits for the acknowledgement. `flags` go on top of request and ack.
    pub(in crate::capture) fn change<Q>(&mut self, request: Q, flags: u16) -> io::Result<()>
    where
        Q: NetlinkSerializable + NetlinkDeserializable,
    {
        self.send(request, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        self.receive::<Q>(&mut |_| {}).map(drop)
    }

    /// Asks for one thing; `None` when it does not exist.
    pub(in crate::capture) fn get<Q, A>(&mut self, request: Q) -> io::Result<Option<A>>
    where
        Q: NetlinkSerializable,
        A: NetlinkDeserializable,
    {
        // The acknowledgement tells where the answer ends.
        self.send(request, NLM_F_REQUEST | NLM_F_ACK)?;
        let mut found = None;
        match self.receive(&mut |answer| found = Some(answer)) {
            Ok(_) => Ok(found),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads a table. When it changes while it is read, it is read again.
    pub(in crate::capture) fn dump<Q, A>(&mut self, request: &Q) -> io::Result<Vec<A>>
    where
        Q: NetlinkSerializable + Clone,
        A: NetlinkDeserializable,
    {
        for _ in 0..ATTEMPTS {
            let mut answers = Vec::new();
            self.send(request.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            if self.receive(&mut |answer| answers.push(answer))? {
                return Ok(answers);
            }
        }
        Err(io::Error::new(io::ErrorKind::Interrupted, format!("a netlink dump kept changing {ATTEMPTS} times over")))
    }

    fn send<Q: NetlinkSerializable>(&mut self, request: Q, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop)
    }

    /// Reads until the answer is complete. False: the kernel says that the table changed meanwhile.
    fn receive<A: NetlinkDeserializable>(&mut self, each: &mut dyn FnMut(A)) -> io::Result<bool> {
        let mut consistent = true;
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, libc::MSG_TRUNC) {
                Ok(length) if length > self.buffer.len() => {
                    return Err(io::Error::other(format!(
                        "a netlink datagram of {length} bytes is larger than {BUFFER}"
                    )));
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            for message in messages::<A>(&self.buffer) {
                let message = message?;
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                consistent &= message.header.flags & NLM_F_DUMP_INTR == 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => each(answer),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(consistent),
                    _ => {}
                }
            }
        }
    }
}

/// The messages in a datagram. Ends after the first that cannot be read.
pub(in crate::capture) fn messages<A: NetlinkDeserializable>(
    mut datagram: &[u8],
) -> impl Iterator<Item = io::Result<NetlinkMessage<A>>> {
    std::iter::from_fn(move || {
        if datagram.is_empty() {
            return None;
        }
        let message = NetlinkMessage::<A>::deserialize(datagram);
        datagram = match &message {
            // Messages are aligned to 4 bytes.
            Ok(message) => datagram.get((message.header.length as usize).next_multiple_of(4)..).unwrap_or_default(),
            Err(_) => &[],
        };
        Some(message.map_err(io::Error::other))
    })
}
