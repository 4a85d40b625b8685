//! Labels of workloads and in selectors.

use super::{ConfigError, fields::Check, schema, yaml::quoted};
use crate::mesh::{Labels, check_name};

/// Longest name of a label without its prefix, and longest value, in characters (Kubernetes, "Labels and Selectors").
const MAX_LABEL: usize = 63;

/// Checks labels as Kubernetes does, so that one that no pod can have is found here.
pub(super) fn labels(check: Check<'_>, field: &str, labels: &schema::Labels) -> Result<Labels, ConfigError> {
    let mut out = Labels::default();
    for (key, value) in labels {
        let (prefix, name) = key.split_once('/').map_or((None, key.as_str()), |(prefix, name)| (Some(prefix), name));
        let field = format!("{field}.{}", quoted(key));
        if name.is_empty() || !is_label(name) || prefix.is_some_and(|p| check_name("prefix", p).is_err()) {
            let problem = format!(
                "{} is no label; write NAME or PREFIX/NAME with 1 to {MAX_LABEL} letters, digits, '-', '_' and '.' in NAME",
                quoted(key)
            );
            return Err(check.wrong(value, &field, problem));
        }
        if !is_label(&value.value) {
            let problem = format!(
                "{} is no label's value; write up to {MAX_LABEL} letters, digits, '-', '_' and '.' (no wildcards), starting and ending with a letter or digit",
                quoted(&value.value)
            );
            return Err(check.wrong(value, &field, problem));
        }
        out.0.insert(key.as_str().into(), value.value.as_str().into());
    }
    Ok(out)
}

fn is_label(text: &str) -> bool {
    let edge = |b: Option<&u8>| b.is_none_or(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.len() <= MAX_LABEL
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}
