//! Which inbound mode is in force for a workload: its own, else its namespace's, else the mesh's.

use std::{collections::BTreeMap, fmt, sync::Arc};

use serde::{Deserialize, Serialize};

use super::InboundMode;

/// Where a mode was written down. The narrowest place wins: port, workload, namespace, mesh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModeSource {
    /// For one port of the workload.
    Port,
    /// For the workload.
    Workload,
    /// For its namespace.
    Namespace,
    /// For the whole mesh, or nowhere.
    #[default]
    Mesh,
}

impl fmt::Display for ModeSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ModeSource::Port => "port",
            ModeSource::Workload => "workload",
            ModeSource::Namespace => "namespace",
            ModeSource::Mesh => "mesh",
        })
    }
}

/// A mode with the place it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EffectiveMode {
    /// What happens to plaintext.
    pub mode: InboundMode,
    /// Who says so.
    pub set_by: ModeSource,
}

/// Modes of workloads that set none. The one place where they are resolved, for every source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModeDefaults {
    /// The mesh's.
    pub mesh: InboundMode,
    /// Namespaces with another one.
    pub namespaces: BTreeMap<Arc<str>, InboundMode>,
}

impl ModeDefaults {
    /// The mode of a workload in `namespace` that sets `own`, on ports that it does not list.
    pub fn resolve(&self, namespace: &str, own: Option<InboundMode>) -> EffectiveMode {
        let (mode, set_by) = if let Some(mode) = own {
            (mode, ModeSource::Workload)
        } else if let Some(mode) = self.namespaces.get(namespace) {
            (*mode, ModeSource::Namespace)
        } else {
            (self.mesh, ModeSource::Mesh)
        };
        EffectiveMode { mode, set_by }
    }
}
