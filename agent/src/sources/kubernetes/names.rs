//! Names that Underpass gives meaning to, and one copy of every string that is kept.

use std::{collections::HashSet, sync::Arc};

/// Label of a namespace or pod: `enabled` or `disabled`. A pod's wins over its namespace's, and over Istio's.
pub(super) const MODE: &str = "underpass.io/mode";
/// Istio's label of a namespace or pod: `ambient` or `none`.
pub(super) const ISTIO_MODE: &str = "istio.io/dataplane-mode";
/// Annotation that Istio's injector leaves on a pod with a sidecar.
pub(super) const SIDECAR: &str = "sidecar.istio.io/status";
/// Annotation of a policy that only logs.
pub(super) const DRY_RUN: &str = "istio.io/dry-run";
/// Annotations of a namespace or pod: what is left alone. Lists separated by commas.
pub(super) const EXCLUDE_OUTBOUND_PORTS: &str = "underpass.io/exclude-outbound-ports";
/// As above.
pub(super) const EXCLUDE_OUTBOUND_CIDRS: &str = "underpass.io/exclude-outbound-cidrs";
/// As above.
pub(super) const EXCLUDE_INBOUND_PORTS: &str = "underpass.io/exclude-inbound-ports";
/// Label of a slice: the service it belongs to.
pub(super) const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Slices of services that have a virtual address.
pub(super) const NOT_HEADLESS: &str = "!service.kubernetes.io/headless";
/// Label of a node, and key of an old slice's topology.
pub(super) const ZONE: &str = "topology.kubernetes.io/zone";
/// Key of an old slice's topology.
pub(super) const HOSTNAME: &str = "kubernetes.io/hostname";

/// Strings that occur in many objects, each kept once.
#[derive(Debug, Default)]
pub(super) struct Names(HashSet<Arc<str>>);

impl Names {
    pub(super) fn get(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.0.get(name) {
            return Arc::clone(known);
        }
        let new: Arc<str> = name.into();
        self.0.insert(Arc::clone(&new));
        new
    }

    /// Forgets what nobody uses any more.
    pub(super) fn prune(&mut self) {
        self.0.retain(|name| Arc::strong_count(name) > 1);
    }
}
