//! A tunnel whose records the kernel protects, used the way the relay uses it, but with tokio.

use std::{io, os::fd::AsFd as _};

use tokio::{
    io::{AsyncWriteExt as _, Interest},
    net::TcpStream,
};

use crate::{
    sys::tls::{self, Incoming},
    tunnel::{
        Protection, Tunnel,
        ktls::{Broken, Event, KernelTls, from_kernel},
        records::{MAX_PLAINTEXT, Opened, Records},
    },
};

/// What a receive ended with, when it is no data.
#[derive(Debug)]
pub(super) enum End {
    Truncated,
    CloseNotify,
    Alert(rustls::AlertDescription),
    #[expect(dead_code, reason = "shown when a test fails")]
    Broken(Broken),
}

/// One end of a tunnel behind its hand-over.
pub(super) struct KernelEnd {
    stream: TcpStream,
    protection: Protected,
    /// Received and not yet looked at.
    pub(super) plaintext: Vec<u8>,
}

enum Protected {
    User { records: Box<Records>, unread: Vec<u8> },
    Kernel(Box<KernelTls>),
}

impl KernelEnd {
    pub(super) fn new(tunnel: Tunnel) -> Self {
        let (fd, protection, plaintext) = tunnel.into_parts().expect("the descriptor");
        let stream = TcpStream::from_std(fd.into()).expect("a socket");
        let protection = match protection {
            Protection::User(user) => {
                let crate::tunnel::UserRecords { records, unread, .. } = *user;
                Protected::User { records: Box::new(records), unread }
            }
            Protection::Kernel { tls, ended } => {
                assert!(!ended, "the peer has not ended yet");
                Protected::Kernel(tls)
            }
        };
        Self { stream, protection, plaintext }
    }

    pub(super) async fn send(&mut self, data: &[u8]) {
        match &mut self.protection {
            Protected::User { records, .. } => {
                for chunk in data.chunks(MAX_PLAINTEXT) {
                    self.stream.write_all(&records.seal(chunk).expect("a record")).await.expect("sending");
                }
            }
            Protected::Kernel(tls) => {
                let mut rest = data;
                while !rest.is_empty() {
                    assert!(tls.refresh(self.stream.as_fd()).expect("the key"), "there is room for a key update");
                    let taken = self.stream.write(rest).await.expect("sending");
                    tls.sent(taken);
                    rest = &rest[taken..];
                }
            }
        }
    }

    /// Receives data into `plaintext`.
    pub(super) async fn receive(&mut self) -> Result<(), End> {
        loop {
            match &mut self.protection {
                Protected::User { records, unread } => {
                    let Some((opened, wire)) = records.open(unread).map_err(|e| End::Broken(e.into()))? else {
                        if crate::tunnel::handshake::read_more(&mut self.stream, unread, MAX_PLAINTEXT).await.ok()
                            == Some(0)
                        {
                            return Err(End::Truncated);
                        }
                        continue;
                    };
                    let data = match opened {
                        Opened::Data(range) => unread[range].to_vec(),
                        Opened::Control => Vec::new(),
                        Opened::CloseNotify => return Err(End::CloseNotify),
                        Opened::Alert(alert) => return Err(End::Alert(alert)),
                    };
                    unread.drain(..wire);
                    if !data.is_empty() {
                        self.plaintext.extend(data);
                        return Ok(());
                    }
                }
                Protected::Kernel(tls) => {
                    let mut buffer = vec![0; MAX_PLAINTEXT];
                    let incoming = next(&self.stream, &mut buffer).await;
                    let incoming = incoming.map_err(|e| End::Broken(from_kernel(e)))?;
                    let Incoming::Records { content_type, length } = incoming else { return Err(End::Truncated) };
                    let event = tls.received(self.stream.as_fd(), content_type, &buffer[..length]);
                    match event.map_err(End::Broken)? {
                        Event::Data if length > 0 => {
                            self.plaintext.extend_from_slice(&buffer[..length]);
                            return Ok(());
                        }
                        Event::Data | Event::Control => {}
                        Event::CloseNotify => return Err(End::CloseNotify),
                        Event::Alert(alert) => return Err(End::Alert(alert)),
                    }
                }
            }
        }
    }
}

async fn next(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<Incoming> {
    stream.async_io(Interest::READABLE, || tls::receive(stream.as_fd(), buffer)).await
}
