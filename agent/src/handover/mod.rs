//! One agent follows another on a node without a moment in which nobody accepts.
//!
//! The agent that runs listens on a socket in its run directory ([`Successors`]). A new one, once it knows the cluster and has its
//! certificates, connects ([`Predecessor`]) and says hello. The old one lets go of the node (admin socket, ports, maps, pins) and
//! sends its pods' listening sockets themselves: whatever connects meanwhile waits in them and is lost by nobody. That is why
//! neither `SO_REUSEPORT` (which any process of the pod with the agent's user could join) nor `tcp_migrate_req` is needed. When the
//! new agent has taken all pods over it says so; then the old one stops accepting and keeps its live connections until they end.
//!
//! ```text
//!   new                         old
//!    | -- hello ----------------> |   lets go of everything but listeners and connections
//!    | <- pod (+ its sockets) --- |   one for each
//!    | <- done ------------------ |
//!    |   loads, enrols, accepts   |   accepts, too
//!    | -- serving --------------> |   stops accepting
//!    |          ...               |   until its connections end, or it is told to end
//! ```
//!
//! The connection stays open: an agent that finds that its successor has gone ends with an error, so that whoever supervises it
//! starts it again.

mod wire;

use std::{
    io::{self, ErrorKind},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use crate::{
    capture::inheritance::{Inheritance, Listening, Purpose},
    socket_file::SocketFile,
    sys::file::removed,
};

/// Of what both sides say.
const VERSION: u32 = 1;
/// How long the other side may take for one step of its own: the old one to let go, the new one to answer at all.
const STEP: Duration = Duration::from_secs(30);

/// What is said.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "lowercase", deny_unknown_fields)]
enum Message {
    /// The new agent: I am ready to take over.
    Hello { version: u32, pid: u32 },
    /// The old one: the listeners in this namespace, in this order.
    Pod { netns: u64, purposes: Vec<Purpose> },
    /// The old one: that was all.
    Done { pods: usize },
    /// The new one: I accept.
    Serving,
}

fn socket(run_dir: &Path) -> PathBuf {
    run_dir.join("handover").join("agent.sock")
}

/// Removes the socket's directory, for good.
pub fn remove(run_dir: &Path) -> io::Result<()> {
    removed(std::fs::remove_dir_all(run_dir.join("handover")))
}

/// Where successors come.
pub struct Successors(SocketFile);

impl Successors {
    /// Opens the socket below the run directory.
    pub fn listen(run_dir: &Path) -> io::Result<Self> {
        Ok(Self(SocketFile::bind(&socket(run_dir))?))
    }

    /// Waits for an agent that wants to take over. Others, who say something else, are ignored.
    pub async fn next(&self) -> Successor {
        loop {
            let hello = async {
                let (stream, _) = self.0.listener.accept().await?;
                let stream = blocking(stream.into_std()?)?;
                step(move || {
                    let (message, _) = wire::receive(&stream)?;
                    Ok((stream, message))
                })
                .await
            };
            match hello.await {
                Ok((stream, Message::Hello { version: VERSION, pid })) => return Successor { stream, pid },
                Ok((_, other)) => {
                    tracing::warn!(?other, "somebody wants to take over and speaks another language than this agent");
                }
                Err(error) => {
                    tracing::warn!(%error, "somebody wanted to take over");
                    // Out of descriptors, for example: nothing signals their return.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

/// An agent that is taking over.
pub struct Successor {
    stream: UnixStream,
    /// Its number.
    pub pid: u32,
}

impl Successor {
    /// Sends it the listeners, and waits until it accepts on them.
    pub async fn hand(self, pods: Vec<Listening>) -> io::Result<Self> {
        step(move || {
            let count = pods.len();
            for Listening { netns, sockets } in pods {
                let (purposes, sockets): (Vec<_>, Vec<_>) = sockets.into_iter().unzip();
                wire::send(&self.stream, &Message::Pod { netns, purposes }, &sockets)?;
            }
            wire::send(&self.stream, &Message::Done { pods: count }, &[])?;
            match wire::receive(&self.stream)?.0 {
                Message::Serving => Ok(self),
                other => Err(unexpected(&other)),
            }
        })
        .await
    }

    /// Resolves when it has gone.
    pub async fn gone(self) {
        let waited = async {
            self.stream.set_nonblocking(true)?;
            let stream = tokio::net::UnixStream::from_std(self.stream)?;
            // It has nothing more to say.
            tokio::io::AsyncReadExt::read(&mut { stream }, &mut [0]).await
        };
        if let Err(error) = waited.await {
            tracing::debug!(%error, "the connection to the agent that has taken over");
        }
    }
}

/// An agent that runs and can be followed.
pub struct Predecessor(UnixStream);

impl Predecessor {
    /// The agent with this run directory; `None` when there is none.
    pub fn find(run_dir: &Path) -> io::Result<Option<Self>> {
        match UnixStream::connect(socket(run_dir)) {
            Ok(stream) => Ok(Some(Self(blocking(stream)?))),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Asks it to let go. From here on this agent is the one.
    pub async fn take_over(self) -> io::Result<(Inheritance, Self)> {
        step(move || {
            wire::send(&self.0, &Message::Hello { version: VERSION, pid: std::process::id() }, &[])?;
            let inheritance = Inheritance::default();
            let mut received = 0;
            loop {
                match wire::receive(&self.0)? {
                    (Message::Pod { netns, purposes }, sockets) if purposes.len() == sockets.len() => {
                        inheritance.add(Listening { netns, sockets: purposes.into_iter().zip(sockets).collect() });
                        received += 1;
                    }
                    (Message::Done { pods }, _) if pods == received => return Ok((inheritance, self)),
                    (other, _) => return Err(unexpected(&other)),
                }
            }
        })
        .await
    }

    /// Tells it to stop accepting. It watches what is returned.
    pub async fn serving(self) -> io::Result<impl Sized> {
        step(move || wire::send(&self.0, &Message::Serving, &[]).map(|()| self.0)).await
    }
}

fn blocking(stream: UnixStream) -> io::Result<UnixStream> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(STEP))?;
    stream.set_write_timeout(Some(STEP))?;
    Ok(stream)
}

/// Descriptors travel with the bytes, which the runtime's streams do not offer.
async fn step<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}

fn unexpected(message: &Message) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("the other agent says {message:?}, which is not its turn"))
}

#[cfg(test)]
mod tests;
