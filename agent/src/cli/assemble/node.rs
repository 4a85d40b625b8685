//! What operators are told of the node.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    admin::{
        api::{self, CertificateStatus, KtlsStatus, Status},
        http::NodeView,
        inventory::CertificateDetails,
        server::StatusProvider,
    },
    capture::{Capture, InterfaceGuard, Share},
    identity::{CertificateStore, Revocations},
    mesh::SpiffeId,
    proxy::{Applied, PodState, PodStatus, Reconciler},
    relay::{Relay, ThreadHealth},
    sources::{
        file::{ReloadStats, ReloadStatus},
        kubernetes::{SourceStatus, Statuses},
    },
    tunnel::ktls::Support,
};

/// What the admin socket tells of the node.
pub(super) struct NodeStatus {
    pub(super) reconciler: Arc<Reconciler>,
    pub(super) certificates: Arc<CertificateStore>,
    pub(super) capture: Arc<Capture>,
    pub(super) relay: Arc<Relay>,
    pub(super) reload: Arc<ReloadStats>,
    pub(super) cluster: Option<Statuses>,
    pub(super) revocations: Arc<Revocations>,
    pub(super) ktls: Support,
}

impl NodeView for NodeStatus {
    fn bpf_counters(&self) -> BTreeMap<String, u64> {
        self.capture.counters()
    }

    fn bpf_maps(&self) -> Vec<(&'static str, usize, usize)> {
        self.capture.map_sizes()
    }

    fn plaintext_left(&self) -> usize {
        self.capture.unswept().len()
    }

    fn bpf_shares(&self) -> Vec<Share> {
        self.capture.shares()
    }

    fn capture_problems(&self) -> Vec<String> {
        self.capture.problems()
    }

    fn interfaces(&self) -> Vec<InterfaceGuard> {
        self.capture.pods().into_iter().flat_map(|pod| self.capture.interfaces(pod.id)).collect()
    }

    fn pods(&self) -> Vec<PodStatus> {
        self.reconciler.pods()
    }

    fn disputed_addresses(&self) -> usize {
        self.cluster.as_ref().map_or(0, Statuses::disputed_addresses)
    }

    fn applied(&self) -> Applied {
        self.reconciler.applied()
    }

    fn reload(&self) -> ReloadStatus {
        self.reload.status()
    }

    fn cluster(&self) -> Option<SourceStatus> {
        self.cluster.as_ref().map(Statuses::status)
    }

    fn relay(&self) -> Vec<ThreadHealth> {
        self.relay.health()
    }
}

impl StatusProvider for NodeStatus {
    fn status(&self) -> Status {
        let pods = self.reconciler.pods().into_iter().map(|pod| {
            let svid = pod.identity.as_ref().and_then(|identity| self.certificates.current(identity));
            let (state, pod_id, reason) = match pod.state {
                PodState::Enrolled { pod_id } => (api::PodState::Enrolled, Some(pod_id), None),
                PodState::Refused { reason } => (api::PodState::Refused, None, Some(reason)),
                PodState::Kept { pod_id, reason } => (api::PodState::Kept, Some(pod_id), Some(reason.to_string())),
            };
            api::PodStatus {
                workload: pod.key.to_string(),
                identity: pod.identity.map_or_else(String::new, |identity| identity.to_string()),
                netns: pod.netns.display().to_string(),
                pod_id,
                state,
                reason,
                certificate: svid.map(|s| CertificateStatus::new(&s.serial, s.not_before, s.not_after)),
            }
        });
        let interfaces = self.capture.pods().into_iter().flat_map(|pod| {
            let guards = self.capture.interfaces(pod.id).into_iter();
            guards.map(move |guard| api::InterfaceStatus { workload: pod.key.to_string(), guard })
        });
        let interfaces = interfaces.collect();
        let status = Status::new(KtlsStatus::of(&self.ktls), pods.collect(), self.reload.status());
        let probe_cgroups = self.capture.probe_cgroups().into_iter().map(Into::into).collect();
        let cluster = self.cluster.as_ref().map(Statuses::status);
        let probe_node_addresses = self.capture.probe_node_addresses();
        let plaintext_left = self.capture.unswept().into_iter().map(Into::into).collect();
        let revocation = self.revocations.status();
        let error = self.reconciler.applied().error.map(|error| format!("not all could be written: {error}"));
        let capture_problems = error.into_iter().chain(self.capture.problems()).collect();
        Status {
            probe_cgroups,
            probe_node_addresses,
            plaintext_left,
            capture_problems,
            interfaces,
            cluster,
            revocation,
            ..status
        }
    }

    fn bpf_counters(&self) -> BTreeMap<String, u64> {
        self.capture.counters()
    }

    fn certificate_source(&self) -> &'static str {
        self.certificates.source()
    }

    fn certificate(&self, identity: &SpiffeId) -> Option<CertificateDetails> {
        self.certificates.current(identity).map(|svid| svid.describe().into())
    }
}
