//! Tables for people, JSON and YAML for scripts.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use anyhow::Context as _;
use comfy_table::{Cell, ContentArrangement, Table, presets};
use serde::Serialize;

use crate::telemetry::logging::printable;

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// Columns for people; not meant to be parsed.
    #[default]
    Table,
    /// One JSON document.
    Json,
    /// One YAML document.
    Yaml,
}

/// Prints `value` as JSON or YAML, or as the text that `table` makes.
pub fn print<T: Serialize>(format: Format, value: &T, table: impl FnOnce() -> String) -> anyhow::Result<()> {
    let mut text = match format {
        Format::Table => table(),
        Format::Json => serde_json::to_string_pretty(value).context("writing JSON")?,
        Format::Yaml => serde_saphyr::to_string(value).context("writing YAML")?,
    };
    if !text.ends_with('\n') {
        text.push('\n');
    }
    match io::stdout().lock().write_all(text.as_bytes()) {
        // The reader had enough, e.g. `| head`.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("writing to standard output"),
    }
}

/// A table without lines; fits the terminal when there is one.
pub struct Columns(Table);

impl Columns {
    /// With these headings.
    pub fn new(headings: &[&str]) -> Self {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic).set_header(headings);
        Self(table)
    }

    /// Adds a row. Every cell passes through here: names come from other people's pods and may hold escape sequences.
    pub fn row<S: AsRef<str>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.0.add_row(cells.into_iter().map(|c| Cell::new(printable(c.as_ref()))));
    }

    /// The text, without the padding at line ends.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for line in self.0.lines() {
            out.push_str(line.strip_prefix(' ').unwrap_or(&line).trim_end());
            out.push('\n');
        }
        out
    }
}

/// What is shown for what is not there.
pub const NONE: &str = "-";

/// Bytes with a binary unit.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let thousands = n.ilog2() / 10;
    #[allow(clippy::cast_precision_loss)] // shown with one decimal
    let scaled = n as f64 / (1_u64 << (10 * thousands)) as f64;
    format!("{scaled:.1} {}", UNITS[thousands as usize - 1])
}

/// Seconds as the two largest units, e.g. `3h 12m`.
pub fn age(seconds: f64) -> String {
    let whole = Duration::try_from_secs_f64(seconds.max(0.0).trunc()).unwrap_or_default();
    let text = humantime::format_duration(whole).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}
