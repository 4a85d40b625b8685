//! What the commands that ask a running agent have in common.

use std::{future::Future, path::PathBuf};

use anyhow::Context as _;
use clap::Args;

use super::DEFAULT_RUN_DIR;
use crate::admin::client::{Client, ClientError};

/// Which agent to ask.
#[derive(Debug, Args)]
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
}

/// Runs one exchange with the agent.
pub fn ask<T>(exchange: impl Future<Output = Result<T, ClientError>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    Ok(runtime.block_on(exchange)?)
}
