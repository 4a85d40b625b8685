//! `underpass workloads`.

use std::process::ExitCode;

use clap::Args;

use super::{
    agent::AgentArgs,
    exit::EXIT_CODES_CHECK,
    output::{Columns, NONE, Style, View, list, more, or_none},
    show::{ShowArgs, show},
};
use crate::admin::{
    api::{DEFAULT_LIMIT, MAX_LIMIT, PodState},
    inventory::{WorkloadInfo, Workloads},
};

/// Arguments of `underpass workloads`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES_CHECK}

STATE is enrolled, refused or kept for workloads of this node, and - for those of other nodes.
A kept one vanished without leaving the mesh: it stays captured, and its connections are refused.
PROTOCOL is underpass (mutual TLS or nothing) or plain (known, and not in the mesh). MODE
says what the workload does with plaintext, and who set it.

Examples:
  underpass workloads
  underpass workloads -o wide
  underpass workloads --check > /dev/null || echo 'a pod is not enrolled'"))]
pub(super) struct WorkloadsArgs {
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    show: ShowArgs,
    /// List at most this many, those of this node first.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_LIMIT as u32, value_parser = clap::value_parser!(u32).range(1..=MAX_LIMIT as i64))]
    limit: u32,
}

pub(super) fn workloads(args: &WorkloadsArgs) -> anyhow::Result<ExitCode> {
    let agent = args.agent.asker()?;
    show(&args.show, || agent.ask(async |a| a.workloads(args.limit as usize).await))
}

impl View for Workloads {
    fn table(&self, style: Style) -> String {
        if self.workloads.is_empty() {
            return "no workloads: the configuration names none".to_owned();
        }
        let mut columns = Columns::new(
            style,
            &["WORKLOAD", "STATE", "NODE", "ADDRESSES", "PROTOCOL", "MODE", "IDENTITY"],
            &["POD", "MODE SET BY", "PORT MODES", "REASON"],
        );
        for w in &self.workloads {
            columns.row([
                w.workload.as_str(),
                state(w),
                &w.node,
                &list(&w.addresses),
                &w.protocol.to_string(),
                &w.mode.to_string(),
                &w.identity,
                &w.pod_id.map_or_else(|| NONE.to_owned(), |id| id.to_string()),
                &w.mode_set_by.to_string(),
                &list(w.port_modes.iter().map(|p| format!("{}: {}", p.port, p.mode))),
                or_none(w.reason.as_deref()),
            ]);
        }
        let mut text = columns.text();
        more(&mut text, self.workloads.len(), self.total, "workloads");
        text
    }

    fn problems(&self) -> Vec<String> {
        let local = self.workloads.iter().filter(|w| w.local && w.state != Some(PodState::Enrolled));
        local
            .map(|w| match &w.reason {
                Some(reason) if w.state == Some(PodState::Kept) => {
                    format!("{} is kept captured and closed: {reason}", w.workload)
                }
                Some(reason) => format!("{} is not enrolled: {reason}", w.workload),
                None => format!("{} is not enrolled yet; see the agent's log if that stays", w.workload),
            })
            .collect()
    }
}

fn state(w: &WorkloadInfo) -> &'static str {
    match w.state {
        Some(state) => pod_state(state),
        None if w.local => "waiting",
        None => NONE,
    }
}

/// For people.
pub(super) fn pod_state(state: PodState) -> &'static str {
    match state {
        PodState::Enrolled => "enrolled",
        PodState::Refused => "refused",
        PodState::Kept => "kept",
    }
}
