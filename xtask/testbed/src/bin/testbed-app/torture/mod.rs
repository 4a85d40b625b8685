//! Ends of connections whose plans are made from a seed, see `testbed::torture`.

mod client;
mod context;
mod peer;
mod server;

use anyhow::Result;
use serde_json::Value;

/// Which end.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Accept connections until standard input closes; then, when the last one is over, report.
    Serve(server::Serve),
    /// Make connections, and report when the last one is over.
    Drive(client::Drive),
}

/// A report, see [`testbed::torture::Report`]. What was found to be wrong is in it, and no failure of the command.
pub(crate) async fn run(command: Command) -> Result<Value> {
    let report = match command {
        Command::Serve(serve) => serve.run().await?,
        Command::Drive(drive) => drive.run().await?,
    };
    Ok(serde_json::to_value(report)?)
}
