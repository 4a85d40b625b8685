//! One line of a log, text or JSON, in which nothing foreign can forge a field, a line or a terminal's commands.

use std::fmt::{self, Display, Write as _};

use super::{
    labels::shortened,
    logging::{LogFormat, hidden},
};

/// Longest foreign name in a line, in bytes.
pub(super) const MAX_NAME: usize = 256;
/// Longest explanation in a line, in bytes.
pub(super) const MAX_DETAIL: usize = 512;

/// A line being written to the end of a buffer.
pub(super) struct Line<'a> {
    out: &'a mut String,
    format: LogFormat,
}

impl<'a> Line<'a> {
    /// Begins a line as the agent's log does: time, level, target, message. `target` and `message` are our own words.
    pub(super) fn begin(out: &'a mut String, format: LogFormat, level: &str, target: &str, message: &str) -> Self {
        let now = humantime::format_rfc3339_micros(std::time::SystemTime::now());
        // Writing to a string cannot fail, here and below.
        let _ = match format {
            LogFormat::Text => write!(out, "{now} {level:>5} {target}: {message}"),
            LogFormat::Json => {
                write!(out, r#"{{"timestamp":"{now}","level":"{level}","target":"{target}","message":"{message}""#)
            }
        };
        Self { out, format }
    }

    /// A name or anything else that may be foreign: quoted, escaped, and no longer than `most` bytes.
    pub(super) fn text(&mut self, key: &str, value: &str, most: usize) {
        self.key(key);
        self.out.push('"');
        let cut = shortened(value, most);
        self.escape(cut);
        if cut.len() < value.len() {
            self.out.push_str("...");
        }
        self.out.push('"');
    }

    /// Foreign text that is not a string yet.
    pub(super) fn display(&mut self, key: &str, value: &dyn Display, most: usize) {
        /// Takes so many bytes, and no more work after that.
        struct Bounded(String, usize);
        impl fmt::Write for Bounded {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                let fits = shortened(text, self.1.saturating_sub(self.0.len()));
                self.0.push_str(fits);
                if fits.len() < text.len() { Err(fmt::Error) } else { Ok(()) }
            }
        }
        /// Longest character in UTF-8, in bytes.
        const CHARACTER: usize = 4;
        // One character more, so that it shows when something is missing.
        let mut text = Bounded(String::new(), most + CHARACTER);
        let _ = write!(text, "{value}");
        self.text(key, &text.0, most);
    }

    /// Something of our own without a character that needs escaping: an address, an identity, a word.
    pub(super) fn plain(&mut self, key: &str, value: impl Display) {
        self.key(key);
        let _ = match self.format {
            LogFormat::Text => write!(self.out, "{value}"),
            LogFormat::Json => write!(self.out, "\"{value}\""),
        };
    }

    /// A number or a truth value.
    pub(super) fn bare(&mut self, key: &str, value: impl Display) {
        self.key(key);
        let _ = write!(self.out, "{value}");
    }

    /// Ends the line.
    pub(super) fn end(self) {
        self.out.push_str(match self.format {
            LogFormat::Text => "\n",
            LogFormat::Json => "}\n",
        });
    }

    fn key(&mut self, key: &str) {
        let _ = match self.format {
            LogFormat::Text => write!(self.out, " {key}="),
            LogFormat::Json => write!(self.out, ",\"{key}\":"),
        };
    }

    fn escape(&mut self, text: &str) {
        let usual = |b: u8| (b' '..=b'~').contains(&b) && b != b'"' && b != b'\\';
        if text.bytes().all(usual) {
            return self.out.push_str(text);
        }
        for c in text.chars() {
            match c {
                '"' | '\\' => self.out.extend(['\\', c]),
                c if hidden(c) => {
                    // Everything hidden is in the basic plane, which is what JSON's form can say.
                    let _ = match self.format {
                        LogFormat::Text => write!(self.out, "{}", c.escape_default()),
                        LogFormat::Json => write!(self.out, "\\u{:04x}", u32::from(c)),
                    };
                }
                c => self.out.push(c),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTILE: &str = "a\"b\\c\n\u{1b}[2J\u{9b}1m\u{202e}\u{feff}ä";

    fn line(format: LogFormat, write: impl FnOnce(&mut Line<'_>)) -> String {
        let mut out = String::new();
        let mut line = Line::begin(&mut out, format, "INFO", "access", "hello");
        write(&mut line);
        line.end();
        out
    }

    fn both(line: &mut Line<'_>) {
        line.text("name", HOSTILE, MAX_NAME);
        line.display("shown", &HOSTILE, MAX_NAME);
        line.plain("address", "10.0.0.1:80");
        line.bare("bytes", 7);
    }

    #[test]
    fn text_has_one_line_and_nothing_hidden() {
        let text = line(LogFormat::Text, both);
        assert_eq!(text.matches('\n').count(), 1, "{text:?}");
        assert!(!text.trim_end().chars().any(hidden), "{text:?}");
        let rest = r#" INFO access: hello name="a\"b\\c\n\u{1b}[2J\u{9b}1m\u{202e}\u{feff}ä""#;
        assert!(text.contains(rest) && text.ends_with(" address=10.0.0.1:80 bytes=7\n"), "{text}");
    }

    #[test]
    fn json_parses_and_holds_the_original() {
        let text = line(LogFormat::Json, both);
        assert!(!text.trim_end().chars().any(hidden), "{text:?}");
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(value["name"], HOSTILE);
        assert_eq!(value["shown"], HOSTILE);
        assert_eq!(value["bytes"], 7);
        assert_eq!(value["target"], "access");
    }

    proptest::proptest! {
        #[test]
        fn no_text_breaks_a_line(name: String) {
            let json = line(LogFormat::Json, |line| line.text("name", &name, usize::MAX));
            let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
            proptest::prop_assert_eq!(value["name"].as_str(), Some(&*name));
            for format in [LogFormat::Text, LogFormat::Json] {
                let text = line(format, |line| line.display("name", &name, MAX_NAME));
                proptest::prop_assert!(!text.trim_end_matches('\n').chars().any(hidden), "{:?}", text);
            }
        }
    }

    #[test]
    fn long_values_are_cut_between_characters() {
        let long = "ä".repeat(32 * 1024);
        let text = line(LogFormat::Text, |line| {
            line.text("name", &long, MAX_NAME);
            line.display("shown", &long, MAX_NAME);
            line.display("just", &"x".repeat(MAX_NAME), MAX_NAME);
        });
        assert!(text.len() < 4 * MAX_NAME, "{}", text.len());
        let expected = format!("\"{}...\"", "ä".repeat(MAX_NAME / 2));
        assert_eq!(text.matches(&expected).count(), 2, "{text}");
        assert!(text.ends_with("x\"\n"), "what fits is not marked as cut: {text}");
    }
}
