//! Rendered objects, to be looked at.

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::helm::{Helm, NEWEST};

pub struct Objects(pub Vec<Value>);

impl Objects {
    /// What is rendered for these values.
    pub fn of(values: &str) -> Result<Self> {
        Self::read(&Helm::find()?.template_with(values, &[NEWEST])?)
    }

    pub fn read(text: &str) -> Result<Self> {
        let all: Vec<Value> = serde_saphyr::from_multiple(text).context("Helm's output is no YAML")?;
        Ok(Self(all.into_iter().filter(|object| !object.is_null()).collect()))
    }

    pub fn find(&self, kind: &str, name: &str) -> Option<&Value> {
        self.0.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
    }

    pub fn get(&self, kind: &str, name: &str) -> Result<&Value> {
        self.find(kind, name).with_context(|| format!("no {kind} {name}"))
    }

    /// `Kind/name` of each.
    pub fn names(&self) -> Vec<String> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        self.0.iter().map(|object| text(&object["kind"]) + "/" + &text(&object["metadata"]["name"])).collect()
    }

    /// Options of the container in a `DaemonSet`, Deployment, Job or Pod.
    pub fn arguments(&self, kind: &str, name: &str) -> Result<Vec<String>> {
        let arguments = container(self.get(kind, name)?)["args"].as_array().context("no args")?;
        Ok(arguments.iter().map(|argument| argument.as_str().unwrap_or_default().to_owned()).collect())
    }

    /// The agents' configuration.
    pub fn config(&self) -> Result<Value> {
        let text =
            self.get("ConfigMap", "underpass-config")?["data"]["config.yaml"].as_str().context("no config.yaml")?;
        serde_saphyr::from_str(text).context("config.yaml is no YAML")
    }
}

/// What describes the pods of an object, or the object itself when it is one; null for those without.
pub fn pod(object: &Value) -> &Value {
    if object["kind"] == "Pod" { object } else { &object["spec"]["template"] }
}

pub fn container(object: &Value) -> &Value {
    &pod(object)["spec"]["containers"][0]
}
