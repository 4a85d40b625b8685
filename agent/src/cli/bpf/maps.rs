//! `underpass bpf maps`.

use std::process::ExitCode;

use clap::Args;

use super::{EXIT_CODES_PINS, PinArgs, nothing_pinned, programs::version};
use crate::{
    capture::inspect::{self, Fullest, MapRow, Maps},
    cli::{
        output::{Columns, NONE, Style, View, bytes, or_none, shown},
        show::show,
    },
};

/// A map that is fuller than this, in percent, is a problem.
const FULL: usize = 90;

/// Arguments of `underpass bpf maps`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES_PINS}

ENTRIES is - where they cannot be counted: sockets keep their own state, events are a
queue, and other builds' maps may look different. SIZE is the most entries, or bytes of a
queue. FULLEST POD is the pod with most entries in a map that pods share, by number, with
its entries and how many it may have now. For --check, a map or a pod's share of a map that
is {FULL} % full is a problem.

Examples:
  underpass bpf maps
  underpass bpf maps -o json | jq '.maps[] | {{map, entries, max_entries}}'"))]
pub(super) struct MapsArgs {
    #[command(flatten)]
    pins: PinArgs,
}

pub(super) fn maps(args: &MapsArgs) -> anyhow::Result<ExitCode> {
    show(&args.pins.show, || Ok(inspect::maps(&args.pins.pin_root)?))
}

impl View for Maps {
    fn table(&self, style: Style) -> String {
        if self.maps.is_empty() {
            return nothing_pinned(&shown(&self.pin_root));
        }
        let mut columns = Columns::new(
            style,
            &["MAP", "TYPE", "ENTRIES", "SIZE", "FULLEST POD", "MEMORY", "PROBLEM"],
            &["VERSION", "ID", "KEY BYTES", "VALUE BYTES"],
        );
        let number = |n: Option<u32>| n.map_or_else(|| NONE.to_owned(), |n| n.to_string());
        for m in &self.maps {
            columns.row([
                m.map.as_str(),
                or_none(m.kind.as_deref()),
                &m.entries.map_or_else(|| NONE.to_owned(), |n| n.to_string()),
                &number(m.max_entries.filter(|n| *n > 0)),
                &m.fullest.map_or_else(|| NONE.to_owned(), fullest),
                &m.memory.map_or_else(|| NONE.to_owned(), bytes),
                or_none(m.problem.as_deref()),
                &version(&m.version, m.own),
                &number(m.id),
                &number(m.key_size),
                &number(m.value_size),
            ]);
        }
        columns.text()
    }

    fn problems(&self) -> Vec<String> {
        if self.maps.is_empty() {
            return vec![nothing_pinned(&self.pin_root)];
        }
        let problem = |m: &MapRow| match (&m.problem, m.entries, m.max_entries) {
            (Some(problem), ..) => Some(format!("{}: {problem}; `underpass run` makes it anew", m.map)),
            // An array is always full, or its entries are not what counts.
            (None, Some(n), Some(most))
                if !matches!(m.map.as_str(), "COUNTERS" | "PENDING_FLOWS") && n * 100 >= most as usize * FULL =>
            {
                Some(format!(
                    "{} holds {n} of {most} entries; what does not fit is refused, see `underpass bpf dump {}`",
                    m.map, m.map
                ))
            }
            _ => None,
        };
        let share = |m: &MapRow| {
            let of = m.fullest.filter(|of| of.entries * 100 >= of.limit * FULL as u64)?;
            let what = if m.map == "FLOWS" {
                "its further connect() calls are refused; see `underpass bpf dump PENDING_FLOWS`".to_owned()
            } else {
                format!("rules that do not fit are enforced more strictly; see `underpass bpf dump {}`", m.map)
            };
            Some(format!(
                "pod {} holds {} of the {} entries of {} that it may have; {what}",
                of.pod_id, of.entries, of.limit, m.map
            ))
        };
        self.maps.iter().filter_map(problem).chain(self.maps.iter().filter_map(share)).collect()
    }
}

/// `7: 120 of 512`
fn fullest(of: Fullest) -> String {
    format!("{}: {} of {}", of.pod_id, of.entries, of.limit)
}
