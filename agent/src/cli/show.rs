//! Shows something once, or again and again (`--watch`), and says whether it is as it should be (`--check`).

use std::{
    fmt::Write as _,
    io::{self, IsTerminal as _, Write as _},
    process::ExitCode,
    thread,
    time::Duration,
};

use clap::Args;

use super::{
    exit,
    output::{self, Format, OutputArgs, View, shown},
};

/// How to show something.
#[derive(Debug, Clone, Args)]
pub struct ShowArgs {
    #[command(flatten)]
    output: OutputArgs,
    /// Show it again every INTERVAL, until interrupted. Documents follow each other: JSON one per line, YAML separated by `---`.
    #[arg(short, long, value_name = "INTERVAL", num_args = 0..=1, require_equals = true, default_missing_value = "2s", value_parser = interval)]
    watch: Option<Duration>,
    /// Also say on standard error what is wrong, and exit with 4 when something is.
    #[arg(long, conflicts_with = "watch")]
    check: bool,
}

impl ShowArgs {
    /// How to print what cannot be watched.
    pub fn output(&self) -> OutputArgs {
        self.output
    }
}

/// Shows what `fetch` gets.
pub fn show<V: View>(args: &ShowArgs, fetch: impl Fn() -> anyhow::Result<V>) -> anyhow::Result<ExitCode> {
    let value = fetch()?;
    if let Some(every) = args.watch {
        return watch(args.output, every, value, fetch).map(|()| ExitCode::SUCCESS);
    }
    args.output.print(&value)?;
    let problems = if args.check { value.problems() } else { Vec::new() };
    for problem in &problems {
        // Nowhere left to say that standard error is closed; the exit code still tells.
        let _ = writeln!(io::stderr(), "problem: {}", shown(problem));
    }
    Ok(if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(exit::PROBLEMS) })
}

/// Goes on when the agent does not answer, because it may be restarting: whoever watches wants to see it come back.
fn watch<V: View>(
    args: OutputArgs,
    every: Duration,
    first: V,
    fetch: impl Fn() -> anyhow::Result<V>,
) -> anyhow::Result<()> {
    let terminal = io::stdout().is_terminal();
    let mut next = Ok(first);
    loop {
        let text = match &next {
            Ok(value) => Some(args.render(value, !terminal)?),
            Err(error) if terminal => Some(exit::message(error)),
            Err(error) => {
                let _ = io::stderr().write_all(exit::message(error).as_bytes());
                None
            }
        };
        let text = match text {
            Some(text) if terminal => screen(&text),
            Some(text) if matches!(args.output, Format::Table | Format::Wide) => format!("{text}\n"),
            other => other.unwrap_or_default(),
        };
        if !output::write(&text)? {
            return Ok(());
        }
        thread::sleep(every);
        next = fetch();
    }
}

/// `text` over what is on the screen: no more lines than fit, the rest of each line and of the screen cleared.
fn screen(text: &str) -> String {
    let rows = crossterm::terminal::size().map_or(usize::MAX, |(_, rows)| usize::from(rows).max(2));
    frame(text, rows)
}

fn frame(text: &str, rows: usize) -> String {
    let total = text.lines().count();
    // The last row stays free for the cursor, and the one above it for saying that there is more.
    let fit = if total < rows { total } else { rows.saturating_sub(2) };
    let mut out = "\x1b[H".to_owned();
    for line in text.lines().take(fit) {
        out.extend([line, "\x1b[K\r\n"]);
    }
    if fit < total {
        let _ = write!(out, "({} more lines)\x1b[K\r\n", total - fit);
    }
    out.push_str("\x1b[J");
    out
}

/// From a tenth of a second to an hour.
pub fn interval(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text).map_err(|e| format!("{e}; write a number and a unit, like 2s"))?;
    if duration < Duration::from_millis(100) || duration > Duration::from_hours(1) {
        return Err("must be at least 100ms and at most 1h".to_owned());
    }
    Ok(duration)
}

#[cfg(test)]
mod tests {
    use super::frame;

    #[test]
    fn a_frame_fits_the_screen_and_clears_what_was_there() {
        assert_eq!(frame("a\nb\n", 24), "\x1b[Ha\x1b[K\r\nb\x1b[K\r\n\x1b[J");
        let long = (0..100).map(|n| format!("{n}\n")).collect::<Vec<_>>().concat();
        let cut = frame(&long, 10);
        assert_eq!(cut.matches("\r\n").count(), 9, "{cut:?}");
        assert!(cut.contains("7\x1b[K\r\n(92 more lines)"), "{cut:?}");
        assert_eq!(frame("", 2), "\x1b[H\x1b[J");
    }
}
