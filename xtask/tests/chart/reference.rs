//! `docs/values.md` is what `values.schema.json` and `values.yaml` say.
//! `UNDERPASS_UPDATE_DOCS=1 cargo test -p xtask --test chart the_reference` brings it up to date.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{cases::PLATFORMS, helm::chart};

const HEAD: &str = "# Values of the chart

Generated from `charts/underpass/values.schema.json`, which refuses every value that is not here, and the files with defaults.
`charts/underpass/values.yaml` has them in one piece. What they do to a cluster: [install](install.md), [upgrade](upgrade.md),
[uninstall](uninstall.md).

A default comes from, the last wins: `files/profiles/kubernetes.yaml` and `values.yaml`, the `profile`, the `platform`. What you set wins over all of
them, also when it is `0`, `false`, `\"\"` or an empty list; mappings are merged.
";

/// Where a default can come from, and what it is then; by the value's path.
type Defaults = BTreeMap<String, Vec<(String, Value)>>;

#[test]
fn the_reference_is_current() -> Result<()> {
    let text = reference()?;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/values.md");
    if std::env::var_os("UNDERPASS_UPDATE_DOCS").is_some() {
        return Ok(fs::write(path, text)?);
    }
    let written = fs::read_to_string(path)?;
    let different = text.lines().zip(written.lines()).find(|(new, old)| new != old);
    ensure!(
        text == written,
        "docs/values.md is not what the chart says now, first at {different:?}; write it with \
         UNDERPASS_UPDATE_DOCS=1 cargo test -p xtask --test chart the_reference"
    );
    Ok(())
}

/// Each value has a default, and each default is a value.
#[test]
fn schema_and_defaults_have_the_same_values() -> Result<()> {
    let schema = json("values.schema.json")?;
    let mut known = Vec::new();
    each(&schema["properties"], "", &mut |path, _| {
        known.push(path.to_owned());
        Ok(())
    })?;
    let defaults = defaults()?;
    for path in known.iter().filter(|path| *path != "global") {
        let usual = defaults.get(path).and_then(|all| all.first()).is_some_and(|(from, _)| from.is_empty());
        ensure!(usual, "{path} has no default in values.yaml or files/profiles/kubernetes.yaml");
    }
    for path in defaults.keys() {
        ensure!(known.contains(path), "{path} has a default, and the schema does not know it");
    }
    Ok(())
}

/// Objects of the schema refuse what they do not know, wherever one is.
#[test]
fn nothing_unknown_is_taken_anywhere() -> Result<()> {
    fn closed(value: &Value, at: &str) -> Result<()> {
        if value["type"] == "object" && !value["properties"].is_null() {
            ensure!(value["additionalProperties"] == false, "{at} takes unknown fields");
        }
        match value {
            Value::Object(fields) => fields.iter().try_for_each(|(name, value)| closed(value, &format!("{at}/{name}"))),
            Value::Array(items) => items.iter().try_for_each(|value| closed(value, at)),
            _ => Ok(()),
        }
    }
    closed(&json("values.schema.json")?, "")
}

fn reference() -> Result<String> {
    let schema = json("values.schema.json")?;
    let defaults = defaults()?;
    let mut text = HEAD.to_owned();
    let sections = sorted(&schema["properties"])?;
    let (single, sections): (Vec<_>, Vec<_>) =
        sections.into_iter().partition(|(_, value)| value["properties"].is_null());
    text += "\n## General\n\n";
    let single = single.into_iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    table(&mut text, &Value::Object(single), "", &defaults)?;
    for (name, section) in sections {
        write!(text, "\n## `{name}`\n\n{}\n\n", description(section, name)?)?;
        table(&mut text, &section["properties"], &format!("{name}."), &defaults)?;
    }
    Ok(text)
}

fn table(text: &mut String, fields: &Value, prefix: &str, defaults: &Defaults) -> Result<()> {
    text.push_str("| Value | Type | Default | |\n|---|---|---|---|\n");
    each(fields, prefix, &mut |path, schema| {
        let default = defaults.get(path).map(|all| {
            let all = all.iter().map(|(from, value)| {
                let value = format!("`{value}`");
                if from.is_empty() { value } else { format!("{from}: {value}") }
            });
            all.collect::<Vec<_>>().join("; ")
        });
        let description = description(schema, path)?;
        writeln!(text, "| `{path}` | {} | {} | {description} |", kind(schema), default.unwrap_or_default())?;
        Ok(())
    })
}

/// Whatever order other crates make `serde_json` keep.
fn sorted(fields: &Value) -> Result<BTreeMap<&String, &Value>> {
    Ok(fields.as_object().context("properties are a mapping")?.iter().collect())
}

/// Calls `with` for every value that is no section, in the order of their names.
fn each(fields: &Value, prefix: &str, with: &mut dyn FnMut(&str, &Value) -> Result<()>) -> Result<()> {
    for (name, schema) in sorted(fields)? {
        let path = format!("{prefix}{name}");
        // Sections have a description as well; where they are below the first level, the fields' own have to do.
        if schema["properties"].is_object() && !is_leaf(&path) {
            description(schema, &path)?;
            each(&schema["properties"], &format!("{path}."), with)?;
        } else {
            with(&path, schema)?;
        }
    }
    Ok(())
}

/// Values of Kubernetes' own shapes, which are one value here.
fn is_leaf(path: &str) -> bool {
    path.ends_with("seLinuxOptions")
}

fn description<'a>(schema: &'a Value, path: &str) -> Result<&'a str> {
    schema["description"].as_str().with_context(|| format!("{path} has no description in values.schema.json"))
}

fn kind(schema: &Value) -> String {
    if let Some(choices) = schema["enum"].as_array() {
        let written = choices.iter().map(|choice| match choice.as_str() {
            Some("") => "empty".to_owned(),
            Some(text) => format!("`{text}`"),
            None => format!("`{choice}`"),
        });
        return written.collect::<Vec<_>>().join(", ");
    }
    if let Some(reference) = schema["allOf"][0]["$ref"].as_str() {
        let kind = match reference.rsplit('/').next().unwrap_or_default() {
            "strings" => "mapping of strings",
            "args" => "list of options",
            "env" | "tolerations" => "list",
            _ => "mapping",
        };
        return kind.to_owned();
    }
    let range = || match (&schema["minimum"], &schema["maximum"]) {
        (Value::Number(low), Value::Number(high)) => format!(" from {low} to {high}"),
        _ => String::new(),
    };
    match schema["type"].as_str() {
        Some("integer") => "number".to_owned() + &range(),
        Some("number") => "fraction".to_owned() + &range(),
        Some("boolean") => "`true`, `false`".to_owned(),
        Some("array") => "list".to_owned(),
        Some("object") => "mapping".to_owned(),
        Some(other) => other.to_owned(),
        None => "number or text".to_owned(),
    }
}

/// The defaults of all files; the first of a value is the usual one, with an empty name.
fn defaults() -> Result<Defaults> {
    let mut all = Defaults::new();
    for file in ["files/profiles/kubernetes.yaml", "values.yaml"] {
        collect(&yaml(file)?, "", "", &mut all)?;
    }
    collect(&yaml("files/profiles/demo.yaml")?, "", "demo", &mut all)?;
    for platform in PLATFORMS {
        collect(&yaml(&format!("files/platforms/{platform}.yaml"))?, "", platform, &mut all)?;
    }
    Ok(all)
}

fn collect(values: &Value, prefix: &str, from: &str, all: &mut Defaults) -> Result<()> {
    let schema = json("values.schema.json")?;
    for (name, value) in values.as_object().with_context(|| format!("{prefix} is no mapping"))? {
        let path = format!("{prefix}{name}");
        let pointer = format!("/properties/{}", path.replace('.', "/properties/"));
        let section = schema.pointer(&pointer).is_some_and(|schema| schema["properties"].is_object());
        if section && !is_leaf(&path) {
            collect(value, &format!("{path}."), from, all)?;
            continue;
        }
        let known = all.entry(path.clone()).or_default();
        if from.is_empty() && !known.is_empty() {
            bail!("{path} has a default in values.yaml, which hides that of the profiles");
        }
        known.push((from.to_owned(), value.clone()));
    }
    Ok(())
}

fn yaml(name: &str) -> Result<Value> {
    let text = fs::read_to_string(chart().join(name))?;
    serde_saphyr::from_str(&text).with_context(|| format!("{name} is no YAML"))
}

fn json(name: &str) -> Result<Value> {
    let text = fs::read_to_string(chart().join(name))?;
    serde_json::from_str(&text).with_context(|| format!("{name} is no JSON"))
}
