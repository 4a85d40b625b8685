//! What the commands that ask a running agent have in common.

use std::path::PathBuf;

use clap::Args;
use tokio::runtime::Runtime;

use super::DEFAULT_RUN_DIR;
use crate::admin::client::{Client, ClientError};

/// Which agent to ask.
#[derive(Debug, Clone, Args)]
pub struct AgentArgs {
    /// The agent's run directory; its socket is DIR/admin.sock.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_RUN_DIR, env = "UNDERPASS_RUN_DIR")]
    pub run_dir: PathBuf,
    /// The agent's socket, when it is elsewhere.
    #[arg(long, value_name = "PATH", conflicts_with = "run_dir")]
    pub socket: Option<PathBuf>,
}

impl AgentArgs {
    /// A client of that agent.
    pub fn client(&self) -> Client {
        Client::new(&self.socket.clone().unwrap_or_else(|| super::admin_socket(&self.run_dir)))
    }

    /// For asking it, again and again. Connects to nothing yet.
    pub fn asker(&self) -> anyhow::Result<Asker> {
        Ok(Asker { runtime: super::runtime::small()?, client: self.client() })
    }
}

/// Asks an agent from code that is not asynchronous.
pub struct Asker {
    runtime: Runtime,
    client: Client,
}

impl Asker {
    /// Runs one exchange, or a few that make one answer.
    pub fn ask<T>(&self, exchange: impl AsyncFnOnce(&Client) -> Result<T, ClientError>) -> anyhow::Result<T> {
        Ok(self.runtime.block_on(exchange(&self.client))?)
    }

    /// Runs something else that is asynchronous.
    pub fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }
}
