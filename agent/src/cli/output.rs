//! Tables for people, JSON and YAML for scripts.
//!
//! Names come from other people's pods and may hold escape sequences or be very long. They are made safe for terminals here and nowhere
//! else: [`Columns`] for cells, [`shown`] for other text, [`Format`] for documents, which keep every name whole.

use std::{
    borrow::Cow,
    fmt::Write as _,
    io::{self, Write as _},
    time::Duration,
};

use anyhow::Context as _;
use comfy_table::{Cell, ContentArrangement, Table, presets};
use serde::Serialize;

use crate::telemetry::logging::{hidden, printable};

/// Longest text of a cell, in characters. More than any name that Kubernetes or SPIFFE allows for one part of it.
const LONGEST: usize = 512;

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// Columns for people; not meant to be parsed.
    #[default]
    Table,
    /// More columns.
    Wide,
    /// One JSON document.
    Json,
    /// One YAML document.
    Yaml,
}

/// How a table looks.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// With all columns.
    pub wide: bool,
    /// With a line of headings.
    pub headings: bool,
}

#[cfg(test)]
impl Style {
    /// What `-o table` prints.
    pub const TABLE: Self = Self { wide: false, headings: true };
    /// What `-o wide` prints.
    pub const WIDE: Self = Self { wide: true, headings: true };
}

/// Something that can be printed in every format.
pub trait View: Serialize {
    /// For people.
    fn table(&self, style: Style) -> String;

    /// What is wrong, each in one line, with what to do; see `--check`.
    fn problems(&self) -> Vec<String> {
        Vec::new()
    }
}

/// How to print.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct OutputArgs {
    /// How to print.
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value_t)]
    pub output: Format,
    /// Print tables without the line of headings.
    #[arg(long)]
    pub no_headers: bool,
}

impl OutputArgs {
    /// The text of `value`, which ends with a newline. JSON documents of a series take one line each.
    pub fn render<V: View>(self, value: &V, series: bool) -> anyhow::Result<String> {
        let mut text = match self.output {
            Format::Table | Format::Wide => {
                value.table(Style { wide: self.output == Format::Wide, headings: !self.no_headers })
            }
            Format::Json if series => inert(serde_json::to_string(value).context("writing JSON")?),
            Format::Json => json(value)?,
            Format::Yaml => {
                let document = yaml(value)?;
                if series { format!("---\n{document}") } else { document }
            }
        };
        if !text.ends_with('\n') {
            text.push('\n');
        }
        Ok(text)
    }

    /// Prints `value`.
    pub fn print<V: View>(self, value: &V) -> anyhow::Result<()> {
        write(&self.render(value, false)?).map(drop)
    }
}

/// A value as a JSON document that is safe to show.
pub fn json(value: &impl Serialize) -> anyhow::Result<String> {
    let mut text = inert(serde_json::to_string_pretty(value).context("writing JSON")?);
    text.push('\n');
    Ok(text)
}

/// A value as a YAML document that is safe to show.
pub fn yaml(value: &impl Serialize) -> anyhow::Result<String> {
    let text = serde_saphyr::to_string(value).context("writing YAML")?;
    // In YAML it depends on where a character is whether it can be escaped. JSON is YAML, too.
    if text.chars().any(dangerous) { json(value) } else { Ok(text) }
}

/// JSON without characters that a terminal would act on. They only occur in strings: serde escapes those below U+0020 itself, and
/// none of them is beyond U+FFFF.
fn inert(json: String) -> String {
    if !json.chars().any(dangerous) {
        return json;
    }
    let mut out = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if dangerous(c) {
            let _ = write!(out, "\\u{:04x}", u32::from(c));
        } else {
            out.push(c);
        }
    }
    out
}

fn dangerous(c: char) -> bool {
    hidden(c) && c != '\n'
}

/// Writes to standard output. `false` when nobody reads any more, e.g. behind `| head`.
pub fn write(text: &str) -> anyhow::Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(e).context("writing to standard output"),
    }
}

/// Foreign text in one line, safe to show and cut where it is very long.
pub fn shown(text: &str) -> Cow<'_, str> {
    if text.len() <= LONGEST && !text.chars().any(hidden) {
        return Cow::Borrowed(text);
    }
    // Before escaping, so that the work is bounded, and again behind it, because escapes are longer.
    let beginning: String = text.chars().take(LONGEST + 1).collect();
    let escaped = printable(&beginning);
    let mut out: String = escaped.chars().take(LONGEST - 1).collect();
    match escaped.chars().nth(LONGEST - 1) {
        Some(last) if escaped.chars().nth(LONGEST).is_none() => out.push(last),
        Some(_) => out.push('…'),
        None => {}
    }
    Cow::Owned(out)
}

/// `name   value` lines, aligned.
#[derive(Debug, Default)]
pub struct Lines(String);

impl Lines {
    /// Adds a line.
    pub fn line(&mut self, name: &str, value: &str) {
        let _ = writeln!(self.0, "{name:<14} {}", shown(value));
    }

    /// The text.
    pub fn text(self) -> String {
        self.0
    }
}

/// A table without lines; fits the terminal when there is one.
pub struct Columns {
    table: Table,
    /// Cells of a row that are shown.
    width: usize,
}

impl Columns {
    /// With these headings, and further ones that are only there when the table is wide.
    pub fn new(style: Style, headings: &[&str], wide: &[&str]) -> Self {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
        let all: Vec<_> = headings.iter().chain(if style.wide { wide } else { &[] }).collect();
        let width = all.len();
        if style.headings {
            table.set_header(all);
        }
        Self { table, width }
    }

    /// Adds a row, with the cells of a wide table.
    pub fn row<S: AsRef<str>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.table.add_row(cells.into_iter().take(self.width).map(|c| Cell::new(shown(c.as_ref()))));
    }

    /// The text, without the padding at line ends.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for line in self.table.lines() {
            out.push_str(line.strip_prefix(' ').unwrap_or(&line).trim_end());
            out.push('\n');
        }
        out
    }
}

/// What is shown for what is not there.
pub const NONE: &str = "-";

/// `text`, or what is shown for nothing.
pub fn or_none(text: Option<&str>) -> &str {
    text.unwrap_or(NONE)
}

/// Values in one cell.
pub fn list<T: ToString>(values: impl IntoIterator<Item = T>) -> String {
    let all: Vec<_> = values.into_iter().map(|v| v.to_string()).collect();
    if all.is_empty() { NONE.to_owned() } else { all.join(", ") }
}

/// `yes`, or what is shown for nothing.
pub fn yes(yes: bool) -> &'static str {
    if yes { "yes" } else { NONE }
}

/// A line below a table that does not show everything.
pub fn more(text: &mut String, shown: usize, total: usize, what: &str) {
    if total > shown {
        let _ = writeln!(text, "{shown} of {total} {what}; use --limit for more");
    }
}

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
