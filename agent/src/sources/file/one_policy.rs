//! A policy that comes on its own, out of an object of Istio's API.

use serde_json::{Map, Value};

use super::{ConfigError, fields::Check, policies::Policies, schema, yaml};
use crate::mesh::{Action, Labels, Policy, PolicyKey, Scope};

/// Reads the `spec` of an `AuthorizationPolicy`. What a file would be refused for makes the policy invalid, so that the
/// workloads it selects (all of its namespace, when that cannot be read either) refuse every connection.
pub fn policy_of_spec(key: PolicyKey, root_namespace: &str, dry_run: bool, spec: Map<String, Value>) -> Policy {
    let scope = if *key.namespace == *root_namespace { Scope::Mesh } else { Scope::Namespace };
    let selector = selector(&spec);
    parse(&key, root_namespace, dry_run, spec).unwrap_or_else(|problem| Policy {
        key,
        scope,
        selector,
        action: Action::Deny,
        dry_run,
        rules: Vec::new(),
        invalid: Some(problem.0),
    })
}

fn parse(
    key: &PolicyKey,
    root_namespace: &str,
    dry_run: bool,
    mut spec: Map<String, Value>,
) -> Result<Policy, ConfigError> {
    // Absent to Istio; the schema of a file has no null.
    spec.retain(|_, value| !value.is_null());
    spec.insert("name".into(), Value::String(key.name.to_string()));
    spec.insert("namespace".into(), Value::String(key.namespace.to_string()));
    spec.insert("dryRun".into(), Value::Bool(dry_run));
    // One field a line, so that the position of an error is of use. JSON is YAML.
    let text = serde_json::to_string_pretty(&Value::Object(spec)).map_err(|e| ConfigError(e.to_string()))?;
    let policy: schema::Policy = yaml::parsed("spec", &text)?;
    Policies::new(Check { file: "spec" }, root_namespace).policy(&|field| field.to_owned(), &policy)
}

/// The selector, as far as it can be read.
fn selector(spec: &Map<String, Value>) -> Labels {
    let labels = spec.get("selector").and_then(|s| s.get("matchLabels")).and_then(Value::as_object);
    let text = |(name, value): (&String, &Value)| Some((name.as_str().into(), value.as_str()?.into()));
    Labels(labels.into_iter().flatten().filter_map(text).collect())
}
