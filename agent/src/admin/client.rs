//! Talks to a running agent.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Method, Request, StatusCode, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::{net::UnixStream, time::timeout};

use super::{
    api::{AllCounters, Closed, Connections, ExplainParameters, Problem, Status},
    inventory::{Certificates, Services, Workloads},
    query::ConnectionQuery,
};
use crate::{
    policy::{Explanations, PolicyList, Query},
    relay::ConnectionId,
};

/// Largest answer read, in bytes: the most connections that are listed, generously.
const MAX_ANSWER: usize = 128 * 1024 * 1024;
/// A request must be answered within this time.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Why the agent did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "no agent is running: nobody listens on {path}; start it with `underpass run`, or name its directory with --run-dir"
    )]
    NotRunning {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not allowed, or another failure to connect.
    #[error("connecting to {path} failed; only root and the agent's own user may")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The agent took too long.
    #[error("the agent did not answer on {path} within {TIMEOUT:?}; see its log")]
    Timeout {
        /// The socket.
        path: PathBuf,
    },
    /// The question cannot be written down.
    #[error("the question cannot be sent: {reason}")]
    Query {
        /// Why.
        reason: String,
    },
    /// The agent refused.
    #[error("the agent refused ({status}): {error}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// Its words.
        error: String,
    },
    /// Not an answer of an agent of this version.
    #[error(
        "answer of the agent on {path}: {reason}; use the command line of the agent's own version, as root or the agent's user"
    )]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// A client of one agent; each call makes its own connection.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// For the agent that listens on `path`.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// How the agent is.
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.call(Method::GET, "/v1/status").await
    }

    /// Live connections.
    pub async fn connections(&self, query: &ConnectionQuery) -> Result<Connections, ClientError> {
        let wrong = |e: serde_urlencoded::ser::Error| ClientError::Query { reason: e.to_string() };
        let query = serde_urlencoded::to_string(query).map_err(wrong)?;
        self.call(Method::GET, &format!("/v1/connections?{query}")).await
    }

    /// The workloads of the mesh, at most `limit` of them.
    pub async fn workloads(&self, limit: usize) -> Result<Workloads, ClientError> {
        self.call(Method::GET, &format!("/v1/workloads?limit={limit}")).await
    }

    /// The services of the mesh, at most `limit` of them.
    pub async fn services(&self, limit: usize) -> Result<Services, ClientError> {
        self.call(Method::GET, &format!("/v1/services?limit={limit}")).await
    }

    /// The certificates of this node's identities.
    pub async fn certificates(&self) -> Result<Certificates, ClientError> {
        self.call(Method::GET, "/v1/certificates").await
    }

    /// Resets a connection.
    pub async fn close(&self, id: ConnectionId) -> Result<Closed, ClientError> {
        self.call(Method::POST, &format!("/v1/connections/{}/close", id.0)).await
    }

    /// What was counted.
    pub async fn counters(&self) -> Result<AllCounters, ClientError> {
        self.call(Method::GET, "/v1/counters").await
    }

    /// The policies in force.
    pub async fn policies(&self) -> Result<PolicyList, ClientError> {
        self.call(Method::GET, "/v1/policies").await
    }

    /// What would become of a connection.
    pub async fn explain(&self, query: &Query) -> Result<Explanations, ClientError> {
        let parameters = ExplainParameters::from(query);
        let mut target = format!("/v1/policies/explain?to={}", parameters.to);
        // Identities and addresses consist of characters that a query may hold as they are (RFC 3986, section 3.4), but
        // for the brackets of an IPv6 address and its zone, which HTTP's parser lets pass.
        for (name, value) in [
            ("from", parameters.from),
            ("source_ip", parameters.source_ip),
            ("plaintext_from", parameters.plaintext_from),
        ] {
            if let Some(value) = value {
                target.extend(["&", name, "=", &value]);
            }
        }
        self.call(Method::GET, &target).await
    }

    async fn call<T: DeserializeOwned>(&self, method: Method, target: &str) -> Result<T, ClientError> {
        timeout(TIMEOUT, self.exchange(method, target))
            .await
            .map_err(|_| ClientError::Timeout { path: self.path.clone() })?
    }

    async fn exchange<T: DeserializeOwned>(&self, method: Method, target: &str) -> Result<T, ClientError> {
        let path = || self.path.clone();
        let stream = UnixStream::connect(&self.path).await.map_err(|source| match source.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => ClientError::NotRunning { path: path(), source },
            _ => ClientError::Connect { path: path(), source },
        })?;
        let wrong = |reason: String| ClientError::Answer { path: path(), reason };
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|e| wrong(e.to_string()))?;
        let request = Request::builder()
            .method(method)
            .uri(target)
            .header(header::HOST, "underpass")
            .body(Empty::<Bytes>::new())
            .map_err(|e| wrong(e.to_string()))?;
        let exchange = async {
            let response = sender.send_request(request).await.map_err(|e| wrong(e.to_string()))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER)
                .collect()
                .await
                .map_err(|e| wrong(e.to_string()))?
                .to_bytes();
            decode(status, &body).map_err(|e| e.unwrap_or_else(wrong))
        };
        // The connection is driven here and not in a task, so that it ends with this call.
        tokio::pin!(exchange);
        tokio::select! {
            answer = &mut exchange => answer,
            ended = connection => {
                ended.map_err(|e| wrong(e.to_string()))?;
                exchange.await
            }
        }
    }
}

/// The answer in a body; `Err(Err(reason))` when it is none.
fn decode<T: DeserializeOwned>(status: StatusCode, body: &[u8]) -> Result<T, Result<ClientError, String>> {
    if status.is_success() {
        return serde_json::from_slice(body).map_err(|e| Err(format!("not the expected JSON: {e}")));
    }
    let error = serde_json::from_slice::<Problem>(body)
        .map_or_else(|_| status.canonical_reason().unwrap_or("no reason").to_owned(), |p| p.error);
    Err(Ok(ClientError::Refused { status: status.as_u16(), error }))
}
