//! From text to the schema: limits, and errors that say where, which field, what was found and what to write.

use std::{cell::RefCell, fmt::Write as _};

use serde::Deserialize;
use serde_saphyr::{DuplicateKeyPolicy, Error, Location, MessageFormatter as _, Options, UserMessageFormatter};

use super::{ConfigError, MAX_DOCUMENT, schema::Document};
use crate::telemetry::logging::printable;

/// Longest piece of foreign text in a message, in characters.
const QUOTED: usize = 80;

/// Parses `text`; `file` is what positions are prefixed with.
pub(super) fn document(file: &str, text: &str) -> Result<Document, ConfigError> {
    if text.len() > MAX_DOCUMENT {
        return Err(ConfigError(format!(
            "{file}: the document has {} bytes, at most {MAX_DOCUMENT} are read; describe fewer workloads per node",
            text.len()
        )));
    }
    parsed(file, text)
}

/// Parses any part of a document.
pub(super) fn parsed<T: for<'de> Deserialize<'de>>(file: &str, text: &str) -> Result<T, ConfigError> {
    let path = RefCell::new(String::new());
    serde_saphyr::with_deserializer_from_str_with_options(text, options(), |de| {
        let mut track = serde_path_to_error::Track::new();
        T::deserialize(serde_path_to_error::Deserializer::new(de, &mut track)).inspect_err(|_| {
            // `value` is the node `Spanned` puts around each value; no field of the schema has that name.
            *path.borrow_mut() = field_path(&track.path());
        })
    })
    .map_err(|e| describe(file, text, &path.borrow(), &e))
}

/// YAML 1.2 booleans only, no duplicate keys, and limits that stop alias and nesting bombs early. A node with ten
/// thousand workloads needs about half a million nodes.
fn options() -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: 4_000_000,
            max_nodes: 2_000_000,
            max_depth: 24,
            flow_nesting_limit: 24,
            max_documents: 2, // a second one is refused with a message of its own
            max_aliases: 10_000,
            max_anchors: 1_000,
            max_recorded_anchor_events: 100_000,
            max_recorded_anchor_bytes: 4 * 1024 * 1024,
            max_total_scalar_bytes: MAX_DOCUMENT,
            max_merge_keys: 10_000,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 200_000,
            max_replay_stack_depth: 8,
        },
        duplicate_keys: DuplicateKeyPolicy::Error,
        strict_booleans: true,
        with_snippet: false,
    }
}

fn field_path(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let mut text = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => {
                let _ = write!(text, "[{index}]");
            }
            Segment::Map { key } if key != "value" => {
                if !text.is_empty() {
                    text.push('.');
                }
                text.push_str(&shorten(key));
            }
            _ => {}
        }
    }
    text
}

fn describe(file: &str, text: &str, path: &str, error: &Error) -> ConfigError {
    let error = error.without_snippet();
    let at = error.location().unwrap_or(Location::UNKNOWN);
    let inner = match error {
        Error::AliasError { error, .. } => error,
        other => other,
    };
    let problem = match inner {
        Error::SerdeUnknownField { field, expected, .. } => {
            format!("unknown field {}; {}", quoted(field), candidates("known here", expected))
        }
        Error::SerdeMissingField { field, .. } => format!("field {field:?} is missing; add it"),
        Error::SerdeUnknownVariant { variant, expected, .. } => {
            format!("{} is not accepted; {}", quoted(variant), candidates("write", expected))
        }
        Error::InvalidScalar { ty: "u16", .. } => {
            format!("{} is no port; write a whole number from 1 to 65535", found(text, at))
        }
        Error::InvalidBooleanStrict { .. } => {
            format!("{} is no boolean; write true or false", found(text, at))
        }
        Error::Unexpected { expected, .. } => {
            format!("{} is expected here; see docs/configuration.md", shape(expected))
        }
        Error::NullIntoString { .. } => {
            "the value is missing; write one after the colon, or remove the field".to_owned()
        }
        Error::Eof { .. } => "the document is empty or ends too early; see docs/configuration.md".to_owned(),
        Error::SerdeInvalidType { unexpected, expected, .. } => {
            format!("found {}, expected {}", shorten(unexpected), shorten(expected))
        }
        Error::DuplicateMappingKey { key: Some(key), .. } => {
            format!("field {} is given twice; remove one", quoted(key))
        }
        Error::MultipleDocuments { .. } => "a second YAML document follows; keep one document per file".to_owned(),
        Error::Budget { breach, .. } => {
            format!(
                "the document exceeds a limit that protects the agent ({}); simplify it",
                shorten(&format!("{breach:?}"))
            )
        }
        other => shorten(&UserMessageFormatter.format_message(other)),
    };
    positioned(file, at, path, &problem)
}

/// Puts a message together: `file:line:column: field: problem`.
pub(super) fn positioned(file: &str, at: Location, field: &str, problem: &str) -> ConfigError {
    let position = if at == Location::UNKNOWN { String::new() } else { format!(":{}:{}", at.line(), at.column()) };
    let field = if field.is_empty() { String::new() } else { format!("{field}: ") };
    ConfigError(format!("{file}{position}: {field}{problem}"))
}

/// The parser's words for what it wanted, in the reader's.
fn shape(expected: &str) -> &str {
    match expected {
        "string scalar" | "scalar" => "a single value",
        "sequence start" => "a list, like [a, b],",
        "mapping start" => "a mapping of fields, like {name: value},",
        other => other,
    }
}

fn candidates(what: &str, names: &[&str]) -> String {
    match names {
        [] => "no field is known here".to_owned(),
        names => format!("{what}: {}", names.join(", ")),
    }
}

/// The text at a position, to the end of the scalar as far as that can be told.
fn found(text: &str, at: Location) -> String {
    let line = usize::try_from(at.line()).ok().and_then(|l| text.lines().nth(l.checked_sub(1)?)).unwrap_or("");
    let column = usize::try_from(at.column()).unwrap_or(1).saturating_sub(1);
    let value: String = line.chars().skip(column).collect();
    let end = value.find([',', '}', ']', '#']).unwrap_or(value.len());
    match value[..end].trim() {
        // An absent value has the position of the colon before it.
        "" | ":" => "nothing".to_owned(),
        value => quoted(value),
    }
}

/// Foreign text in quotes, control characters escaped, shortened.
pub(super) fn quoted(s: &str) -> String {
    let cut = s.chars().count() > QUOTED;
    let s: String = if cut { s.chars().take(QUOTED - 3).chain("...".chars()).collect() } else { s.to_owned() };
    format!("{s:?}")
}

/// A message of the parser's: printable and bounded.
fn shorten(s: &str) -> String {
    let limit = 4 * QUOTED;
    if s.chars().count() <= limit {
        return printable(s).into_owned();
    }
    let head: String = s.chars().take(limit).collect();
    format!("{}...", printable(&head))
}
