//! The server: answers every request with as many bytes as it asks for.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
};

use anyhow::{Context, Result};
use nix::sys::epoll::EpollFlags;
use serde_json::json;
use slab::Slab;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    sockets::{CHUNK, Poll, protect},
    wire::{ENDLESS, Reader},
};

/// Connections that may wait for being accepted; the kernel's `somaxconn` caps it.
const BACKLOG: i32 = 4096;
/// Bytes written to one connection before others have their turn.
const TURN: usize = 1 << 20;
/// The listener's number; connections have those of a slab.
const LISTENER: usize = usize::MAX;

#[derive(Debug, clap::Args)]
pub(crate) struct Serve {
    /// Address to listen on.
    listen: SocketAddr,
    /// Threads; connections go to whichever is waiting.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
    /// Protect every connection by kernel TLS with the keys that the client has too.
    #[arg(long)]
    ktls: bool,
}

impl Serve {
    pub(crate) fn run(&self) -> Result<()> {
        let socket = Socket::new(Domain::for_address(self.listen), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.bind(&self.listen.into()).with_context(|| format!("listening on {}", self.listen))?;
        socket.listen(BACKLOG).with_context(|| format!("listening on {}", self.listen))?;
        let listener = TcpListener::from(socket);
        println!("{}", json!({ "listening": listener.local_addr()? }));
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.threads).map(|_| scope.spawn(|| self.work(&listener))).collect();
            workers.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))
        })
    }

    fn work(&self, listener: &TcpListener) -> Result<()> {
        let mut poll = Poll::new()?;
        poll.add(listener, LISTENER, EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE)?;
        let mut connections: Slab<Connection> = Slab::new();
        let mut buffer = vec![0; CHUNK];
        let zeros = vec![0; CHUNK];
        loop {
            for (number, _) in poll.wait()? {
                if number == LISTENER {
                    self.accept(listener, &poll, &mut connections)?;
                    continue;
                }
                let Some(connection) = connections.get_mut(number) else { continue };
                // Whatever ends a connection is the client's business, which tells about it.
                if connection.serve(number, &poll, &mut buffer, &zeros).is_err() {
                    connections.remove(number);
                }
            }
        }
    }

    /// Takes one connection: others are for the other threads, and the listener stays readable.
    fn accept(&self, listener: &TcpListener, poll: &Poll, connections: &mut Slab<Connection>) -> Result<()> {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => return Ok(()),
            Err(e) => return Err(e).context("accepting a connection"),
        };
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        if self.ktls {
            protect(&stream)?;
        }
        let entry = connections.vacant_entry();
        poll.add(&stream, entry.key(), EpollFlags::EPOLLIN)?;
        entry.insert(Connection { stream, reader: Reader::default(), answer: 0, writing: false });
        Ok(())
    }
}

/// A client's connection.
struct Connection {
    stream: TcpStream,
    reader: Reader,
    /// Bytes still to be sent.
    answer: u64,
    /// Whether it is waited for the socket to take more, instead of for a request.
    writing: bool,
}

impl Connection {
    /// Goes on as far as it can without waiting. An error ends the connection.
    fn serve(&mut self, number: usize, poll: &Poll, buffer: &mut [u8], zeros: &[u8]) -> Result<()> {
        if self.answer == 0 {
            let read = match self.stream.read(buffer) {
                Ok(0) => anyhow::bail!("the end"),
                Ok(read) => read,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e.into()),
            };
            match self.reader.take(&buffer[..read]).map_err(anyhow::Error::msg)? {
                Some(answer) => self.answer = answer,
                None => return Ok(()),
            }
        }
        let mut turn = TURN;
        while self.answer > 0 && turn > 0 {
            let most = usize::try_from(self.answer).unwrap_or(usize::MAX).min(zeros.len());
            match self.stream.write(&zeros[..most]) {
                Ok(written) => {
                    turn = turn.saturating_sub(written);
                    if self.answer != ENDLESS {
                        self.answer -= written as u64;
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => return Err(e.into()),
            }
        }
        if self.writing != (self.answer > 0) {
            self.writing = self.answer > 0;
            let flags = if self.writing { EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
            poll.modify(&self.stream, number, flags)?;
        }
        Ok(())
    }
}
