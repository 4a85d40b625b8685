//! `underpass policies` and `underpass policy explain`.

use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, bail};
use clap::{ArgGroup, Args, Subcommand};

use super::{
    agent::AgentArgs,
    exit::{EXIT_CODES_AGENT, EXIT_CODES_CHECK},
    output::{Columns, NONE, OutputArgs, Style, View, shown, yes},
    show::{ShowArgs, show},
};
use crate::{
    admin::api::ExplainParameters,
    mesh::{PolicyStatus, Snapshot, SpiffeId},
    policy::{self, Explanation, Explanations, Opinion, Peer, PolicyList, PolicySummary, Query},
    sources::file,
};

/// Where policies come from.
#[derive(Debug, Args)]
struct Input {
    #[command(flatten)]
    agent: AgentArgs,
    /// Read this configuration instead of asking the running agent.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Arguments of `underpass policies`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES_CHECK}

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
    #[command(flatten)]
    show: ShowArgs,
}

/// Arguments of `underpass policy`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES_AGENT}

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
#[command(group(ArgGroup::new("peer").required(true)), after_help = format!("{EXIT_CODES_AGENT} A connection that is denied is no failure.

Nothing is connected: the answer is computed from the configuration, for the modes,
exclusions and policies of the destination.

Examples:
  underpass policy explain --from spiffe://cluster.local/ns/default/sa/client --to 10.77.0.2:8080
  underpass policy explain --plaintext-from 192.0.2.7 --to 10.96.0.10:80
  underpass policy explain --config node.yaml --plaintext-from 192.0.2.7 --to [fd00::2]:8080 -o json"))]
struct ExplainArgs {
    #[command(flatten)]
    input: Input,
    #[command(flatten)]
    output: OutputArgs,
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

pub(super) fn policies(args: &PoliciesArgs) -> anyhow::Result<ExitCode> {
    let agent = args.input.agent.asker()?;
    show(&args.show, || match &args.input.config {
        Some(path) => Ok(policy::summaries(&configuration(path)?)),
        None => agent.ask(async |a| a.policies().await),
    })
}

pub(super) fn policy(args: &PolicyArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        PolicyCommand::Explain(args) => explain(args).map(|()| ExitCode::SUCCESS),
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
        None => args.input.agent.asker()?.ask(async |a| a.explain(&query).await)?,
    };
    args.output.print(&explanations)
}

fn configuration(path: &Path) -> anyhow::Result<Snapshot> {
    Ok(file::read(path, None).with_context(|| "the configuration is not valid")?.snapshot)
}

impl View for PolicyList {
    fn table(&self, style: Style) -> String {
        if self.policies.is_empty() {
            return "no policies: every connection is allowed that the inbound modes let in".to_owned();
        }
        let headings = ["NAME", "SCOPE", "ACTION", "DRY RUN", "RULES", "WORKLOADS", "STATUS", "DETAIL"];
        let mut columns = Columns::new(style, &headings, &[]);
        for p in &self.policies {
            let (status, detail) = match &p.status {
                PolicyStatus::Active => ("active", NONE.to_owned()),
                PolicyStatus::Partial { ignored } => ("partial", format!("not evaluated: {}", ignored.join(", "))),
                PolicyStatus::Invalid { reason } => ("invalid", reason.clone()),
            };
            columns.row([
                &p.name,
                &p.scope,
                &p.action.to_string(),
                yes(p.dry_run),
                &p.rules.to_string(),
                &format!("{} ({})", p.workloads, p.local_workloads),
                status,
                &detail,
            ]);
        }
        columns.text()
    }

    fn problems(&self) -> Vec<String> {
        let problem = |p: &PolicySummary| match &p.status {
            PolicyStatus::Active => None,
            PolicyStatus::Partial { ignored } => Some(format!(
                "{} lets in less than was meant, its fields {} are not evaluated",
                p.name,
                ignored.join(", ")
            )),
            PolicyStatus::Invalid { reason } => Some(format!("{} refuses everything: {reason}", p.name)),
        };
        self.policies.iter().filter_map(problem).collect()
    }
}

impl View for Explanations {
    fn table(&self, style: Style) -> String {
        let mut text = String::new();
        if let Some(service) = &self.service {
            let _ = writeln!(text, "service {}: {} endpoints\n", shown(service), total(self));
        }
        for (i, explanation) in self.explanations.iter().enumerate() {
            if i > 0 {
                text.push('\n');
            }
            one(&mut text, explanation, style);
        }
        if self.endpoints_left_out > 0 {
            let _ = writeln!(text, "\nand {} more endpoints; give one's own address", self.endpoints_left_out);
        }
        text
    }
}

fn total(answer: &Explanations) -> usize {
    answer.explanations.len() + answer.endpoints_left_out
}

fn one(text: &mut String, e: &Explanation, style: Style) {
    let verdict = if e.allowed { "ALLOWED" } else { "DENIED" };
    let from = e.from.as_deref().unwrap_or("plaintext");
    let _ = writeln!(text, "{verdict}: {} -> {} ({})", shown(from), shown(&e.workload), e.to);
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "  {name:<10} {}", shown(value));
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
    let headings = ["POLICY", "SCOPE", "ACTION", "DRY RUN", "MATCHES", "BECAUSE"];
    let mut columns = Columns::new(style, &headings, &[]);
    for c in &e.considered {
        let action = c.action.map_or_else(|| NONE.to_owned(), |a| a.to_string());
        columns.row([
            c.policy.as_str(),
            c.scope.as_deref().unwrap_or(NONE),
            &action,
            yes(c.dry_run),
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
