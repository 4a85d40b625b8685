//! What a runtime says on standard input.

use std::{collections::BTreeSet, path::PathBuf};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    failure::{Code, Failure},
    result::Previous,
};
use crate::conflist::SpecVersion;

/// Largest configuration that is read, in bytes.
pub const LIMIT: u64 = 1 << 20;

/// The plugin's entry with what the runtime adds to it. Other fields are other programs' business.
#[derive(Debug)]
pub struct Config {
    /// `cniVersion` as it was written, and as it is understood.
    version: (String, SpecVersion),
    /// The agent's socket.
    pub socket: PathBuf,
    /// The [projection](crate::projection).
    pub projection: PathBuf,
    /// Namespaces whose pods the agent is never asked about.
    pub exempt: BTreeSet<String>,
    previous: Option<Box<RawValue>>,
    valid: Option<Vec<ValidAttachment>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    cni_version: String,
    socket: Option<PathBuf>,
    projection: Option<PathBuf>,
    #[serde(default)]
    exempt_namespaces: Vec<String>,
    prev_result: Option<Box<RawValue>>,
    #[serde(rename = "cni.dev/valid-attachments")]
    valid: Option<Vec<ValidAttachment>>,
}

#[derive(Debug, Deserialize)]
struct ValidAttachment {
    #[serde(rename = "containerID")]
    container: String,
}

impl Config {
    /// Reads standard input.
    ///
    /// # Errors
    /// Code 1 for a version that the plugin does not speak, 6 for what is no JSON of the shape, 7 for a field that
    /// cannot be used.
    pub fn parse(stdin: &[u8]) -> Result<Self, Failure> {
        if stdin.len() as u64 > LIMIT {
            return Err(Failure::new(Code::Decode, format!("standard input: more than {LIMIT} bytes")));
        }
        let raw: Raw = serde_json::from_slice(stdin).map_err(|error| {
            Failure::new(Code::Decode, format!("standard input is no network configuration: {error}"))
        })?;
        let version =
            SpecVersion::parse(&raw.cni_version).filter(|version| version.is_supported()).ok_or_else(|| {
                let supported = SpecVersion::supported();
                Failure::new(Code::Version, format!("cniVersion: {:?} is none of {supported}", raw.cni_version))
            })?;
        let path = |name: &str, value: Option<PathBuf>| match value {
            Some(path) if path.is_absolute() => Ok(path),
            Some(path) => Err(invalid(format!("{name}: \"{}\" has to be an absolute path", path.display()))),
            None => Err(invalid(format!("{name} is missing: the agent writes the plugin's entry anew when it starts"))),
        };
        Ok(Self {
            version: (raw.cni_version, version),
            socket: path("socket", raw.socket)?,
            projection: path("projection", raw.projection)?,
            exempt: raw.exempt_namespaces.into_iter().collect(),
            previous: raw.prev_result,
            valid: raw.valid,
        })
    }

    /// The version that standard input asks for, whatever else is in it; the newest when it asks for none that is known.
    pub fn version_of(stdin: &[u8]) -> String {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Head {
            cni_version: String,
        }
        serde_json::from_slice::<Head>(stdin)
            .ok()
            .map(|head| head.cni_version)
            .filter(|text| SpecVersion::parse(text).is_some_and(SpecVersion::is_supported))
            .unwrap_or_else(|| SpecVersion::NEWEST.to_string())
    }

    /// Commands have come with versions of the specification.
    ///
    /// # Errors
    /// Code 1 when the configuration's is older.
    pub fn since(&self, version: SpecVersion) -> Result<(), Failure> {
        if self.version.1 >= version {
            return Ok(());
        }
        let message = format!("cniVersion: {:?} does not have this command, which came with {version}", self.version.0);
        Err(Failure::new(Code::Version, message))
    }

    /// What the plugins before have made of the pod's network.
    ///
    /// # Errors
    /// Code 7 without it, or when it is none.
    pub fn previous(&self) -> Result<Previous<'_>, Failure> {
        let Some(raw) = &self.previous else {
            let message =
                "prevResult is missing: underpass-cni makes no network and must be chained behind another plugin";
            return Err(invalid(message.into()));
        };
        Previous::parse(raw.get(), &self.version.0).map_err(|reason| invalid(format!("prevResult: {reason}")))
    }

    /// Ids of the containers that are still there, each once. `None` when the runtime does not say: then nothing may be
    /// taken for gone.
    pub fn valid(&self) -> Option<Vec<String>> {
        let valid: BTreeSet<&String> = self.valid.as_ref()?.iter().map(|valid| &valid.container).collect();
        Some(valid.into_iter().cloned().collect())
    }
}

fn invalid(message: String) -> Failure {
    Failure::new(Code::Config, message)
}
