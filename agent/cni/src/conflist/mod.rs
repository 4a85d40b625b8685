//! Our entry in other people's network configuration lists.
//!
//! A list is edited as text: the entry is put in, replaced and taken out, and every other byte stays. So fields that we do
//! not know, their order, the format of numbers and somebody's indentation survive, and taking out the
//! entry gives back the file as it was.

mod edit;
mod version;

#[cfg(test)]
mod tests;

use std::{borrow::Cow, ops::Range};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

pub use version::{SUPPORTED, SpecVersion};

use edit::range_of;

/// The plugin's type, which is the name of its program in the runtime's directory.
pub const TYPE: &str = "underpass-cni";

/// The entry's fields, as they are written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Fields<'a> {
    /// Path of the agent's socket, as the runtime sees it.
    pub socket: Cow<'a, str>,
    /// Path of the [projection](crate::projection), as the runtime sees it.
    pub projection: Cow<'a, str>,
    /// Namespaces whose pods the agent is never asked about.
    pub exempt_namespaces: Cow<'a, [String]>,
}

/// Why a list cannot be edited.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConflistError {
    /// It is not JSON, or not of the shape.
    #[error("not a network configuration: {0}")]
    Malformed(String),
    /// Nothing in it makes a network.
    #[error("{0}")]
    NoNetwork(&'static str),
    /// The plugin does not speak a version that the list may be run with.
    #[error("{0}")]
    Version(String),
}

#[derive(Deserialize)]
struct List<'a> {
    name: Option<String>,
    #[serde(rename = "cniVersion")]
    version: Option<String>,
    #[serde(default, rename = "cniVersions")]
    versions: Vec<String>,
    #[serde(borrow)]
    plugins: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Plugin<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
}

/// The entries of a list: where each stands, and whether it is ours.
struct Plugins<'a> {
    text: &'a str,
    all: Vec<Entry<'a>>,
    /// The contents of the brackets around them.
    inside: Range<usize>,
}

struct Entry<'a> {
    raw: &'a str,
    at: Range<usize>,
    ours: bool,
}

impl<'a> Plugins<'a> {
    fn of(text: &'a str) -> Result<(List<'a>, Self), ConflistError> {
        let list: List<'a> = parse(text)?;
        let Some(plugins) = list.plugins else {
            return Err(ConflistError::NoNetwork("field \"plugins\" is missing: there is nothing to chain to"));
        };
        let brackets = range_of(text, plugins.get());
        let raws: Vec<&'a RawValue> = parse_field("plugins", plugins.get())?;
        let mut entries = Vec::with_capacity(raws.len());
        for (index, raw) in raws.into_iter().enumerate() {
            let raw = raw.get();
            let plugin: Plugin<'_> = parse_field(&format!("plugins[{index}]"), raw)?;
            entries.push(Entry { raw, at: range_of(text, raw), ours: plugin.kind == TYPE });
        }
        Ok((list, Self { text, all: entries, inside: brackets.start + 1..brackets.end - 1 }))
    }

    /// The text with other entries in it. They keep what stands between them.
    fn without_ours(&self) -> String {
        edit::retain(self.text, &self.inside, &self.all.iter().map(|e| (e.at.clone(), !e.ours)).collect::<Vec<_>>())
    }
}

/// Puts our entry at the end of a list; `None` when it is there as it should be.
///
/// # Errors
/// The text is no list, a list without any network, or one of a version that the plugin does not speak.
pub fn chain(text: &str, fields: &Fields<'_>) -> Result<Option<String>, ConflistError> {
    let (list, plugins) = Plugins::of(text)?;
    if list.name.is_none_or(|name| name.is_empty()) {
        return Err(ConflistError::Malformed("field \"name\" is missing".into()));
    }
    version::check(list.version.as_deref(), &list.versions)?;
    if plugins.all.iter().all(|entry| entry.ours) {
        let reason = "field \"plugins\" has no plugin that makes a network: there is nothing to chain to";
        return Err(ConflistError::NoNetwork(reason));
    }
    let entry = entry(fields);
    let ours = plugins.all.iter().filter(|entry| entry.ours).count();
    if let (1, Some(last)) = (ours, plugins.all.last().filter(|last| last.ours)) {
        if same(last.raw, &entry) {
            return Ok(None);
        }
        return Ok(Some(edit::replace(text, &last.at, &entry)));
    }
    let without = plugins.without_ours();
    let (_, others) = Plugins::of(&without)?;
    // As far from the entry before as that one from its own.
    let gap = match &others.all[..] {
        [.., before, last] => &without[before.at.end..last.at.start],
        [only] => &without[others.inside.start..only.at.start],
        [] => unreachable!("one is not ours"),
    };
    let gap = gap.rsplit(',').next().unwrap_or_default();
    let end = others.all.last().map_or(others.inside.start, |last| last.at.end);
    Ok(Some(edit::insert(&without, end, &format!(",{gap}{entry}"))))
}

/// Takes our entries out of a list; `None` when there is none.
///
/// # Errors
/// The text is no list.
pub fn unchain(text: &str) -> Result<Option<String>, ConflistError> {
    let (_, plugins) = Plugins::of(text)?;
    Ok(plugins.all.iter().any(|entry| entry.ours).then(|| plugins.without_ours()))
}

/// A list of a configuration with a single plugin, and our entry.
///
/// It keeps the network's name: what plugins remember of a network, such as its addresses in use, they remember by that.
///
/// # Errors
/// The text is no configuration of one plugin, or of a version that the plugin does not speak.
pub fn from_single(text: &str, fields: &Fields<'_>) -> Result<String, ConflistError> {
    #[derive(Deserialize)]
    struct Single {
        name: Option<String>,
        #[serde(rename = "cniVersion")]
        version: Option<String>,
        #[serde(rename = "type")]
        kind: Option<String>,
    }
    let single: Single = parse(text)?;
    match single.kind.as_deref() {
        None | Some("") => {
            return Err(ConflistError::Malformed(
                "field \"type\" is missing; a file with \"plugins\" has to be called *.conflist".into(),
            ));
        }
        Some(TYPE) => {
            return Err(ConflistError::NoNetwork("its only plugin is underpass-cni: there is nothing to chain to"));
        }
        Some(_) => {}
    }
    let Some(name) = single.name.filter(|name| !name.is_empty()) else {
        return Err(ConflistError::Malformed("field \"name\" is missing".into()));
    };
    version::check(single.version.as_deref(), &[])?;
    let quoted = |text: &str| serde_json::to_string(text).expect("strings are JSON");
    Ok(format!(
        "{{\n  \"cniVersion\": {},\n  \"name\": {},\n  \"plugins\": [\n    {},\n    {}\n  ]\n}}\n",
        quoted(single.version.as_deref().unwrap_or_default()),
        quoted(&name),
        text.trim(),
        entry(fields)
    ))
}

/// Our entry, in one line.
fn entry(fields: &Fields<'_>) -> String {
    #[derive(Serialize)]
    struct Whole<'a> {
        r#type: &'a str,
        #[serde(flatten)]
        fields: &'a Fields<'a>,
    }
    serde_json::to_string(&Whole { r#type: TYPE, fields }).expect("strings are JSON")
}

fn same(one: &str, other: &str) -> bool {
    let value = |text| serde_json::from_str::<serde_json::Value>(text).ok();
    value(one).is_some_and(|one| Some(one) == value(other))
}

fn parse<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, ConflistError> {
    serde_json::from_str(text).map_err(|error| ConflistError::Malformed(error.to_string()))
}

fn parse_field<'a, T: Deserialize<'a>>(field: &str, text: &'a str) -> Result<T, ConflistError> {
    // Positions would be the field's, not the file's.
    let what = |error: serde_json::Error| {
        let message = error.to_string();
        message.split(" at line ").next().unwrap_or_default().to_owned()
    };
    serde_json::from_str(text).map_err(|error| ConflistError::Malformed(format!("field {field:?}: {}", what(error))))
}
