//! Tables of results, for terminals and for documentation.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};

use super::row::Row;

/// Title and names of columns; the costs of a table are all for the same.
struct Group<'a> {
    title: &'static str,
    rows: Vec<&'a Row>,
}

/// Beginnings of cases' names, and what they are called together.
const GROUPS: [(&str, &str); 4] = [
    ("bulk", "One-way transfer"),
    ("rr", "Requests and answers on open connections"),
    ("crr", "New connections: connect, 64 bytes there and back, close"),
    ("idle", "Idle connections"),
];

fn groups(rows: &[Row]) -> Vec<Group<'_>> {
    let group = |(beginning, title): (&str, &'static str)| Group {
        title,
        rows: rows.iter().filter(|row| row.case.starts_with(beginning)).collect(),
    };
    GROUPS.into_iter().map(group).filter(|group| !group.rows.is_empty()).collect()
}

impl Group<'_> {
    /// Whether anything but values is known.
    fn costs(&self) -> bool {
        self.rows.iter().any(|row| row.cpu_per.is_some())
    }

    fn latencies(&self) -> bool {
        self.rows.iter().any(|row| row.p50_us.is_some())
    }

    fn header(&self) -> Vec<String> {
        let mut header = ["case", "system", "median (range)", "of plain"].map(str::to_owned).to_vec();
        if self.costs() {
            let per = self.rows.iter().find_map(|row| row.cpu_per).map_or(String::new(), |per| format!("/{per}"));
            header.extend([format!("CPU s{per}"), "programs".into(), "proxies".into(), format!("switches{per}")]);
        }
        if self.latencies() {
            header.push("p50, p99, p99.9 µs".into());
        }
        header
    }

    fn cells(&self, row: &Row) -> Vec<String> {
        let range =
            if row.rounds > 1 { format!(" ({}–{})", number(row.min), number(row.max)) } else { String::new() };
        let value = format!("{}{range} {}", number(row.value), row.unit);
        let or_none = |value: Option<f64>, write: fn(f64) -> String| value.map_or_else(|| "–".to_owned(), write);
        let ratio = |value: f64| if value < 10.0 { format!("{value:.2}") } else { format!("{value:.1}") };
        let mut cells = vec![row.case.clone(), row.system.clone(), value, or_none(row.ratio_to_plain, ratio)];
        if self.costs() {
            let seconds = [row.cpu_s, row.programs_cpu_s, row.proxies_cpu_s];
            cells.extend(seconds.map(|value| or_none(value, |seconds| format!("{seconds:.2}"))));
            cells.push(or_none(row.context_switches, number));
        }
        if self.latencies() {
            let times = [row.p50_us, row.p99_us, row.p999_us];
            let all: Option<Vec<_>> = times.into_iter().map(|time| time.map(number)).collect();
            cells.push(all.map_or_else(|| "–".to_owned(), |all| all.join(", ")));
        }
        cells
    }
}

/// For a terminal.
pub(super) fn text(rows: &[Row]) -> String {
    groups(rows).iter().fold(String::new(), |mut all, group| {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_header(group.header());
        table.add_rows(group.rows.iter().map(|row| group.cells(row)));
        for column in table.column_iter_mut().skip(3) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        // Nothing can go wrong when writing to a string.
        let _ = writeln!(all, "\n{}\n{}", group.title, table.trim_fmt());
        all
    })
}

/// For documentation.
pub(super) fn markdown(rows: &[Row]) -> String {
    groups(rows).iter().fold(String::new(), |mut all, group| {
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let header = group.header();
        let rule = format!("|---|---|---|{}\n", "---:|".repeat(header.len() - 3));
        let _ = write!(all, "\n{}:\n\n{}{rule}", group.title, line(header));
        group.rows.iter().for_each(|row| all.push_str(&line(group.cells(row))));
        all
    })
}

/// Three digits or more, with thousands apart.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        big if big >= 100.0 => 0,
        middle if middle >= 10.0 => 1,
        _ => 2,
    };
    let text = format!("{value:.digits$}");
    let (whole, fraction) = text.split_once('.').map_or((text.as_str(), None), |(whole, rest)| (whole, Some(rest)));
    let (sign, whole) = whole.strip_prefix('-').map_or(("", whole), |rest| ("-", rest));
    let first = whole.len() % 3;
    let mut parts: Vec<&str> = if first > 0 { vec![&whole[..first]] } else { Vec::new() };
    parts.extend((first..whole.len()).step_by(3).map(|at| &whole[at..at + 3]));
    format!("{sign}{}{}", parts.join(","), fraction.map_or_else(String::new, |fraction| format!(".{fraction}")))
}

#[cfg(test)]
mod tests {
    use super::{super::row::Row, markdown, number, text};

    #[test]
    fn numbers() {
        let all = [
            (0.0, "0.00"),
            (1.234, "1.23"),
            (12.34, "12.3"),
            (999.6, "1,000"),
            (1_234_567.0, "1,234,567"),
            (-1500.0, "-1,500"),
        ];
        for (value, expected) in all {
            assert_eq!(number(value), expected);
        }
    }

    #[test]
    fn tables_of_what_there_is() {
        let mut bulk = Row::single("bulk1", "nginx", 6.2, "Gbit/s", Some(0.55));
        bulk.rounds = 3;
        bulk.min = 6.0;
        bulk.cpu_s = Some(1.5);
        bulk.cpu_per = Some(super::super::case::Per::Gigabyte);
        let idle = Row::single("idle10k", "nginx", 51_234.0, "B/connection", None);
        let rows = [bulk, idle];
        let page = markdown(&rows);
        assert!(
            page.contains(
                "| case | system | median (range) | of plain | CPU s/GB | programs | proxies | switches/GB |\n"
            ),
            "{page}"
        );
        assert!(page.contains("| bulk1 | nginx | 6.20 (6.00–6.20) Gbit/s | 0.55 | 1.50 | – | – | – |\n"), "{page}");
        assert!(page.contains("| idle10k | nginx | 51,234 B/connection | – |\n"), "{page}");
        assert!(text(&rows).contains("One-way transfer"));
    }
}
