//! Progress for people (a spinner with elapsed time) and for logs (plain lines). All of it on standard error.

use std::time::{Duration, Instant};

use anyhow::Result;
use console::style;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Where progress is shown.
pub(crate) struct Ui {
    spinner: bool,
}

/// A step in progress.
pub(crate) struct Step {
    bar: ProgressBar,
}

impl Ui {
    /// A spinner when a person watches: standard error is a terminal and `CI` is not set.
    pub(crate) fn new() -> Self {
        Self { spinner: console::user_attended_stderr() && std::env::var_os("CI").is_none() }
    }

    /// Whether nobody watches, and what is said is kept.
    pub(crate) fn is_log(&self) -> bool {
        !self.spinner
    }

    /// Runs a step that may take long, with its name and the time that it takes.
    pub(crate) fn step<T>(&self, what: &str, work: impl FnOnce(&Step) -> Result<T>) -> Result<T> {
        let target = if self.spinner { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(None, target);
        let template = "{spinner:.cyan} {prefix} {elapsed:.dim} {wide_msg:.dim}";
        bar.set_style(ProgressStyle::with_template(template).expect("a valid template"));
        bar.set_prefix(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        if !self.spinner {
            eprintln!("==> {what}");
        }
        let start = Instant::now();
        let result = work(&Step { bar: bar.clone() });
        bar.finish_and_clear();
        let (mark, seconds) =
            (result.as_ref().map_or(style("✗").red(), |_| style("✓").green()), start.elapsed().as_secs_f64());
        if self.spinner {
            eprintln!("{} {what} {}", mark.for_stderr(), style(format!("{seconds:.1} s")).dim().for_stderr());
        } else {
            eprintln!("    {} after {seconds:.1} s", if result.is_ok() { "done" } else { "failed" });
        }
        result
    }

    /// A line of information.
    #[expect(clippy::unused_self, reason = "all output goes through one value")]
    pub(crate) fn say(&self, line: &str) {
        eprintln!("{line}");
    }

    /// Why the command failed.
    #[expect(clippy::unused_self, reason = "all output goes through one value")]
    pub(crate) fn failure(&self, error: &anyhow::Error) {
        eprintln!("{} {error:#}", style("error:").red().bold().for_stderr());
    }
}

impl Step {
    /// How far it is, shown to people as a bar; logs get a line for every tenth of the way.
    pub(crate) fn progress(&self, done: usize, of: usize, what: &str) {
        if self.bar.is_hidden() {
            if (done * 10 / of.max(1)) > (done.saturating_sub(1) * 10 / of.max(1)) {
                eprintln!("    {done} of {of}: {what}");
            }
            return;
        }
        if self.bar.length() != Some(of as u64) {
            let template = "{spinner:.cyan} {prefix} {elapsed:.dim} [{bar:30.cyan/dim}] {pos}/{len} {wide_msg:.dim}";
            self.bar.set_style(ProgressStyle::with_template(template).expect("a valid template").progress_chars("━╸─"));
            self.bar.set_length(of as u64);
        }
        self.bar.set_position(done as u64);
        self.now(what);
    }

    /// A line of information that stays.
    pub(crate) fn note(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    /// What the step is doing at the moment; shown to people only.
    pub(crate) fn now(&self, what: impl Into<String>) {
        self.bar.set_message(what.into());
    }
}
