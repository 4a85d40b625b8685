//! `underpass bpf programs`.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::{EXIT_CODES_PINS, PinArgs, nothing_pinned};
use crate::{
    capture::inspect::{self, Attached, ProgramRow},
    cli::{
        output::{Columns, NONE, Style, View, or_none, shown},
        show::show,
    },
};

/// Arguments of `underpass bpf programs`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES_PINS}

Where the kernel has no tcx (before Linux 6.6), the pods' programs are filters that have
no pins: `tc filter show dev eth0 ingress` (and egress) in the pod shows them. RUNS and
TIME are counted while the sysctl kernel.bpf_stats_enabled is 1.

Examples:
  underpass bpf programs
  underpass bpf programs --check
  underpass bpf programs -o json | jq '.programs[] | {{hook, program, problem}}'"))]
pub(super) struct ProgramsArgs {
    #[command(flatten)]
    pins: PinArgs,
}

/// Programs with the names of pods.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct Programs {
    pub(in crate::cli) pin_root: String,
    pub(in crate::cli) programs: Vec<Program>,
}

#[derive(Debug, Serialize)]
pub(in crate::cli) struct Program {
    /// `namespace/name`, when it is a pod's and the name is known.
    pub(in crate::cli) workload: Option<String>,
    #[serde(flatten)]
    pub(in crate::cli) row: ProgramRow,
}

pub(super) fn programs(args: &ProgramsArgs) -> anyhow::Result<ExitCode> {
    show(&args.pins.show, || Programs::read(&args.pins))
}

impl Programs {
    pub(in crate::cli) fn read(pins: &PinArgs) -> anyhow::Result<Self> {
        let names = pins.names();
        let all = inspect::programs(&pins.pin_root)?;
        let named = |row: ProgramRow| Program {
            workload: row.pod_id.filter(|_| row.own).and_then(|id| names.pod(id)).map(str::to_owned),
            row,
        };
        Ok(Self { pin_root: all.pin_root, programs: all.programs.into_iter().map(named).collect() })
    }
}

impl View for Programs {
    fn table(&self, style: Style) -> String {
        if self.programs.is_empty() {
            return nothing_pinned(&shown(&self.pin_root));
        }
        let mut columns = Columns::new(
            style,
            &["HOOK", "PROGRAM", "ATTACHED TO", "POD", "WORKLOAD", "PROBLEM"],
            &["VERSION", "LINK", "ID", "TAG", "LOADED", "RUNS", "TIME"],
        );
        let number = |n: Option<u64>| n.map_or_else(|| NONE.to_owned(), |n| n.to_string());
        for Program { workload, row: p } in &self.programs {
            columns.row([
                p.hook.as_str(),
                or_none(p.program.as_deref()),
                &attached(p.attached),
                &number(p.pod_id.map(Into::into)),
                or_none(workload.as_deref()),
                or_none(p.problem.as_deref()),
                &version(&p.version, p.own),
                &number(p.link_id.map(Into::into)),
                &number(p.program_id.map(Into::into)),
                or_none(p.tag.as_deref()),
                or_none(p.loaded_at.as_deref()),
                &number(p.runs),
                &p.run_time_ns.map_or_else(|| NONE.to_owned(), |ns| format!("{} ms", ns / 1_000_000)),
            ]);
        }
        columns.text()
    }

    fn problems(&self) -> Vec<String> {
        if self.programs.is_empty() {
            return vec![nothing_pinned(&self.pin_root)];
        }
        let problem = |p: &Program| {
            let pod = p.workload.as_ref().map_or_else(String::new, |w| format!(" of {w}"));
            Some(format!("{}{pod}: {}; `underpass run` attaches it again", p.row.hook, p.row.problem.as_ref()?))
        };
        self.programs.iter().filter_map(problem).collect()
    }
}

/// The version, or that it is this program's.
pub(super) fn version(version: &str, own: bool) -> String {
    if own { version.to_owned() } else { format!("{version} (another build's)") }
}

fn attached(to: Attached) -> String {
    match to {
        Attached::Cgroup(id) => format!("cgroup {id}"),
        Attached::Interface(index) => format!("interface {index}"),
        Attached::Gone => "gone".to_owned(),
        Attached::Unknown => NONE.to_owned(),
    }
}
