//! What the plugin and the agent say to each other: one request and one answer per connection to a Unix socket.
//!
//! Each is one JSON object of at most [`LIMIT`] bytes, ended by shutting down the sender's direction. The
//! descriptor of the pod's network namespace travels with the request's first byte (`SCM_RIGHTS`), because the path
//! that the runtime gives means nothing in the agent's mount namespace.

#[cfg(test)]
mod tests;
mod wire;

use std::{
    io,
    net::IpAddr,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

/// Version of the protocol. Both ends are of one release except while a node is being upgraded.
pub const VERSION: u32 = 1;
/// Longest request or answer, in bytes. A `Gc` of a node's 500 pods is 34 KB.
pub const LIMIT: usize = 64 << 10;

/// What the plugin asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// What it is about.
    #[serde(flatten)]
    pub command: Command,
}

impl Request {
    /// A request of this version.
    pub fn new(command: Command) -> Self {
        Self { version: VERSION, command }
    }
}

/// Named as in the CNI specification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Command {
    /// A pod was given an interface. It comes with the descriptor of its network namespace.
    Add(Attachment),
    /// Is the pod still captured? It comes with the descriptor as well.
    Check(Attachment),
    /// The pod is going away, or its interface is. Repeated, and for pods that were never added.
    Del(Removal),
    /// Everything but these has gone.
    Gc {
        /// Container ids, each once.
        valid: Vec<String>,
    },
    /// Can pods be added?
    Status,
}

/// A pod's interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The runtime's id of the pod's sandbox (`CNI_CONTAINERID`).
    pub container: String,
    /// `CNI_IFNAME`: `eth0`, or another for a further network of the pod.
    pub interface: String,
    /// `CNI_NETNS`: the path as the runtime sees it, for messages.
    pub netns: PathBuf,
    /// Whose interface it is.
    pub pod: PodName,
    /// What the plugins before gave it.
    pub addresses: Vec<IpAddr>,
}

/// What a pod is called in Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID, from runtimes that say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
}

impl PodName {
    /// Is it a static pod, which its kubelet runs by itself? Its UID tells: kubelets take the MD5 sum of the manifest, 32
    /// hexadecimal digits. All other pods have a UUID with dashes, which the API server makes whatever a pod's author asks
    /// for. A manifest may set a UID of another form; the pod's mirror pod then tells.
    #[must_use]
    pub fn is_static(&self) -> bool {
        let hash = |uid: &String| uid.len() == 32 && uid.bytes().all(|byte| byte.is_ascii_hexdigit());
        self.uid.as_ref().is_some_and(hash)
    }
}

/// A pod that goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    /// The runtime's id of the pod's sandbox (`CNI_CONTAINERID`).
    pub container: String,
    /// Its name, when the runtime still knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodName>,
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "lowercase")]
pub enum Answer {
    /// It is done: the pod may run.
    Done {
        /// Whether the pod is captured now; `false` for one that is not in the mesh.
        held: bool,
    },
    /// It was not done: the pod must not run.
    Refused {
        /// Why, and what to do about it.
        message: String,
        /// Whether the same may succeed later without anybody's help.
        retry: bool,
    },
}

/// Sends a request and shuts down the stream's writing direction.
///
/// # Errors
/// `InvalidInput` for a request longer than [`LIMIT`]; `TimedOut` when the stream has a write timeout and all of it took
/// longer; what sending gives.
pub fn send_request(stream: &UnixStream, request: &Request, netns: Option<BorrowedFd<'_>>) -> io::Result<()> {
    wire::send(stream, &wire::encode(request)?, netns)
}

/// Waits for a request and the descriptor that came with it. Further descriptors are closed.
///
/// # Errors
/// `UnexpectedEof` when the stream ended before the request did; `InvalidData` for another version, for more than [`LIMIT`]
/// bytes and for what is no request; `TimedOut` when the stream has a read timeout and all of it took longer; what
/// receiving gives.
pub fn receive_request(stream: &UnixStream) -> io::Result<(Request, Option<OwnedFd>)> {
    let (bytes, descriptor) = wire::receive(stream)?;
    Ok((parse_request(&bytes)?, descriptor))
}

/// Reads a request's bytes.
///
/// # Errors
/// As [`receive_request`].
pub fn parse_request(bytes: &[u8]) -> io::Result<Request> {
    /// First, because another version may have changed everything else.
    #[derive(Deserialize)]
    struct Head {
        version: u32,
    }
    let Head { version } = wire::decode("request", bytes)?;
    if version != VERSION {
        let reason = format!(
            "the request is of protocol version {version}, and only version {VERSION} is understood: plugin and agent are of \
             different releases, and the agent installs its own plugin when it starts"
        );
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    wire::decode("request", bytes)
}

/// Sends an answer and shuts down the stream's writing direction. A message that is too long is cut.
///
/// # Errors
/// `TimedOut` when the stream has a write timeout and all of it took longer; what sending gives.
pub fn send_answer(stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    let bytes = match (wire::encode(answer), answer) {
        (Err(_), Answer::Refused { message, retry }) => {
            // Escaped, a character takes six bytes at most.
            let message = message.chars().take(LIMIT / 8).collect();
            wire::encode(&Answer::Refused { message, retry: *retry })?
        }
        (encoded, _) => encoded?,
    };
    wire::send(stream, &bytes, None)
}

/// Waits for the answer.
///
/// # Errors
/// As [`receive_request`], but for the version.
pub fn receive_answer(stream: &UnixStream) -> io::Result<Answer> {
    let (bytes, _) = wire::receive(stream)?;
    wire::decode("answer", &bytes)
}
