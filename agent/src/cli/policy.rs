//! `underpass policies` and `underpass policy explain`.

use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use clap::{ArgGroup, Args, Subcommand};

use super::{
    EXIT_CODES,
    agent::{AgentArgs, ask},
    output::{self, Columns, Format, NONE},
};
use crate::{
    admin::api::ExplainParameters,
    mesh::{PolicyStatus, Snapshot, SpiffeId},
    policy::{self, Explanation, Explanations, Opinion, Peer, PolicyList, Query},
    sources::file,
    telemetry::logging::printable,
};

/// Where policies come from.
#[derive(Debug, Args)]
struct Input {
    #[command(flatten)]
    agent: AgentArgs,
    /// Read this configuration instead of asking the running agent.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How to print.
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value_t)]
    output: Format,
}

/// Arguments of `underpass policies`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES}

STATUS is active, partial (some fields cannot be evaluated, and less is let in than was
meant) or invalid (every connection to its workloads is refused). WORKLOADS counts what
the policy selects in the mesh, and in parentheses what of it runs on this node.

Examples:
  underpass policies
  underpass policies -o json | jq '.policies[] | select(.status.state != \"active\")'
  underpass policies --config node.yaml"))]
pub(super) struct PoliciesArgs {
    #[command(flatten)]
    input: Input,
}

/// Arguments of `underpass policy`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES}

Examples:
  underpass policy explain --from spiffe://cluster.local/ns/default/sa/client --to 10.77.0.2:8080"))]
pub(super) struct PolicyArgs {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// Say whether a connection is allowed, which policy decides, and why the others do not.
    Explain(Box<ExplainArgs>),
}

/// Arguments of `underpass policy explain`.
#[derive(Debug, Args)]
#[group(skip)]
#[command(group(ArgGroup::new("peer").required(true)), after_help = format!("{EXIT_CODES} A connection that is denied is no failure.

Nothing is connected: the answer is computed from the configuration, for the modes,
exclusions and policies of the destination.

Examples:
  underpass policy explain --from spiffe://cluster.local/ns/default/sa/client --to 10.77.0.2:8080
  underpass policy explain --plaintext-from 192.0.2.7 --to 10.96.0.10:80
  underpass policy explain --config node.yaml --plaintext-from 192.0.2.7 --to [fd00::2]:8080 -o json"))]
struct ExplainArgs {
    #[command(flatten)]
    input: Input,
    /// Identity of a mesh peer.
    #[arg(long, value_name = "SPIFFE-ID", group = "peer")]
    from: Option<SpiffeId>,
    /// Address of the mesh peer [default: that of a workload with its identity].
    #[arg(long, value_name = "IP", conflicts_with = "plaintext_from")]
    source_ip: Option<IpAddr>,
    /// Address of a peer that is not in the mesh.
    #[arg(long, value_name = "IP", group = "peer")]
    plaintext_from: Option<IpAddr>,
    /// Address and port of a workload or of a service.
    #[arg(long, value_name = "ADDR:PORT")]
    to: SocketAddr,
}

pub(super) fn policies(args: &PoliciesArgs) -> anyhow::Result<()> {
    let list = match &args.input.config {
        Some(path) => policy::summaries(&configuration(path)?),
        None => ask(args.input.agent.client().policies())?,
    };
    output::print(args.input.output, &list, || table(&list))
}

pub(super) fn policy(args: &PolicyArgs) -> anyhow::Result<()> {
    match &args.command {
        PolicyCommand::Explain(args) => explain(args),
    }
}

fn explain(args: &ExplainArgs) -> anyhow::Result<()> {
    let peer = match (&args.from, args.plaintext_from) {
        (Some(identity), _) => Peer::Mesh { identity: identity.clone(), source: args.source_ip },
        (None, Some(address)) => Peer::Plaintext(address),
        (None, None) => bail!("give --from or --plaintext-from"),
    };
    let query = Query { peer, to: args.to };
    // The agent's own check, so that both ways refuse the same.
    ExplainParameters::from(&query).query().map_err(anyhow::Error::msg)?;
    let explanations = match &args.input.config {
        Some(path) => policy::explain(&configuration(path)?, &query)?,
        None => ask(args.input.agent.client().explain(&query))?,
    };
    output::print(args.input.output, &explanations, || text(&explanations))
}

fn configuration(path: &Path) -> anyhow::Result<Snapshot> {
    Ok(file::read(path).with_context(|| "the configuration is not valid")?.snapshot)
}

/// The policies for people.
pub(super) fn table(list: &PolicyList) -> String {
    if list.policies.is_empty() {
        return "no policies: every connection is allowed that the inbound modes let in".to_owned();
    }
    let mut columns = Columns::new(&["NAME", "SCOPE", "ACTION", "DRY RUN", "RULES", "WORKLOADS", "STATUS", "DETAIL"]);
    for p in &list.policies {
        let (status, detail) = match &p.status {
            PolicyStatus::Active => ("active", NONE.to_owned()),
            PolicyStatus::Partial { ignored } => ("partial", format!("not evaluated: {}", ignored.join(", "))),
            PolicyStatus::Invalid { reason } => ("invalid", reason.clone()),
        };
        columns.row([
            &p.name,
            &p.scope,
            &p.action.to_string(),
            yes_or_none(p.dry_run),
            &p.rules.to_string(),
            &format!("{} ({})", p.workloads, p.local_workloads),
            status,
            &detail,
        ]);
    }
    columns.text()
}

/// Explanations for people.
pub(super) fn text(answer: &Explanations) -> String {
    let mut text = String::new();
    if let Some(service) = &answer.service {
        let _ = writeln!(text, "service {}: {} endpoints\n", printable(service), total(answer));
    }
    for (i, explanation) in answer.explanations.iter().enumerate() {
        if i > 0 {
            text.push('\n');
        }
        one(&mut text, explanation);
    }
    if answer.endpoints_left_out > 0 {
        let _ = writeln!(text, "\nand {} more endpoints; give one's own address", answer.endpoints_left_out);
    }
    text
}

fn total(answer: &Explanations) -> usize {
    answer.explanations.len() + answer.endpoints_left_out
}

fn one(text: &mut String, e: &Explanation) {
    let verdict = if e.allowed { "ALLOWED" } else { "DENIED" };
    let from = e.from.as_deref().unwrap_or("plaintext");
    let _ = writeln!(text, "{verdict}: {} -> {} ({})", printable(from), printable(&e.workload), e.to);
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "  {name:<10} {}", printable(value));
    };
    line("because", &e.reason);
    let source_of = e.source_of.as_ref().map(|w| format!(" (of {w}; --source-ip for another)")).unwrap_or_default();
    line("source", &format!("{}{source_of}", e.source));
    line("mode", &format!("{} (set for the {})", e.mode.mode, e.mode.set_by));
    line("node", &e.node);
    if e.policy.allowed != e.allowed || e.policy.reason != e.reason {
        line("policies", &opinion(&e.policy));
    }
    if let Some(dry_run) = &e.dry_run {
        line("dry run", &format!("with the dry-run policies {}", opinion(dry_run)));
    }
    if e.considered.is_empty() {
        line("considered", "no policy selects the workload");
        return;
    }
    let mut columns = Columns::new(&["POLICY", "SCOPE", "ACTION", "DRY RUN", "MATCHES", "BECAUSE"]);
    for c in &e.considered {
        let action = c.action.map_or_else(|| NONE.to_owned(), |a| a.to_string());
        columns.row([
            c.policy.as_str(),
            c.scope.as_deref().unwrap_or(NONE),
            &action,
            yes_or_none(c.dry_run),
            if c.matches { "yes" } else { "no" },
            &c.because,
        ]);
    }
    text.push('\n');
    for row in columns.text().lines() {
        let _ = writeln!(text, "  {row}");
    }
}

fn opinion(opinion: &Opinion) -> String {
    format!("{}: {}", if opinion.allowed { "allowed" } else { "denied" }, opinion.reason)
}

fn yes_or_none(yes: bool) -> &'static str {
    if yes { "yes" } else { NONE }
}
