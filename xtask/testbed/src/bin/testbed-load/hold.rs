//! Many connections that do nothing.

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::epoll::EpollFlags;
use serde_json::json;
use socket2::SockRef;

use crate::{
    sockets::{Poll, Target},
    wire::request,
};

/// Bytes exchanged on each connection.
const SIZE: u32 = 64;

#[derive(Debug, clap::Args)]
pub(crate) struct Hold {
    #[command(flatten)]
    target: Target,
    /// How many.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    connections: u32,
    /// Opened at a time.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1024))]
    parallel: u32,
}

struct Held {
    stream: TcpStream,
    connected: bool,
    left: usize,
}

impl Hold {
    pub(crate) fn run(&self) -> Result<()> {
        let mut poll = Poll::new()?;
        let mut all: Vec<Held> = Vec::with_capacity(self.connections as usize);
        let mut done = 0;
        let mut buffer = [0; SIZE as usize];
        while done < self.connections as usize {
            while all.len() < self.connections as usize && all.len() - done < self.parallel as usize {
                let stream = self.target.dial()?;
                // In the end it goes at once, without minutes of TIME_WAIT in the kernel's memory.
                SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
                poll.add(&stream, all.len(), EpollFlags::EPOLLOUT)?;
                all.push(Held { stream, connected: false, left: SIZE as usize });
            }
            for (number, _) in poll.wait()? {
                let one = self.proceed(&mut all[number], number, &poll, &mut buffer);
                done += usize::from(one.with_context(|| format!("connection {number}, {done} are open"))?);
            }
        }
        println!("{}", json!({ "held": done }));
        std::io::stdin().read_to_end(&mut Vec::new()).context("waiting for the end of standard input")?;
        // Nothing was asked for: what is readable now is an end or a reset.
        let lost = poll.wait()?.len();
        ensure!(lost == 0, "at least {lost} of {done} connections were lost while nothing happened on them");
        Ok(())
    }

    /// Whether it is done with this one.
    fn proceed(&self, one: &mut Held, number: usize, poll: &Poll, buffer: &mut [u8]) -> Result<bool> {
        if !one.connected {
            self.target.finish(&one.stream)?;
            one.connected = true;
            poll.modify(&one.stream, number, EpollFlags::EPOLLIN)?;
            let sent = one.stream.write(&request(SIZE, u64::from(SIZE))).context("sending a request")?;
            ensure!(sent == SIZE as usize, "the socket took only {sent} bytes of a request");
            return Ok(false);
        }
        match one.stream.read(&mut buffer[..one.left.max(1)]) {
            Ok(0) => bail!("closed by the server's side"),
            Ok(read) => {
                one.left = one.left.checked_sub(read).context("more came than was asked for")?;
                Ok(one.left == 0)
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(e).context("receiving"),
        }
    }
}
