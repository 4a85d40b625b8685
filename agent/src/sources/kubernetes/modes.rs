//! Inbound modes out of Istio's `PeerAuthentication`.

use std::{collections::BTreeMap, sync::Arc};

use serde::Deserialize;

use super::{
    cluster::Cluster,
    records::{ConfiguredRecord, Key},
    status::Problem,
};
use crate::mesh::{EffectiveMode, InboundMode, Labels, ModeDefaults, ModeSource, PortMode};

/// Modes of every workload. Of several objects that say something about the same workloads the oldest counts, as in Istio.
#[derive(Debug, Default)]
pub(super) struct Modes {
    defaults: ModeDefaults,
    /// With selectors, by namespace, oldest first.
    selecting: BTreeMap<Arc<str>, Vec<Selecting>>,
}

#[derive(Debug)]
struct Selecting {
    selector: Labels,
    mode: Option<InboundMode>,
    ports: Vec<PortMode>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
struct Spec {
    selector: Option<Selector>,
    mtls: Option<Mtls>,
    port_level_mtls: BTreeMap<String, Mtls>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
struct Selector {
    match_labels: BTreeMap<Arc<str>, Arc<str>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Mtls {
    mode: Mode,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Mode {
    #[default]
    Unset,
    Disable,
    Permissive,
    Strict,
}

impl Mode {
    /// `DISABLE` turns mutual TLS off in a proxy; a workload of the mesh keeps its tunnel and takes plaintext beside it, as in
    /// Istio's ambient mode.
    fn inbound(self) -> Option<InboundMode> {
        match self {
            Mode::Unset => None,
            Mode::Disable | Mode::Permissive => Some(InboundMode::Permissive),
            Mode::Strict => Some(InboundMode::Strict),
        }
    }
}

impl Modes {
    /// Reads all objects. One that cannot be read makes its scope STRICT: it was written to restrict something.
    pub(super) fn new(cluster: &Cluster, mesh: InboundMode, root: &str, problems: &mut Vec<Problem>) -> Self {
        let mut objects: Vec<(&Key, &Arc<ConfiguredRecord>)> = cluster.authentications.iter().collect();
        objects.sort_by(|a, b| (a.1.created, a.0).cmp(&(b.1.created, b.0)));
        let mut modes =
            Self { defaults: ModeDefaults { mesh, namespaces: BTreeMap::new() }, selecting: BTreeMap::new() };
        let mut mesh_set = false;
        for (key, record) in objects {
            let mut problem = |problem: String| {
                problems.push(Problem { object: format!("PeerAuthentication {key}"), problem });
            };
            let spec = serde_json::from_str::<Spec>(&record.spec).unwrap_or_else(|e| {
                problem(format!("{e}; until it is corrected its workloads are STRICT"));
                Spec { mtls: Some(Mtls { mode: Mode::Strict }), ..Spec::default() }
            });
            let mode = spec.mtls.as_ref().and_then(|m| m.mode.inbound());
            if let Some(selector) = spec.selector.filter(|s| !s.match_labels.is_empty()) {
                let ports = ports(&spec.port_level_mtls, &mut problem);
                let selecting = Selecting { selector: Labels(selector.match_labels), mode, ports };
                modes.selecting.entry(Arc::clone(&key.namespace)).or_default().push(selecting);
                continue;
            }
            if !spec.port_level_mtls.is_empty() {
                problem("portLevelMtls without a selector has no effect, as in Istio; add spec.selector".into());
            }
            let Some(mode) = mode else { continue };
            if *key.namespace != *root {
                modes.defaults.namespaces.entry(Arc::clone(&key.namespace)).or_insert(mode);
            } else if !mesh_set {
                (modes.defaults.mesh, mesh_set) = (mode, true);
            }
        }
        modes
    }

    /// The mode of a workload, and of its ports that have another.
    pub(super) fn of(&self, namespace: &str, labels: &Labels) -> (EffectiveMode, Vec<PortMode>) {
        let selecting = self.selecting.get(namespace).into_iter().flatten().filter(|s| labels.satisfy(&s.selector));
        let (mut own, mut ports) = (None, Vec::<PortMode>::new());
        for one in selecting {
            own = own.or(one.mode);
            for port in &one.ports {
                if ports.iter().all(|p| p.port != port.port) {
                    ports.push(*port);
                }
            }
        }
        let mode = self.defaults.resolve(namespace, own);
        ports.retain(|p| p.mode != mode.mode);
        (mode, ports)
    }

    /// While a pod is on its way in or out, it takes plaintext: half of its clients send that.
    pub(super) fn between() -> EffectiveMode {
        EffectiveMode { mode: InboundMode::Permissive, set_by: ModeSource::Workload }
    }
}

fn ports(levels: &BTreeMap<String, Mtls>, problem: &mut impl FnMut(String)) -> Vec<PortMode> {
    let mut ports = Vec::new();
    for (port, mtls) in levels {
        match port.parse::<u16>() {
            Ok(port) if port > 0 => {
                ports.extend(mtls.mode.inbound().map(|mode| PortMode { port, mode }));
            }
            _ => problem(format!("portLevelMtls: {port:?} is no port; write 1 to 65535")),
        }
    }
    ports
}
