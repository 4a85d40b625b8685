//! `underpass status`.

use std::{net::IpAddr, process::ExitCode};

use clap::Args;
use serde::Serialize;

use super::{
    agent::AgentArgs,
    connections::data_path,
    exit::EXIT_CODES_CHECK,
    output::{Columns, Lines, NONE, Style, View, or_none},
    show::{ShowArgs, show},
    workloads::pod_state,
};
use crate::{
    admin::api::{AllCounters, InterfaceStatus, PlaintextLeft, PodState, ProbeCgroupState, Status},
    sources::kubernetes::SourceStatus,
};

/// Arguments of `underpass status`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES_CHECK}

Examples:
  underpass status
  underpass status --watch=1s
  underpass status --check > /dev/null
  underpass status -o json | jq '.pods[] | {{workload, state, reason}}'"))]
pub(super) struct StatusArgs {
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    show: ShowArgs,
}

/// What `-o json` prints: the fields of [`Status`], and `counters`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    pub(super) status: Status,
    pub(super) counters: AllCounters,
}

pub(super) fn status(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let agent = args.agent.asker()?;
    show(&args.show, || agent.ask(async |a| Ok(Report { status: a.status().await?, counters: a.counters().await? })))
}

impl View for Report {
    fn table(&self, style: Style) -> String {
        let mut text = summary(&self.status);
        text.push('\n');
        text.push_str(&pods(&self.status, style));
        text.push('\n');
        text.push_str(&interfaces(&self.status, style));
        if let Some(cluster) = &self.status.cluster {
            text.push_str(&cluster_table(cluster, style));
            text.push('\n');
        }
        text.push_str(&counters(&self.counters, style));
        text
    }

    fn problems(&self) -> Vec<String> {
        let s = &self.status;
        let mut problems = Vec::new();
        if let Some(error) = &s.reload.error {
            problems.push(format!("the configuration was not accepted: {error}"));
        }
        problems.extend(s.capture_problems.iter().cloned());
        for p in &s.pods {
            if p.state == PodState::Kept {
                problems.push(format!("{} is kept captured and closed: {}", p.workload, or_none(p.reason.as_deref())));
            } else if p.state == PodState::Refused {
                problems.push(format!("{} is not enrolled: {}", p.workload, or_none(p.reason.as_deref())));
            } else if p.certificate.is_none() {
                problems.push(format!("{} has no valid certificate; see `underpass certificates`", p.workload));
            }
        }
        for kind in s.cluster.iter().flat_map(|c| &c.kinds) {
            if let Some(error) = &kind.error {
                problems.push(format!("{:?} objects cannot be followed: {error}", kind.kind));
            } else if !kind.synced {
                problems.push(format!("{:?} objects have not been listed yet", kind.kind));
            }
        }
        if let Some(cluster) = &s.cluster {
            problems.extend(cluster.problems.iter().map(|p| format!("{}: {}", p.object, p.problem)));
            let more = cluster.problems_total - cluster.problems.len().min(cluster.problems_total);
            if more > 0 {
                problems.push(format!("{more} more objects are not taken as they are"));
            }
        }
        if let Some(revocation) = &s.revocation {
            problems.extend(revocation.problems.iter().map(|p| format!("crlFile {}: {p}", revocation.file)));
        }
        let refused = s.probe_cgroups.iter().filter(|c| c.state == ProbeCgroupState::Refused);
        problems.extend(refused.map(|c| format!("probe cgroup {}: {}", c.path, or_none(c.reason.as_deref()))));
        if !s.probe_node_addresses.is_empty() {
            problems.push(format!(
                "declared probe ports take plaintext from whoever uses {}, NodePort clients among them;                  turn probes.fromNodeAddresses and probes.nodeAddresses off",
                addresses(&s.probe_node_addresses)
            ));
        }
        problems.extend(s.plaintext_left.iter().map(|left| {
            format!(
                "{} has plaintext connections that its {} forbids; ending them failed {} times: {}",
                left.workload, left.forbidden_by, left.attempts, left.error
            )
        }));
        problems
    }
}

fn summary(s: &Status) -> String {
    let mut lines = Lines::default();
    lines.line("version", &s.version);
    lines.line("node", &s.node);
    lines.line("trust domain", &s.trust_domain);
    let why = s.ktls.reason.as_ref().map_or_else(String::new, |why| format!(" ({why})"));
    lines.line("data path", &format!("{}{why}", data_path(s.data_path)));
    if !s.ktls.ciphers.is_empty() {
        let rekey = if s.ktls.rekey { "keys can be replaced" } else { "keys cannot be replaced" };
        lines.line("kernel TLS", &format!("{}; {rekey}", s.ktls.ciphers.join(", ")));
    }
    let source = if s.reload.from_last_good { ", from last good copy" } else { "" };
    let (accepted, rejected) = (s.reload.accepted, s.reload.rejected);
    let generation = s.generation;
    lines.line("configuration", &format!("generation {generation}{source} ({accepted} accepted, {rejected} rejected)"));
    if let Some(error) = &s.reload.error {
        lines.line("config error", error);
    }
    if let Some(revocation) = &s.revocation {
        let (lists, revoked) = (revocation.lists, revocation.revoked);
        lines.line("revocation", &format!("{lists} lists, {revoked} certificates revoked ({})", revocation.file));
    }
    for problem in &s.capture_problems {
        lines.line("capture", problem);
    }
    for cgroup in &s.probe_cgroups {
        let state = match (cgroup.state, &cgroup.reason) {
            (ProbeCgroupState::Active, None) => "active".to_owned(),
            (ProbeCgroupState::Active, Some(reason)) => {
                format!("active only where packets carry their sockets: {reason}")
            }
            (ProbeCgroupState::Missing, _) => "missing: its probes fail under STRICT".to_owned(),
            (ProbeCgroupState::Refused, reason) => format!("refused: {}", or_none(reason.as_deref())),
        };
        lines.line("probe cgroup", &format!("{} ({state})", cgroup.path));
    }
    if !s.probe_node_addresses.is_empty() {
        let from = addresses(&s.probe_node_addresses);
        lines.line("probes", &format!("declared ports take plaintext from anybody at {from}"));
    }
    for left in &s.plaintext_left {
        let PlaintextLeft { workload, forbidden_by, attempts, error } = left;
        let state = format!("not ended, forbidden by {forbidden_by}; {attempts} attempts: {error}");
        lines.line("plaintext", &format!("{workload} ({state})"));
    }
    lines.text()
}

fn addresses(list: &[IpAddr]) -> String {
    list.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ")
}

fn pods(s: &Status, style: Style) -> String {
    if s.pods.is_empty() {
        return "no pods to enrol\n".to_owned();
    }
    let headings = ["WORKLOAD", "STATE", "POD", "IDENTITY", "CERTIFICATE UNTIL", "REASON"];
    let mut pods = Columns::new(style, &headings, &["SERIAL", "NETNS"]);
    for p in &s.pods {
        pods.row([
            p.workload.as_str(),
            pod_state(p.state),
            &p.pod_id.map_or_else(|| NONE.to_owned(), |id| id.to_string()),
            &p.identity,
            p.certificate.as_ref().map_or(NONE, |c| &c.not_after),
            or_none(p.reason.as_deref()),
            p.certificate.as_ref().map_or(NONE, |c| &c.serial),
            &p.netns,
        ]);
    }
    pods.text()
}

/// Interfaces that are not as usual: without a guard on the node's side, or moved away by somebody
/// in the pod. Nothing where there are none.
fn interfaces(s: &Status, style: Style) -> String {
    let mut interfaces = Columns::new(style, &["WORKLOAD", "INTERFACE", "KIND", "NODE-SIDE GUARD"], &[]);
    let mut unusual = false;
    for InterfaceStatus { workload, guard } in &s.interfaces {
        let on_the_node = match (&guard.node_guard, guard.moved) {
            (Some(_), false) => continue,
            (Some(device), true) => format!("on {device}; the interface has left the pod's namespace"),
            (None, _) => "none, only the guard inside the pod".to_owned(),
        };
        unusual = true;
        interfaces.row([workload.as_str(), &guard.interface, &guard.kind, &on_the_node]);
    }
    if unusual { format!("{}\n", interfaces.text()) } else { String::new() }
}

/// The kinds that are followed, and what is wrong with single objects.
fn cluster_table(cluster: &SourceStatus, style: Style) -> String {
    let mut kinds = Columns::new(style, &["KIND", "VERSION", "OBJECTS", "STATE", "HEARD", "ERROR"], &[]);
    for kind in &cluster.kinds {
        let state = match (kind.synced, cluster.from_last_good) {
            (true, _) => "in sync",
            (false, true) => "last good copy",
            (false, false) => "not listed yet",
        };
        let heard = kind.heard_seconds_ago.map_or_else(|| NONE.to_owned(), |s| format!("{s} s ago"));
        kinds.row([
            &format!("{:?}", kind.kind),
            or_none(kind.version.as_deref()),
            &kind.objects.to_string(),
            state,
            &heard,
            or_none(kind.error.as_deref()),
        ]);
    }
    let mut text = kinds.text();
    if !cluster.problems.is_empty() {
        let mut problems = Columns::new(style, &["OBJECT", "PROBLEM"], &[]);
        for p in &cluster.problems {
            problems.row([&p.object, &p.problem]);
        }
        text.push('\n');
        text.push_str(&problems.text());
    }
    text
}

fn counters(all: &AllCounters, style: Style) -> String {
    let a = &all.agent;
    let mut counters = Columns::new(style, &["COUNTER", "VALUE"], &[]);
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
    let bpf = all.bpf.iter().filter(|(_, n)| **n > 0).map(|(name, value)| (format!("bpf: {name}"), value));
    for (name, value) in fallback.chain(refused).chain(bpf) {
        counters.row([name, value.to_string()]);
    }
    counters.text()
}
