//! `underpass connections`.

use std::process::ExitCode;

use clap::Args;

use super::{
    agent::AgentArgs,
    exit::EXIT_CODES_AGENT,
    output::{Columns, NONE, Style, View, age, bytes, more, or_none, yes},
    show::{ShowArgs, show},
};
use crate::{
    admin::{
        api::{Closed, Connections, DEFAULT_LIMIT, MAX_LIMIT},
        query::ConnectionQuery,
    },
    relay::{ConnectionId, ConnectionInfo, ConnectionOrder, DataPath, Direction},
};

/// Arguments of `underpass connections`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES_AGENT}

SENT and RECEIVED count application bytes towards and from the upstream. PATH is user
(TLS in the agent, and why: kernel TLS disabled or unavailable, the cipher missing, or this
socket refused), ktls (TLS in the kernel) or plain (a destination outside the mesh).

Examples:
  underpass connections --limit 20
  underpass connections --workload shop/web --sort bytes --watch
  underpass connections --identity ns/shop/sa/client --data-path user -o wide
  underpass connections -o json | jq '.connections[] | .data_path'
  underpass connections --close 4711"))]
pub(super) struct ConnectionsArgs {
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    show: ShowArgs,
    #[command(flatten)]
    query: QueryArgs,
    /// Reset the connection with this number instead of listing.
    #[arg(long, value_name = "ID", conflicts_with_all = ["limit", "workload", "identity", "direction", "data_path", "sort", "watch", "check"])]
    close: Option<u64>,
}

/// Which connections, and how many.
#[derive(Debug, Clone, Args)]
struct QueryArgs {
    /// List at most this many.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_LIMIT as u32, value_parser = clap::value_parser!(u32).range(1..=MAX_LIMIT as i64))]
    limit: u32,
    /// Which come first.
    #[arg(long, value_enum, value_name = "ORDER", default_value = "oldest")]
    sort: ConnectionOrder,
    #[command(flatten)]
    filter: FilterArgs,
}

/// Which connections.
#[derive(Debug, Clone, Args)]
pub(super) struct FilterArgs {
    /// Only those of a workload: NAMESPACE/NAME, NAME in any namespace, or NAMESPACE/ for all of one.
    #[arg(long, value_name = "WORKLOAD")]
    workload: Option<String>,
    /// Only those with this identity on one side: a SPIFFE ID, or its end behind a slash, like ns/shop/sa/web or web.
    #[arg(long, value_name = "IDENTITY")]
    identity: Option<String>,
    /// Only those that go this way.
    #[arg(long, value_enum, value_name = "WAY")]
    direction: Option<Direction>,
    /// Only those whose bytes are protected there.
    #[arg(long, value_enum, value_name = "PATH")]
    data_path: Option<DataPath>,
}

impl FilterArgs {
    /// As the agent is asked.
    pub(super) fn query(&self, limit: u32, sort: ConnectionOrder) -> ConnectionQuery {
        ConnectionQuery {
            limit: Some(limit as usize),
            workload: self.workload.clone(),
            identity: self.identity.clone(),
            direction: self.direction,
            data_path: self.data_path,
            sort,
        }
    }
}

pub(super) fn connections(args: &ConnectionsArgs) -> anyhow::Result<ExitCode> {
    let agent = args.agent.asker()?;
    if let Some(id) = args.close {
        let closed = agent.ask(async |a| a.close(ConnectionId(id)).await)?;
        args.show.output().print(&closed)?;
        return Ok(ExitCode::SUCCESS);
    }
    let query = args.query.filter.query(args.query.limit, args.query.sort);
    show(&args.show, || agent.ask(async |a| a.connections(&query).await))
}

impl View for Closed {
    fn table(&self, _: Style) -> String {
        format!("connection {} is being reset", self.closed.0)
    }
}

impl View for Connections {
    fn table(&self, style: Style) -> String {
        if self.connections.is_empty() {
            return "no connections".to_owned();
        }
        let mut columns = Columns::new(
            style,
            &[
                "ID",
                "AGE",
                "WAY",
                "WORKLOAD",
                "CLIENT",
                "DESTINATION",
                "CLIENT IDENTITY",
                "SERVER IDENTITY",
                "PATH",
                "SENT",
                "RECEIVED",
            ],
            &["SERVICE", "UPSTREAM", "CIPHER", "RESUMED"],
        );
        for c in &self.connections {
            columns.row([
                c.id.0.to_string().as_str(),
                &age(c.age_s),
                way(c.direction),
                &c.workload,
                &c.source.to_string(),
                &c.original_destination.to_string(),
                or_none(c.source_identity.as_deref()),
                or_none(c.destination_identity.as_deref()),
                &path_and_reason(c),
                &bytes(c.sent),
                &bytes(c.received),
                or_none(c.service.as_deref()),
                &c.upstream.to_string(),
                or_none(c.cipher.as_deref()),
                if c.cipher.is_some() { yes(c.resumed) } else { NONE },
            ]);
        }
        let mut text = columns.text();
        more(&mut text, self.connections.len(), self.total, "connections");
        text
    }
}

pub(super) fn way(direction: Direction) -> &'static str {
    match direction {
        Direction::Outbound => "out",
        Direction::Inbound => "in",
    }
}

pub(super) fn path_and_reason(c: &ConnectionInfo) -> String {
    match c.fallback {
        Some(why) => format!("{} ({})", data_path(c.data_path), why.as_str()),
        None => data_path(c.data_path).to_owned(),
    }
}

pub(super) fn data_path(path: DataPath) -> &'static str {
    match path {
        DataPath::User => "user",
        DataPath::Ktls => "ktls",
        DataPath::Plain => "plain",
    }
}
