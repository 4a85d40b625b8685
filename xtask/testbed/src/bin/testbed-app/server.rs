//! The server.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::{
    failure, print, sockets,
    stream::{self, Pace, Plan},
};

/// What the server does with a connection.
#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    /// Send back what comes, until the end.
    Echo,
    /// Say `hello` first, then echo.
    Banner,
    /// Read to the end, then answer with length and CRC32.
    Digest,
    /// Both ways at once, as the client says.
    Bulk,
    /// Read `--after` bytes, then reset.
    Reset,
    /// Close at once.
    Close,
    /// Never read, never answer.
    Silent,
    /// Read everything, say nothing.
    Discard,
    /// Send until the client goes.
    Source,
}

/// `serve`.
#[derive(Args)]
pub(crate) struct Serve {
    /// Addresses to listen on; `[::]:PORT` takes IPv4 too.
    #[arg(required = true)]
    listen: Vec<SocketAddr>,
    /// What to do.
    #[arg(long, value_enum, default_value_t = Mode::Echo)]
    mode: Mode,
    /// Bytes to read before a reset.
    #[arg(long, default_value_t = 1)]
    after: u64,
    /// Print a line per connection with both its addresses, and one when it fails.
    #[arg(long)]
    print: bool,
}

impl Serve {
    /// Listens on every address, prints `{"listening": …}` for each, and serves for ever.
    pub(crate) async fn run(self) -> Result<Value> {
        let (mode, after, verbose) = (self.mode, self.after, self.print);
        let mut listeners = JoinSet::new();
        for address in self.listen {
            let listener = listen(address)?;
            print(&json!({ "listening": listener.local_addr()? }));
            listeners.spawn(accept(listener, mode, after, verbose));
        }
        let ended = listeners.join_next().await.context("no address to listen on")?;
        ended.context("a listener panicked")?
    }
}

pub(crate) fn listen(address: SocketAddr) -> Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).context("opening a socket")?;
    if address.is_ipv6() {
        socket.set_only_v6(false).context("making the socket dual-stack")?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&address.into()).with_context(|| format!("binding to {address}"))?;
    socket.listen(65_535).with_context(|| format!("listening on {address}"))?;
    socket.set_nonblocking(true)?;
    Ok(TcpListener::from_std(socket.into())?)
}

async fn accept(listener: TcpListener, mode: Mode, after: u64, verbose: bool) -> Result<Value> {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            // Aborted before it was accepted: the client's business.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error).context("accepting"),
        };
        if verbose {
            print(&json!({ "peer": peer, "local": stream.local_addr().ok() }));
        }
        tokio::spawn(async move {
            let result = serve(stream, mode, after).await;
            if let (Err(error), true) = (&result, verbose) {
                let mut report = failure(error);
                report["peer"] = json!(peer);
                print(&report);
            }
        });
    }
}

async fn serve(mut stream: TcpStream, mode: Mode, after: u64) -> Result<()> {
    stream.set_nodelay(true)?;
    match mode {
        Mode::Echo => echo(stream).await,
        Mode::Banner => {
            stream.write_all(b"hello\n").await?;
            echo(stream).await
        }
        Mode::Digest => {
            let (mut hasher, mut length, mut chunk) = (crc32fast::Hasher::new(), 0, vec![0; 1 << 16]);
            loop {
                let count = stream.read(&mut chunk).await?;
                if count == 0 {
                    break;
                }
                hasher.update(&chunk[..count]);
                length += count;
            }
            stream.write_all(format!("{length} {:08x}\n", hasher.finalize()).as_bytes()).await?;
            Ok(stream.shutdown().await?)
        }
        Mode::Bulk => bulk(stream).await,
        Mode::Reset => {
            let read = (&mut stream).take(after);
            tokio::io::copy(&mut { read }, &mut tokio::io::sink()).await?;
            sockets::reset_on_close(&stream)
        }
        Mode::Close => Ok(()),
        Mode::Silent => {
            // Ends with the connection: an error, or never.
            let error = stream.ready(tokio::io::Interest::ERROR).await?;
            ensure!(error.is_error(), "{error:?}");
            Ok(())
        }
        Mode::Discard => {
            let (mut read, _write) = stream.into_split();
            stream::discard(&mut read).await.map(drop)
        }
        Mode::Source => loop {
            stream.write_all(&[b'x'; 1 << 14]).await?;
        },
    }
}

async fn echo(mut stream: TcpStream) -> Result<()> {
    let (mut read, mut write) = stream.split();
    tokio::io::copy(&mut read, &mut write).await?;
    Ok(write.shutdown().await?)
}

/// Sends and receives as planned, then sends the checksum of what came.
async fn bulk(stream: TcpStream) -> Result<()> {
    let (mut read, mut write) = stream.into_split();
    let plan = Plan::read(&mut read).await.context("reading the plan")?;
    let sending = tokio::spawn(async move {
        let result = stream::send(&mut write, plan.seed.wrapping_add(1), plan.down).await;
        result.map(|_| write)
    });
    let checksum = stream::receive(&mut read, plan.up, Pace::default()).await?;
    let mut write = sending.await??;
    write.write_u32(checksum).await?;
    write.shutdown().await?;
    let more = stream::discard(&mut read).await?;
    ensure!(more == 0, "{more} bytes more than planned");
    Ok(())
}
