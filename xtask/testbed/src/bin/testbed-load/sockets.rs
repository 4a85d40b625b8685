//! Sockets as every command here wants them: without Nagle's delay, never blocking, on request with kernel TLS.

use std::{
    net::{SocketAddr, TcpStream},
    os::fd::AsFd,
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        socket::{
            setsockopt,
            sockopt::{TcpTlsRx, TcpTlsTx, TcpUlp, TlsCryptoInfo},
        },
    },
};
use socket2::{Domain, Protocol, Socket, Type};

/// Bytes read or written by one system call at most; as iperf3.
pub(crate) const CHUNK: usize = 128 << 10;
/// Events taken from the kernel at a time.
const EVENTS: usize = 256;
/// Milliseconds after which a thread without events looks at the clock.
const IDLE: u16 = 50;

/// Where a client connects to.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Target {
    /// Address of a server.
    pub(crate) address: SocketAddr,
    /// Protect the connections by kernel TLS on these very sockets, with keys that both sides have built in: no handshake, no secrecy.
    #[arg(long)]
    pub(crate) ktls: bool,
}

impl Target {
    /// Begins to connect. The socket becomes writable when that has an outcome.
    pub(crate) fn dial(&self) -> Result<TcpStream> {
        let address = self.address;
        let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))
            .context("making a socket")?;
        socket.set_tcp_nodelay(true)?;
        match socket.connect(&address.into()) {
            Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => {
                Err(error).with_context(|| format!("connecting to {address}"))
            }
            _ => Ok(socket.into()),
        }
    }

    /// The outcome of connecting.
    pub(crate) fn finish(&self, stream: &TcpStream) -> Result<()> {
        if let Some(error) = stream.take_error()? {
            return Err(error).with_context(|| format!("connecting to {}", self.address));
        }
        if self.ktls { protect(stream) } else { Ok(()) }
    }
}

/// Kernel TLS 1.3 with AES-128-GCM in both directions.
pub(crate) fn protect(stream: &TcpStream) -> Result<()> {
    /// The number of TLS 1.3 on the wire.
    const TLS_1_3: u16 = 0x0304;
    let keys = TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
        info: libc::tls_crypto_info { version: TLS_1_3, cipher_type: libc::TLS_CIPHER_AES_GCM_128 },
        iv: [1; 8],
        key: [2; 16],
        salt: [3; 4],
        rec_seq: [0; 8],
    });
    setsockopt(stream, TcpUlp::default(), b"tls").context("kernel TLS (TCP_ULP); is the module tls there?")?;
    setsockopt(stream, TcpTlsTx, &keys).context("kernel TLS (TLS_TX)")?;
    setsockopt(stream, TcpTlsRx, &keys).context("kernel TLS (TLS_RX)")
}

/// Readiness of descriptors, each known by a number.
pub(crate) struct Poll {
    epoll: Epoll,
    events: Vec<EpollEvent>,
}

impl Poll {
    pub(crate) fn new() -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("making an epoll")?;
        Ok(Self { epoll, events: vec![EpollEvent::empty(); EVENTS] })
    }

    pub(crate) fn add(&self, descriptor: impl AsFd, number: usize, flags: EpollFlags) -> Result<()> {
        self.epoll.add(descriptor, EpollEvent::new(flags, number as u64)).context("adding to an epoll")
    }

    pub(crate) fn modify(&self, descriptor: impl AsFd, number: usize, flags: EpollFlags) -> Result<()> {
        let mut event = EpollEvent::new(flags, number as u64);
        self.epoll.modify(descriptor, &mut event).context("changing an epoll")
    }

    /// What is ready, with the numbers; nothing after a while.
    pub(crate) fn wait(&mut self) -> Result<Vec<(usize, EpollFlags)>> {
        let ready = match self.epoll.wait(&mut self.events, EpollTimeout::from(IDLE)) {
            Ok(ready) => ready,
            Err(Errno::EINTR) => 0,
            Err(error) => bail!("waiting for an epoll: {error}"),
        };
        Ok(self.events[..ready].iter().map(|event| (event.data() as usize, event.events())).collect())
    }
}
