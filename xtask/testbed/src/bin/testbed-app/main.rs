//! Network programs for tests: a server and a client with the habits that real applications have.
//!
//! Everything is reported as JSON lines on standard output. A command that failed prints `{"error": "ECONNRESET", "detail": …}` last
//! (`"other"` when the system gave no error number, `"timeout"` when the time was up) and exits with 1.

#![forbid(unsafe_code)]

mod client;
mod many;
mod server;
mod sockets;
mod steady;
mod stream;
mod torture;
mod udp;

use std::{net::SocketAddr, process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use nix::{
    errno::Errno,
    sys::resource::{Resource, getrlimit, setrlimit},
};
use serde_json::{Value, json};

#[derive(Parser)]
#[command(about = "Network programs for tests, JSON lines on standard output")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve TCP until killed.
    Serve(server::Serve),
    /// Connect, optionally send something and read until the end, and tell both addresses.
    Connect(client::Connect),
    /// Send a line, read a line, and tell how long it took.
    Request(client::Request),
    /// Read the server's greeting before saying anything (server in mode `banner`).
    Greeting(sockets::Target),
    /// Send, close the sending side, then read the answer (server in mode `digest`).
    HalfClose(client::HalfClose),
    /// Move bytes both ways at once, checked by checksums (server in mode `bulk`).
    Bulk(client::Bulk),
    /// Exchange a line and then reset the connection (server in mode `echo`).
    Reset(sockets::Target),
    /// Exchange a line, then wait for the connection to be reset; anything else is a failure (server in mode `echo`).
    ExpectReset(sockets::Target),
    /// Many short connections, each one line there and back (server in mode `echo`).
    Parallel(many::Parallel),
    /// New connections at a steady rate until standard input closes (server in mode `echo`).
    Steady(steady::Steady),
    /// Many idle connections, held until standard input closes.
    Hold(many::Hold),
    /// Answer UDP datagrams until killed.
    UdpServe {
        /// Address to listen on.
        listen: SocketAddr,
    },
    /// Send a UDP datagram and wait for the answer.
    Udp(sockets::Target),
    /// Be one end of connections that do what a seed says, and judge what comes of them.
    #[command(subcommand)]
    Torture(torture::Command),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(value) => {
            print(&value);
            ExitCode::SUCCESS
        }
        Err(error) => {
            print(&failure(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<Value> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("reading the limit of open files")?;
    // Root may go beyond the hard limit, up to fs.nr_open; without it the hard limit has to do.
    let most =
        std::fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|text| text.trim().parse().ok()).unwrap_or(hard);
    setrlimit(Resource::RLIMIT_NOFILE, most, most)
        .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard))
        .context("raising the limit of open files")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting threads")?;
    runtime.block_on(async {
        match command {
            Command::Serve(serve) => serve.run().await,
            Command::UdpServe { listen } => udp::serve(listen).await,
            Command::Connect(command) => command.target.within(command.run()).await,
            Command::Request(command) => command.target.within(command.run()).await,
            Command::Greeting(target) => target.within(client::greeting(&target)).await,
            Command::HalfClose(command) => command.target.within(command.run()).await,
            Command::Bulk(command) => command.target.within(command.run()).await,
            Command::Reset(target) => target.within(client::reset(&target)).await,
            Command::ExpectReset(target) => target.within(client::expect_reset(&target)).await,
            Command::Parallel(command) => command.target.within(command.run()).await,
            Command::Steady(command) => command.run().await,
            Command::Hold(command) => command.run().await,
            Command::Udp(target) => target.within(udp::ask(&target)).await,
            Command::Torture(command) => torture::run(command).await,
        }
    })
}

/// Prints one JSON line. A closed output means that nobody wants it any more.
fn print(value: &Value) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{value}").and_then(|()| out.flush());
}

/// How an error is reported.
fn failure(error: &anyhow::Error) -> Value {
    json!({ "error": name_of(error), "detail": format!("{error:#}") })
}

/// `ECONNREFUSED` and the like, `timeout`, or `other`.
fn name_of(error: &anyhow::Error) -> String {
    if error.chain().any(<dyn std::error::Error>::is::<tokio::time::error::Elapsed>) {
        return "timeout".into();
    }
    let number = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>()?.raw_os_error());
    number.map_or_else(|| "other".into(), |number| format!("{:?}", Errno::from_raw(number)))
}

/// Milliseconds with fractions, for reports.
fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
