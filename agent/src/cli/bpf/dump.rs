//! `underpass bpf dump`.

use std::{fmt::Write as _, process::ExitCode};

use clap::Args;

use super::{EXIT_CODES_PINS, PinArgs};
use crate::{
    capture::inspect::{self, Dump, Entry, Field},
    cli::{
        output::{Columns, Style, View, more, shown},
        show::show,
    },
};

/// Arguments of `underpass bpf dump`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES_PINS}

Entries are listed in the order of their keys. The map may be in use: each entry is whole,
one that comes or goes meanwhile may be there or not. Pods have names where their addresses
are in the last good configuration.

Examples:
  underpass bpf dump PODS
  underpass bpf dump MESH --limit 20
  underpass bpf dump PORT_RULES -o json | jq '.entries[] | select(.key.pod_id == 3)'"))]
pub(super) struct DumpArgs {
    #[command(flatten)]
    pins: PinArgs,
    /// Which map, see `underpass bpf maps`.
    #[arg(value_name = "MAP")]
    map: String,
    /// List at most this many entries.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    limit: u32,
}

pub(super) fn dump(args: &DumpArgs) -> anyhow::Result<ExitCode> {
    let pins = &args.pins;
    // People write the name as it is listed, or in lower case.
    let map = args.map.to_ascii_uppercase();
    show(&pins.show, || Ok(inspect::dump(&pins.pin_root, &map, args.limit as usize, &pins.names())?))
}

impl View for Dump {
    fn table(&self, style: Style) -> String {
        let Some(first) = self.entries.first() else { return format!("{} is empty", shown(&self.map)) };
        let heading = |(name, _): &(&str, Field)| name.replace('_', " ").to_uppercase();
        let headings: Vec<String> = first.key.0.iter().chain(&first.value.0).map(heading).collect();
        let mut columns = Columns::new(style, &headings.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
        for Entry { key, value } in &self.entries {
            columns.row(key.0.iter().chain(&value.0).map(|(_, field)| field.text()));
        }
        let mut text = columns.text();
        more(&mut text, self.entries.len(), self.total, "entries");
        if self.incomplete {
            let _ = writeln!(text, "the map changes faster than it can be read: some entries may be missing");
        }
        text
    }
}
