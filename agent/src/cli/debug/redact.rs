//! Replaces secrets. Nothing that is collected should hold one; this is for what people put into configurations and logs.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::Value;

/// What is there instead.
pub(super) const REDACTED: &str = "[redacted]";

/// Parts of names of fields whose values are secrets. Lower case, without separators.
const SECRET_NAMES: [&str; 9] =
    ["password", "passwd", "secret", "token", "credential", "privatekey", "apikey", "authorization", "passphrase"];

/// Private keys in PEM (RFC 7468), whole or cut off; tokens (RFC 7519); bearer tokens (RFC 6750); `name=value` and `name: value`
/// of lines of a log.
static PATTERNS: LazyLock<[(Regex, &str); 5]> = LazyLock::new(|| {
    let pattern = |text| Regex::new(text).expect("a constant");
    [
        (
            pattern(r"(?s)-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\z)"),
            "[redacted private key]",
        ),
        // One whose beginning was cut off.
        (pattern(r"\A[A-Za-z0-9+/=\s]*-----END [A-Z0-9 ]*PRIVATE KEY-----"), "[redacted private key]"),
        (pattern(r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"), "[redacted token]"),
        (pattern(r"(?i)\b(bearer|basic) [A-Za-z0-9._~+/=-]{8,}"), "$1 [redacted]"),
        (
            pattern(
                r#"(?i)\b(password|passwd|passphrase|secret|api_?key|access_?token)(["']?\s*[=:]\s*["']?)[^\s"',}]+"#,
            ),
            "${1}${2}[redacted]",
        ),
    ]
});

/// `text` without what looks like a secret wherever it stands.
pub(super) fn text(text: &str) -> String {
    let mut text = text.to_owned();
    for (pattern, replacement) in &*PATTERNS {
        if pattern.is_match(&text) {
            text = pattern.replace_all(&text, *replacement).into_owned();
        }
    }
    text
}

/// Replaces the values of fields whose names say that they are secret.
pub(super) fn fields(value: &mut Value) {
    match value {
        Value::Object(fields_of) => {
            for (name, value) in fields_of {
                if is_secret(name) && !matches!(value, Value::Null | Value::Bool(_)) {
                    *value = REDACTED.into();
                } else {
                    fields(value);
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(fields),
        _ => {}
    }
}

fn is_secret(name: &str) -> bool {
    let plain: String = name.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect();
    SECRET_NAMES.iter().any(|secret| plain.contains(secret))
}
