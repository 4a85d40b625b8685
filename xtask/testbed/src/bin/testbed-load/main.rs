//! A load generator: a server and closed-loop clients that do little else than system calls, so that what is measured is what lies between them.
//!
//! A request says how long it is and how long the answer shall be ([`wire`]), so one server serves every case. Each thread has an epoll of its own.
//! The client reads the machine's counters itself, at the two ends of exactly the time in which it counts ([`window`]). Reports are JSON lines on
//! standard output; a failed command says why on standard error and exits with 1.

#![forbid(unsafe_code)]
#![expect(clippy::cast_precision_loss, reason = "counts of a few seconds are far below 2^52")]

mod client;
mod counters;
mod hold;
mod server;
mod sockets;
mod window;
mod wire;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

#[derive(Parser)]
#[command(about = "A load generator, JSON lines on standard output")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve until killed; prints {"listening": ADDRESS} first.
    Serve(server::Serve),
    /// Receive without end on every connection and count bytes.
    Bulk(client::Bulk),
    /// Send a request, await an answer as long, again and again on every connection, and count answers.
    Rr(client::Rr),
    /// The same with a new connection for each request.
    Crr(client::Rr),
    /// Open connections, exchange 64 bytes on each, print {"held": COUNT}, and keep them until standard input closes.
    Hold(hold::Hold),
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("reading the limit of open files")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raising the limit of open files")?;
    match command {
        Command::Serve(serve) => serve.run(),
        Command::Bulk(bulk) => bulk.run(),
        Command::Rr(rr) => rr.run(true),
        Command::Crr(rr) => rr.run(false),
        Command::Hold(hold) => hold.run(),
    }
}
