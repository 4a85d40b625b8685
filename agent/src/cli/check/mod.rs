//! `underpass check`: what this host offers, by trying it.
//!
//! Nothing is left behind: probe programs, sockets, the probe cgroup and the probe namespace go away with their
//! descriptors or guards.

mod bpf;
mod flaws;
mod host;
mod ktls;
mod limits;
mod row;

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;
use serde::Serialize;

pub use row::{Row, State};

use super::{
    DEFAULT_PIN_ROOT,
    output::{Columns, OutputArgs, Style, View, or_none},
};

/// Arguments of `underpass check`.
#[derive(Debug, Args)]
#[command(after_help = "Exit codes: 0 the agent can run, 1 it cannot, 2 wrong usage.

`degraded` means that something slower is used instead; never something weaker.

Examples:
  underpass check
  underpass check -o json | jq '.checks[] | select(.state != \"ok\")'")]
pub struct CheckArgs {
    #[command(flatten)]
    output: OutputArgs,
    /// cgroup v2 directory that the agent will be given.
    #[arg(long, value_name = "PATH", env = "UNDERPASS_CGROUP")]
    cgroup: Option<PathBuf>,
    /// Directory on bpffs that the agent will be given.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_PIN_ROOT)]
    pin_root: PathBuf,
}

/// The result; a public interface.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Whether the agent can run: nothing required is missing.
    pub can_run: bool,
    /// One row per thing that was looked at, always the same ones in the same order.
    pub checks: Vec<Row>,
}

pub(super) fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let report = report(args.cgroup.as_deref(), &args.pin_root);
    args.output.print(&report)?;
    Ok(if report.can_run { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Looks at everything, for an agent that is given these directories.
pub(super) fn report(cgroup: Option<&Path>, pin_root: &Path) -> Report {
    let mut checks = vec![host::kernel(), host::cgroup(), host::attach_point(cgroup)];
    checks.extend([host::btf(), host::bpffs(pin_root), host::kept_pods(pin_root)]);
    checks.extend(bpf::hooks());
    checks.extend(bpf::maps());
    checks.extend(bpf::helpers());
    checks.extend(bpf::tc());
    checks.push(host::node_guard());
    checks.extend(ktls::rows());
    checks.extend(flaws::rows());
    checks.extend([host::lsm(), host::ipv6(), host::fwmark_accept()]);
    checks.extend([limits::memlock(), limits::capabilities(), limits::open_files()]);
    Report { can_run: checks.iter().all(|r| !r.required || r.state != State::Missing), checks }
}

impl View for Report {
    fn table(&self, style: Style) -> String {
        let headings = ["CHECK", "STATE", "REQUIRED", "FOUND", "INSTEAD / WHAT TO DO"];
        let mut columns = Columns::new(style, &headings, &[]);
        for r in &self.checks {
            let advice = or_none(r.instead.as_deref().or(r.remedy.as_deref()));
            columns.row([r.name, r.state.as_str(), if r.required { "yes" } else { "no" }, &r.detail, advice]);
        }
        let mut text = columns.text();
        text.push('\n');
        if self.can_run {
            text.push_str("The agent can run on this host.\n");
        } else {
            let missing = self.checks.iter().filter(|r| r.required && r.state == State::Missing).map(|r| r.name);
            let missing: Vec<_> = missing.collect();
            let _ = writeln!(text, "The agent cannot run on this host: {}.", missing.join(", "));
        }
        text
    }
}
