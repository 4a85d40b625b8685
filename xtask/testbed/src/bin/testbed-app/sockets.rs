//! Making client sockets the way the command line asks for.

use std::{
    future::Future,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result};
use clap::Args;
use socket2::{Domain, Protocol, Socket, Type};
use testbed::pace::patience;
use tokio::net::{TcpSocket, TcpStream};

/// Whom to connect to and how.
#[derive(Args, Clone)]
pub(crate) struct Target {
    /// Address to connect to; `[::ffff:10.0.0.1]:80` makes an IPv6 socket.
    address: SocketAddr,
    /// Source address.
    #[arg(long)]
    bind: Option<IpAddr>,
    /// `SO_MARK` of the socket, decimal or 0x….
    #[arg(long, value_parser = parse_number)]
    mark: Option<u32>,
    /// Use Multipath TCP.
    #[arg(long)]
    mptcp: bool,
    /// Give up after this many seconds.
    #[arg(long, default_value_t = default_timeout())]
    timeout: u64,
}

/// Seconds that a command may take by default.
fn default_timeout() -> u64 {
    patience(Duration::from_secs(50)).as_secs()
}

impl Target {
    /// Where to.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Source address asked for.
    pub(crate) fn bind_address(&self) -> Option<IpAddr> {
        self.bind
    }

    /// Runs `work` with the time limit of the command line.
    pub(crate) async fn within<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let limit = Duration::from_secs(self.timeout);
        tokio::time::timeout(limit, work).await.with_context(|| format!("not done within {limit:?}"))?
    }

    /// Connects.
    pub(crate) async fn connect(&self) -> Result<TcpStream> {
        let protocol = if self.mptcp { Protocol::MPTCP } else { Protocol::TCP };
        let socket =
            Socket::new(Domain::for_address(self.address), Type::STREAM, Some(protocol)).context("opening a socket")?;
        if let Some(mark) = self.mark {
            socket.set_mark(mark).context("setting SO_MARK")?;
        }
        if let Some(bind) = self.bind {
            socket.bind(&SocketAddr::new(bind, 0).into()).with_context(|| format!("binding to {bind}"))?;
        }
        socket.set_nonblocking(true).context("making the socket non-blocking")?;
        let stream = TcpSocket::from_std_stream(socket.into()).connect(self.address).await;
        let stream = stream.with_context(|| format!("connecting to {}", self.address))?;
        stream.set_nodelay(true).context("setting TCP_NODELAY")?;
        Ok(stream)
    }
}

/// Makes the close of `stream` a reset.
pub(crate) fn reset_on_close(stream: &TcpStream) -> Result<()> {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).context("setting SO_LINGER")
}

fn parse_number(text: &str) -> Result<u32, std::num::ParseIntError> {
    match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    }
}
