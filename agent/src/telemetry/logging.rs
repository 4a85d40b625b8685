//! Sets up `tracing`: text or JSON on standard error, filter from `--log` or `RUST_LOG`.
//!
//! Lines are written by a thread of their own behind a bounded queue, so a slow or blocked standard error never holds
//! up a connection; lines that do not fit are dropped and counted.

use std::{
    borrow::Cow,
    io::{self, Write},
    sync::OnceLock,
};

use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    EnvFilter, Layer as _, Registry, fmt::MakeWriter, layer::SubscriberExt as _, reload, util::SubscriberInitExt as _,
};

/// Lines that may wait for the writer.
pub(super) const QUEUED_LINES: usize = 16_384;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// One line of text per event.
    #[default]
    Text,
    /// One JSON object per event.
    Json,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter does not parse.
    #[error("log filter {filter:?}: {reason}; write a level (info) or targets (info,underpass::tunnel=debug)")]
    Filter {
        /// The filter.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// `init` was called before in this process.
    #[error("logging is already set up: {0}")]
    Twice(String),
}

/// Keeps the writer running; dropping it writes what is queued.
#[must_use = "dropping it stops logging"]
pub struct LogGuard {
    _writer: WorkerGuard,
}

/// The one log of the process.
static LOG: OnceLock<Log> = OnceLock::new();

struct Log {
    dropped: ErrorCounter,
    filter: reload::Handle<EnvFilter, Registry>,
    /// The filter at the start.
    initial: String,
}

/// Log lines dropped because the queue was full.
pub fn dropped_lines() -> u64 {
    LOG.get().map_or(0, |log| log.dropped.dropped_lines() as u64)
}

/// Starts logging to standard error.
pub fn init(filter: &str, format: LogFormat) -> Result<LogGuard, LogError> {
    let (reloadable, handle) = reload::Layer::new(parse(filter)?);
    let (writer, guard) = queue(io::stderr(), "log");
    let dropped = writer.error_counter();
    tracing_subscriber::registry()
        .with(layer(format, writer).with_filter(reloadable))
        .try_init()
        .map_err(|e| LogError::Twice(e.to_string()))?;
    LOG.get_or_init(|| Log { dropped, filter: handle, initial: filter.to_owned() });
    Ok(LogGuard { _writer: guard })
}

/// The filter in force; empty when nothing is logged by this process.
pub fn filter() -> String {
    LOG.get().and_then(|log| log.filter.with_current(ToString::to_string).ok()).unwrap_or_default()
}

/// Replaces the filter; `None` puts back the one from the start.
pub fn set_filter(filter: Option<&str>) -> Result<(), LogError> {
    let Some(log) = LOG.get() else { return Ok(()) };
    let filter = parse(filter.unwrap_or(&log.initial))?;
    // Fails only when the subscriber is gone, and it lives as long as the process.
    log.filter.reload(filter).map_err(|e| LogError::Twice(e.to_string()))
}

fn parse(filter: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::try_new(filter).map_err(|e| LogError::Filter { filter: filter.to_owned(), reason: e.to_string() })
}

/// A writer of lines with a thread of its own.
pub(super) fn queue(to: impl Write + Send + 'static, thread: &str) -> (NonBlocking, WorkerGuard) {
    NonBlockingBuilder::default().buffered_lines_limit(QUEUED_LINES).lossy(true).thread_name(thread).finish(to)
}

fn layer<S>(format: LogFormat, writer: NonBlocking) -> Box<dyn tracing_subscriber::Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    match format {
        // Colours would have to be told apart from escape sequences in foreign text; there are none.
        LogFormat::Text => tracing_subscriber::fmt::layer().with_ansi(false).with_writer(Escaped(writer)).boxed(),
        // JSON escapes control characters itself.
        LogFormat::Json => tracing_subscriber::fmt::layer().json().with_writer(writer).boxed(),
    }
}

/// `text` with everything escaped that could move the cursor, forge a line or hide characters: control characters,
/// line separators, zero-width and bidirectional marks. The one place where foreign text is made safe to show.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.chars().any(hidden) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if hidden(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    Cow::Owned(out)
}

/// Is this one of the characters that [`printable`] escapes: could it move the cursor, forge a line or hide others?
pub fn hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{061c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// Makes each line printable on its way to the queue.
struct Escaped(NonBlocking);

impl<'a> MakeWriter<'a> for Escaped {
    type Writer = EscapedLine;

    fn make_writer(&'a self) -> EscapedLine {
        EscapedLine(self.0.clone())
    }
}

struct EscapedLine(NonBlocking);

impl Write for EscapedLine {
    /// `tracing-subscriber` writes an event with one call, its newline last.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        let (body, end) = text.strip_suffix('\n').map_or((&*text, ""), |body| (body, "\n"));
        match printable(body) {
            Cow::Borrowed(_) => self.0.write_all(line)?,
            Cow::Owned(body) => self.0.write_all(format!("{body}{end}").as_bytes())?,
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(format: LogFormat, log: impl FnOnce()) -> String {
        let sink = Sink::default();
        let (writer, guard) = queue(sink.clone(), "test");
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer(format, writer)), log);
        drop(guard);
        String::from_utf8(sink.0.lock().unwrap().clone()).unwrap()
    }

    const HOSTILE: &str = "web\x1b[2J\nINFO forged\u{202e}\u{9b}31m";

    #[test]
    fn text_lines_cannot_be_forged() {
        let out = logged(LogFormat::Text, || tracing::info!(name = HOSTILE, display = %HOSTILE, "hello {HOSTILE}"));
        assert_eq!(out.matches('\n').count(), 1, "{out:?}");
        assert!(out.ends_with('\n') && out.contains("hello web"), "{out:?}");
        assert!(!out.trim_end().chars().any(hidden), "{out:?}");
    }

    #[test]
    fn json_lines_parse_and_hold_the_original() {
        let out = logged(LogFormat::Json, || tracing::info!(name = HOSTILE, "hello"));
        assert_eq!(out.matches('\n').count(), 1, "{out:?}");
        let value: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(value["fields"]["name"], HOSTILE);
    }

    #[test]
    fn plain_text_is_not_copied() {
        assert!(matches!(printable("spiffe://cluster.local/ns/ä/sa/ß"), Cow::Borrowed(_)));
        assert_eq!(printable("a\tb\u{1b}"), "a\\tb\\u{1b}");
    }

    /// A standard error that takes nothing: events return at once, and what does not fit is counted.
    #[test]
    fn a_blocked_writer_drops_lines_and_counts_them() {
        struct Blocked(std::sync::mpsc::Receiver<()>);
        impl Write for Blocked {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                let _ = self.0.recv(); // until the sender is dropped
                Ok(bytes.len())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }

        let (release, blocked) = std::sync::mpsc::channel();
        let (writer, guard) = queue(Blocked(blocked), "test");
        let dropped = writer.error_counter();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer(LogFormat::Text, writer)), || {
            (0..QUEUED_LINES + 100).for_each(|n| tracing::info!(n, "line"));
        });
        // The writer thread may have taken one line out of the queue.
        assert!((99..=100).contains(&dropped.dropped_lines()), "{}", dropped.dropped_lines());
        drop(release);
        drop(guard);
    }

    #[test]
    fn a_bad_filter_is_quoted() {
        let message = init("info,=,x=loud", LogFormat::Text).err().unwrap().to_string();
        assert!(message.contains("\"info,=,x=loud\"") && message.contains("write a level"), "{message}");
    }
}
