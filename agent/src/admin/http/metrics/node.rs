//! The node: pods, certificates, configuration, BPF.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use prometheus_client::encoding::DescriptorEncoder;

use super::{
    super::{View, health},
    encode::{NONE, counter, gauge},
};
use crate::{capture::Reason, proxy::PodState};

pub(super) fn encode(to: &mut DescriptorEncoder<'_>, view: &View) -> fmt::Result {
    gauge(to, "underpass_build_info", "The running agent", [([("version", env!("CARGO_PKG_VERSION"))], 1_u64)])?;
    let conditions = health::conditions(view);
    gauge(
        to,
        "underpass_ready",
        "Conditions of readiness: 1 when met",
        conditions.iter().map(|c| ([("condition", c.name)], u64::from(c.ready))),
    )?;
    let pods = view.node.pods();
    let enrolled = pods.iter().filter(|p| matches!(p.state, PodState::Enrolled { .. })).count();
    let refused = pods.iter().filter(|p| matches!(p.state, PodState::Refused { .. })).count();
    let kept = |why| pods.iter().filter(|p| matches!(p.state, PodState::Kept { reason, .. } if reason == why)).count();
    gauge(
        to,
        "underpass_pods",
        "Pods of this node that the configuration enrols",
        [([("state", "enrolled")], enrolled), ([("state", "refused")], refused)],
    )?;
    gauge(
        to,
        "underpass_kept_pods",
        "Pods that vanished without leaving the mesh: captured, and every connection is refused",
        Reason::ALL.map(|reason| ([("reason", reason.as_str())], kept(reason))),
    )?;
    gauge(
        to,
        "underpass_disputed_addresses",
        "Addresses that several Kubernetes objects claim; each stays with the object that has it",
        [(NONE, view.node.disputed_addresses())],
    )?;
    certificates(to, view)?;
    configuration(to, view)?;
    cluster(to, view)?;
    bpf(to, view)
}

fn certificates(to: &mut DescriptorEncoder<'_>, view: &View) -> fmt::Result {
    let (wanted, current, now) = (view.certificates.wanted(), view.certificates.all(), SystemTime::now());
    let held = || wanted.iter().filter_map(|id| Some((id.to_string(), current.get(id)?)));
    gauge(
        to,
        "underpass_certificate_expiry_timestamp_seconds",
        "When the certificate of a local identity ends, seconds since 1970",
        held().map(|(id, svid)| ([("identity", id)], since_epoch(svid.not_after).as_secs_f64())),
    )?;
    gauge(
        to,
        "underpass_certificate_start_timestamp_seconds",
        "When it began",
        held().map(|(id, svid)| ([("identity", id)], since_epoch(svid.not_before).as_secs_f64())),
    )?;
    let missing = wanted.iter().filter(|id| current.get(id).is_none_or(|svid| !svid.valid_at(now))).count();
    gauge(to, "underpass_certificates_missing", "Local identities without a valid certificate", [(NONE, missing)])
}

fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

fn configuration(to: &mut DescriptorEncoder<'_>, view: &View) -> fmt::Result {
    let (reload, applied) = (view.node.reload(), view.node.applied());
    gauge(
        to,
        "underpass_configuration_generation",
        "Number of the configuration",
        [([("state", "accepted")], view.mesh.load().generation), ([("state", "applied")], applied.generation)],
    )?;
    counter(
        to,
        "underpass_configuration_reloads",
        "Configurations read",
        [([("result", "accepted")], reload.accepted), ([("result", "rejected")], reload.rejected)],
    )?;
    let current = reload.error.is_none() && !reload.from_last_good && applied.error.is_none();
    gauge(
        to,
        "underpass_configuration_current",
        "1 when the configuration in force is the one that the source has now, 0 when that one is refused or not there",
        [(NONE, u64::from(current))],
    )
}

fn cluster(to: &mut DescriptorEncoder<'_>, view: &View) -> fmt::Result {
    let Some(cluster) = view.node.cluster() else { return Ok(()) };
    let names: Vec<String> = cluster.kinds.iter().map(|k| format!("{:?}", k.kind)).collect();
    let kinds = || names.iter().zip(&cluster.kinds);
    gauge(
        to,
        "underpass_source_kind_current",
        "1 when the objects of a kind in force are those that the API server has, 0 when an earlier state is kept",
        kinds().map(|(name, k)| ([("kind", name.clone())], u64::from(k.synced && k.error.is_none()))),
    )?;
    gauge(
        to,
        "underpass_source_objects",
        "Objects of a kind that count",
        kinds().map(|(name, k)| ([("kind", name.clone())], k.objects)),
    )
}

fn bpf(to: &mut DescriptorEncoder<'_>, view: &View) -> fmt::Result {
    let counters = view.node.bpf_counters();
    counter(
        to,
        "underpass_bpf_events",
        "What the BPF programs did and refused",
        counters.into_iter().map(|(name, n)| ([("event", name)], n)),
    )?;
    gauge(
        to,
        "underpass_plaintext_left",
        "Pods with plaintext connections that are forbidden and could not be ended yet",
        [(NONE, view.node.plaintext_left())],
    )?;
    let interfaces = view.node.interfaces();
    let guarded = interfaces.iter().filter(|interface| interface.node_guard.is_some()).count();
    gauge(
        to,
        "underpass_pod_interfaces",
        "Interfaces by which packets leave enrolled pods, by whether the node's side of them is guarded too",
        [([("node_guard", "yes")], guarded), ([("node_guard", "no")], interfaces.len() - guarded)],
    )?;
    let maps = view.node.bpf_maps();
    gauge(
        to,
        "underpass_bpf_map_entries",
        "Entries of a BPF map",
        maps.iter().map(|(name, entries, _)| ([("map", *name)], *entries)),
    )?;
    gauge(
        to,
        "underpass_bpf_map_max_entries",
        "Room for entries in a BPF map",
        maps.iter().map(|(name, _, room)| ([("map", *name)], *room)),
    )?;
    let shares = view.node.bpf_shares();
    gauge(
        to,
        "underpass_bpf_map_fullest_pod_entries",
        "Entries of the pod that has most of them in a BPF map that pods share",
        shares.iter().map(|share| ([("map", share.map)], share.fullest.map_or(0, |(_, entries)| entries))),
    )?;
    gauge(
        to,
        "underpass_bpf_map_pod_limit",
        "How many entries one pod may have now in a BPF map that pods share",
        shares.iter().map(|share| ([("map", share.map)], share.limit)),
    )?;
    gauge(
        to,
        "underpass_capture_problems",
        "What is enforced more strictly than it is written because it does not fit into the BPF maps; see the status",
        [(NONE, view.node.capture_problems().len())],
    )
}
