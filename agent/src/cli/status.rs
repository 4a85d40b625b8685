//! `underpass status`.

use std::fmt::Write as _;

use clap::Args;
use serde::Serialize;

use super::{
    EXIT_CODES,
    agent::{AgentArgs, ask},
    connections::data_path,
    output::{self, Columns, Format, NONE},
};
use crate::{
    admin::api::{AllCounters, PodState, ProbeCgroupState, Status},
    telemetry::logging::printable,
};

/// Arguments of `underpass status`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES}

Examples:
  underpass status
  underpass status -o json | jq '.pods[] | {{workload, state, reason}}'"))]
pub(super) struct StatusArgs {
    #[command(flatten)]
    agent: AgentArgs,
    /// How to print.
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value_t)]
    output: Format,
}

/// What `-o json` prints: the fields of [`Status`], and `counters`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    pub(super) status: Status,
    pub(super) counters: AllCounters,
}

pub(super) fn status(args: &StatusArgs) -> anyhow::Result<()> {
    let client = args.agent.client();
    let report = ask(async { Ok(Report { status: client.status().await?, counters: client.counters().await? }) })?;
    output::print(args.output, &report, || table(&report))
}

pub(super) fn table(report: &Report) -> String {
    let s = &report.status;
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "{name:<14} {}", printable(value));
    };
    line("version", &s.version);
    line("node", &s.node);
    line("trust domain", &s.trust_domain);
    let why = s.ktls.reason.as_ref().map_or_else(String::new, |why| format!(" ({why})"));
    line("data path", &format!("{}{why}", data_path(s.data_path)));
    if !s.ktls.ciphers.is_empty() {
        let rekey = if s.ktls.rekey { "keys can be replaced" } else { "keys cannot be replaced" };
        line("kernel TLS", &format!("{}; {rekey}", s.ktls.ciphers.join(", ")));
    }
    let source = if s.reload.from_last_good { ", from last good copy" } else { "" };
    line(
        "configuration",
        &format!(
            "generation {}{source} ({} accepted, {} rejected)",
            s.generation, s.reload.accepted, s.reload.rejected
        ),
    );
    if let Some(error) = &s.reload.error {
        line("config error", error);
    }
    for cgroup in &s.probe_cgroups {
        let state = match (cgroup.state, &cgroup.reason) {
            (ProbeCgroupState::Active, _) => "active".to_owned(),
            (ProbeCgroupState::Missing, _) => "missing: its probes fail under STRICT".to_owned(),
            (ProbeCgroupState::Refused, reason) => format!("refused: {}", reason.as_deref().unwrap_or(NONE)),
        };
        line("probe cgroup", &format!("{} ({state})", cgroup.path));
    }

    text.push('\n');
    if s.pods.is_empty() {
        text.push_str("no pods to enrol\n");
    } else {
        let mut pods = Columns::new(&["WORKLOAD", "STATE", "POD", "IDENTITY", "CERTIFICATE UNTIL", "NETNS", "REASON"]);
        for p in &s.pods {
            let state = match p.state {
                PodState::Enrolled => "enrolled",
                PodState::Refused => "refused",
            };
            pods.row([
                p.workload.as_str(),
                state,
                &p.pod_id.map_or_else(|| NONE.to_owned(), |id| id.to_string()),
                &p.identity,
                p.certificate.as_ref().map_or(NONE, |c| &c.not_after),
                &p.netns,
                p.reason.as_deref().unwrap_or(NONE),
            ]);
        }
        text.push_str(&pods.text());
    }

    let a = &report.counters.agent;
    let mut counters = Columns::new(&["COUNTER", "VALUE"]);
    for (name, value) in [
        ("tunnels out", a.tunnels_out),
        ("tunnels in", a.tunnels_in),
        ("resumed", a.resumed),
        ("records in the kernel", a.ktls),
        ("passed through", a.passthrough),
        ("plaintext let in by policy", a.plaintext_in),
        ("closed clean", a.closed_clean),
        ("closed by reset", a.closed_reset),
        ("retries", a.retries),
    ] {
        counters.row([name, &value.to_string()]);
    }
    let fallback = a.ktls_fallback.iter().map(|(name, value)| (format!("records in the agent: {name}"), value));
    let refused = a.refused.iter().map(|(name, value)| (format!("refused: {name}"), value));
    let bpf = report.counters.bpf.iter().filter(|(_, n)| **n > 0).map(|(name, value)| (format!("bpf: {name}"), value));
    for (name, value) in fallback.chain(refused).chain(bpf) {
        counters.row([name, value.to_string()]);
    }
    text.push('\n');
    text.push_str(&counters.text());
    text
}
