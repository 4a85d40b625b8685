//! Random bytes that both ends can make again, and their checksums.

use anyhow::{Context, Result, ensure};
use crc32fast::Hasher;
use rand::{RngCore, SeedableRng, rngs::StdRng};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::tcp::OwnedReadHalf,
};

/// Bytes made, sent and read at once.
const CHUNK: usize = 1 << 16;
/// Longest line.
const LINE: usize = 1 << 16;

/// What a bulk transfer is: seed, bytes from the client, bytes from the server.
#[derive(Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) up: u64,
    pub(crate) down: u64,
}

impl Plan {
    pub(crate) async fn write(self, out: &mut (impl AsyncWrite + Unpin)) -> Result<()> {
        for number in [self.seed, self.up, self.down] {
            out.write_u64(number).await.context("sending the plan")?;
        }
        Ok(())
    }

    pub(crate) async fn read(from: &mut (impl AsyncRead + Unpin)) -> Result<Self> {
        Ok(Self { seed: from.read_u64().await?, up: from.read_u64().await?, down: from.read_u64().await? })
    }
}

/// Sends `length` bytes that `seed` determines; their CRC32.
pub(crate) async fn send(out: &mut (impl AsyncWrite + Unpin), seed: u64, length: u64) -> Result<u32> {
    let (mut rng, mut hasher, mut left) = (StdRng::seed_from_u64(seed), Hasher::new(), length);
    let mut chunk = vec![0; CHUNK];
    while left > 0 {
        let part = &mut chunk[..left.min(CHUNK as u64) as usize];
        rng.fill_bytes(part);
        hasher.update(part);
        out.write_all(part).await.with_context(|| format!("sending, {left} of {length} bytes left"))?;
        left -= part.len() as u64;
    }
    out.flush().await?;
    Ok(hasher.finalize())
}

/// How fast to read: at most `chunk` bytes, then a pause.
#[derive(Clone, Copy, Default)]
pub(crate) struct Pace {
    pub(crate) chunk: Option<usize>,
    pub(crate) pause: std::time::Duration,
}

/// Receives `length` bytes; their CRC32.
pub(crate) async fn receive(from: &mut (impl AsyncRead + Unpin), length: u64, pace: Pace) -> Result<u32> {
    let (mut hasher, mut left) = (Hasher::new(), length);
    let mut chunk = vec![0; pace.chunk.unwrap_or(CHUNK).max(1)];
    while left > 0 {
        let most = left.min(chunk.len() as u64) as usize;
        let count =
            from.read(&mut chunk[..most]).await.with_context(|| format!("receiving, {left} of {length} bytes left"))?;
        ensure!(count > 0, "the stream ended with {left} of {length} bytes missing");
        hasher.update(&chunk[..count]);
        left -= count as u64;
        if !pace.pause.is_zero() {
            tokio::time::sleep(pace.pause).await;
        }
    }
    Ok(hasher.finalize())
}

/// CRC32 of the bytes that [`send`] sends.
pub(crate) fn checksum(seed: u64, length: u64) -> u32 {
    let (mut rng, mut hasher, mut left) = (StdRng::seed_from_u64(seed), Hasher::new(), length);
    let mut chunk = vec![0; CHUNK];
    while left > 0 {
        // In the same pieces: a generator gives other bytes when asked for other lengths.
        let part = &mut chunk[..left.min(CHUNK as u64) as usize];
        rng.fill_bytes(part);
        hasher.update(part);
        left -= part.len() as u64;
    }
    hasher.finalize()
}

/// Reads up to and with a newline, byte by byte: nothing behind it is taken.
pub(crate) async fn read_line(from: &mut (impl AsyncRead + Unpin)) -> Result<String> {
    let mut line = Vec::new();
    loop {
        let byte = from.read_u8().await.with_context(|| format!("reading a line, after {} bytes", line.len()))?;
        if byte == b'\n' {
            return Ok(String::from_utf8_lossy(&line).into_owned());
        }
        ensure!(line.len() < LINE, "a line of more than {LINE} bytes");
        line.push(byte);
    }
}

/// Reads to the end and forgets it; how many bytes.
pub(crate) async fn discard(from: &mut OwnedReadHalf) -> Result<u64> {
    Ok(tokio::io::copy(from, &mut tokio::io::sink()).await?)
}
