//! Clients of one connection.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    millis, name_of, print,
    sockets::{Target, reset_on_close},
    stream::{self, Pace, Plan},
};

/// Most bytes shown of an answer.
const SHOWN: u64 = 1 << 16;

/// `connect`.
#[derive(Args)]
pub(crate) struct Connect {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Send this.
    #[arg(long, default_value = "")]
    send: String,
    /// Send these bytes, in hexadecimal, after `--send`.
    #[arg(long, default_value = "")]
    send_hex: String,
    /// Close the sending side and read until the end.
    #[arg(long)]
    read: bool,
}

impl Connect {
    /// `{"peer", "local", "received"}`: what `getpeername` and `getsockname` say.
    pub(crate) async fn run(&self) -> Result<Value> {
        let mut stream = self.target.connect().await?;
        let mut report = addresses(&stream)?;
        let mut bytes = self.send.clone().into_bytes();
        bytes.extend(unhex(&self.send_hex)?);
        stream.write_all(&bytes).await.context("sending")?;
        if self.read {
            stream.shutdown().await.context("closing the sending side")?;
            let mut received = Vec::new();
            (&mut stream).take(SHOWN).read_to_end(&mut received).await.context("reading the answer")?;
            report["received"] = json!(String::from_utf8_lossy(&received));
        }
        Ok(report)
    }
}

/// `request`.
#[derive(Args)]
pub(crate) struct Request {
    #[command(flatten)]
    pub(crate) target: Target,
    /// The line to send.
    #[arg(long, default_value = "ping")]
    line: String,
    /// How often, on the same connection.
    #[arg(long, default_value_t = 1)]
    count: u32,
}

impl Request {
    /// `{"peer", "local", "line", "connect_ms", "first_answer_ms", "slowest_ms"}`, times from the call of connect for the first two.
    pub(crate) async fn run(&self) -> Result<Value> {
        let start = Instant::now();
        let mut stream = self.target.connect().await?;
        let connected = start.elapsed();
        let (mut first, mut slowest) = (None, Duration::ZERO);
        for _ in 0..self.count {
            let begin = Instant::now();
            exchange(&mut stream, &self.line).await?;
            first.get_or_insert_with(|| start.elapsed());
            slowest = slowest.max(begin.elapsed());
        }
        let mut report = addresses(&stream)?;
        report["line"] = json!(self.line);
        report["connect_ms"] = json!(millis(connected));
        report["first_answer_ms"] = json!(first.map(millis));
        report["slowest_ms"] = json!(millis(slowest));
        Ok(report)
    }
}

/// Reads a line before anything is sent.
pub(crate) async fn greeting(target: &Target) -> Result<Value> {
    let mut stream = target.connect().await?;
    let greeting = stream::read_line(&mut stream).await?;
    exchange(&mut stream, "after the greeting").await?;
    Ok(json!({ "greeting": greeting }))
}

/// `half-close`.
#[derive(Args)]
pub(crate) struct HalfClose {
    #[command(flatten)]
    pub(crate) target: Target,
    /// How many bytes to send.
    #[arg(long, default_value_t = 100_000)]
    bytes: u64,
    /// What the bytes are.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl HalfClose {
    /// `{"bytes"}`, after the server has confirmed their checksum.
    pub(crate) async fn run(&self) -> Result<Value> {
        let mut stream = self.target.connect().await?;
        let checksum = stream::send(&mut stream, self.seed, self.bytes).await?;
        stream.shutdown().await.context("closing the sending side")?;
        let mut answer = String::new();
        (&mut stream).take(SHOWN).read_to_string(&mut answer).await.context("reading the answer")?;
        let expected = format!("{} {checksum:08x}\n", self.bytes);
        ensure!(answer == expected, "the server answered {answer:?}, not {expected:?}");
        Ok(json!({ "bytes": self.bytes }))
    }
}

/// `bulk`.
#[derive(Args)]
pub(crate) struct Bulk {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Bytes to send.
    #[arg(long, default_value_t = 1 << 20)]
    up: u64,
    /// Bytes to receive.
    #[arg(long, default_value_t = 1 << 20)]
    down: u64,
    /// What the bytes are.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Read at most this many bytes at once.
    #[arg(long)]
    chunk: Option<usize>,
    /// Milliseconds to wait between reads: a slow reader.
    #[arg(long, default_value_t = 0)]
    pause_ms: u64,
}

/// How long after the receiver's failure the sender's is waited for.
const SENDER_TOO: Duration = Duration::from_secs(1);

impl Bulk {
    /// `{"up", "down", "seconds"}`, after both checksums were found right.
    pub(crate) async fn run(&self) -> Result<Value> {
        let start = Instant::now();
        let plan = Plan { seed: self.seed, up: self.up, down: self.down };
        let (mut read, mut write) = self.target.connect().await?.into_split();
        plan.write(&mut write).await?;
        let sending =
            tokio::spawn(async move { stream::send(&mut write, plan.seed, plan.up).await.map(|sum| (sum, write)) });
        let pace = Pace { chunk: self.chunk, pause: Duration::from_millis(self.pause_ms) };
        let received = match stream::receive(&mut read, plan.down, pace).await {
            Ok(received) => received,
            // The kernel tells of a reset once, to whoever asks first. If that was the sender, the receiver has met an end.
            Err(error) => match tokio::time::timeout(SENDER_TOO, sending).await {
                Ok(Ok(Err(first))) => return Err(first),
                _ => return Err(error),
            },
        };
        let expected = stream::checksum(plan.seed.wrapping_add(1), plan.down);
        ensure!(
            received == expected,
            "checksum of the {} bytes received: {received:08x}, not {expected:08x}",
            plan.down
        );
        let (sent, mut write) = sending.await??;
        let confirmed = read.read_u32().await.context("reading the server's checksum")?;
        ensure!(confirmed == sent, "the server received other bytes: checksum {confirmed:08x}, not {sent:08x}");
        write.shutdown().await.context("closing the sending side")?;
        let more = stream::discard(&mut read).await.context("reading the end of the stream")?;
        ensure!(more == 0, "{more} bytes more than planned");
        Ok(json!({ "up": self.up, "down": self.down, "seconds": start.elapsed().as_secs_f64() }))
    }
}

/// Resets a connection that works.
pub(crate) async fn reset(target: &Target) -> Result<Value> {
    let mut stream = target.connect().await?;
    exchange(&mut stream, "before the reset").await?;
    reset_on_close(&stream)?;
    Ok(json!({ "reset": true }))
}

/// Waits to be reset: `{"established": true}` first, then `{"end": "ECONNRESET"}`.
pub(crate) async fn expect_reset(target: &Target) -> Result<Value> {
    let mut stream = target.connect().await?;
    exchange(&mut stream, "before the reset").await?;
    print(&json!({ "established": true }));
    match stream.read_u8().await {
        Ok(byte) => bail!("a byte came instead of a reset: {byte:#x}"),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => bail!("a clean end came instead of a reset"),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
            Ok(json!({ "end": name_of(&error.into()) }))
        }
        Err(error) => Err(error).context("instead of a reset"),
    }
}

/// Sends a line and reads the same line.
pub(crate) async fn exchange(stream: &mut TcpStream, line: &str) -> Result<()> {
    stream.write_all(format!("{line}\n").as_bytes()).await.context("sending a line")?;
    let answer = stream::read_line(stream).await?;
    ensure!(answer == line, "sent {line:?}, got {answer:?} back");
    Ok(())
}

/// The same on a connection of its own, which both sides then end cleanly.
pub(crate) async fn exchange_and_end(mut stream: TcpStream, line: &str) -> Result<()> {
    exchange(&mut stream, line).await?;
    stream.shutdown().await.context("closing")?;
    let end = stream.read(&mut [0]).await.context("reading the end")?;
    ensure!(end == 0, "a byte after the end");
    Ok(())
}

fn addresses(stream: &TcpStream) -> Result<Value> {
    Ok(
        json!({ "peer": stream.peer_addr().context("getpeername")?, "local": stream.local_addr().context("getsockname")? }),
    )
}

/// Bytes written in hexadecimal.
pub(crate) fn unhex(text: &str) -> Result<Vec<u8>> {
    ensure!(text.is_ascii() && text.len().is_multiple_of(2), "hexadecimal bytes come in pairs of digits: {text:?}");
    let pairs = text.as_bytes().chunks(2);
    pairs
        .map(|pair| {
            u8::from_str_radix(&String::from_utf8_lossy(pair), 16).with_context(|| format!("not hexadecimal: {text:?}"))
        })
        .collect()
}
