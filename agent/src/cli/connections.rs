//! `underpass connections`.

use std::fmt::Write as _;

use clap::Args;

use super::{
    EXIT_CODES,
    agent::{AgentArgs, ask},
    output::{self, Columns, Format, NONE, age, bytes},
};
use crate::{
    admin::api::{Connections, DEFAULT_LIMIT, MAX_LIMIT},
    relay::{ConnectionId, DataPath, Direction},
};

/// Arguments of `underpass connections`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES}

SENT and RECEIVED count application bytes towards and from the upstream. PATH is user
(TLS in the agent, and why: kernel TLS disabled or unavailable, the cipher missing, or this
socket refused), ktls (TLS in the kernel) or plain (a destination outside the mesh).

Examples:
  underpass connections --limit 20
  underpass connections -o json | jq '.connections[] | .data_path'
  underpass connections --close 4711"))]
pub(super) struct ConnectionsArgs {
    #[command(flatten)]
    agent: AgentArgs,
    /// How to print.
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value_t)]
    output: Format,
    /// List at most this many, oldest first.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_LIMIT as u32, value_parser = clap::value_parser!(u32).range(1..=MAX_LIMIT as i64))]
    limit: u32,
    /// Reset the connection with this number instead of listing.
    #[arg(long, value_name = "ID", conflicts_with = "limit")]
    close: Option<u64>,
}

pub(super) fn connections(args: &ConnectionsArgs) -> anyhow::Result<()> {
    let client = args.agent.client();
    if let Some(id) = args.close {
        let closed = ask(client.close(ConnectionId(id)))?;
        return output::print(args.output, &closed, || format!("connection {id} is being reset"));
    }
    let listed = ask(client.connections(args.limit as usize))?;
    output::print(args.output, &listed, || table(&listed))
}

pub(super) fn table(listed: &Connections) -> String {
    if listed.connections.is_empty() {
        return "no connections".to_owned();
    }
    let mut columns = Columns::new(&[
        "ID",
        "AGE",
        "WAY",
        "WORKLOAD",
        "CLIENT",
        "DESTINATION",
        "SERVICE",
        "UPSTREAM",
        "CLIENT IDENTITY",
        "SERVER IDENTITY",
        "PATH",
        "CIPHER",
        "SENT",
        "RECEIVED",
    ]);
    for c in &listed.connections {
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| NONE.to_owned());
        columns.row([
            c.id.0.to_string(),
            age(c.age_s),
            match c.direction {
                Direction::Outbound => "out".to_owned(),
                Direction::Inbound => "in".to_owned(),
            },
            c.workload.clone(),
            c.source.to_string(),
            c.original_destination.to_string(),
            or_none(&c.service),
            c.upstream.to_string(),
            or_none(&c.source_identity),
            or_none(&c.destination_identity),
            match c.fallback {
                Some(why) => format!("{} ({})", data_path(c.data_path), why.as_str()),
                None => data_path(c.data_path).to_owned(),
            },
            or_none(&c.cipher),
            bytes(c.sent),
            bytes(c.received),
        ]);
    }
    let mut text = columns.text();
    if listed.total > listed.connections.len() {
        let _ = writeln!(text, "{} of {} connections; use --limit for more", listed.connections.len(), listed.total);
    }
    text
}

pub(super) fn data_path(path: DataPath) -> &'static str {
    match path {
        DataPath::User => "user",
        DataPath::Ktls => "ktls",
        DataPath::Plain => "plain",
    }
}
