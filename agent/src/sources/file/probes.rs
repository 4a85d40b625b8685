//! `probes` of the document: how the kubelet's probes are recognised.

use std::{net::IpAddr, path::PathBuf};

use serde_saphyr::Spanned;
use underpass_abi::{PROBE_CGROUP_LEVELS, capacity};

use super::{
    ConfigError,
    fields::Check,
    schema::{Document, Workload},
    yaml::quoted,
};
use crate::mesh::ProbeSettings;

/// Part of the names of the cgroups that pods are in, with every cgroup driver (`kubepods`, `kubepods.slice`) and on nodes
/// that are containers (`kubelet-kubepods.slice`).
const PODS: &str = "kubepods";

/// Checks the section, and that somebody can use the workloads' probe ports.
pub(super) fn settings(check: Check<'_>, document: &Document) -> Result<ProbeSettings, ConfigError> {
    let Document { probes, workloads, .. } = document;
    let list = |name: &'static str, most| List { check, name, most };
    let settings = ProbeSettings {
        cgroups: list("probes.cgroups", capacity::PROBE_CGROUPS).parse(&probes.cgroups, cgroup)?,
        node_addresses: list("probes.nodeAddresses", capacity::NODE_ADDRESSES)
            .parse(&probes.node_addresses, node_address)?,
        from_node_addresses: probes.from_node_addresses.as_ref().is_some_and(|set| set.value),
    };
    if let Some(set) = probes.from_node_addresses.as_ref().filter(|set| set.value)
        && settings.node_addresses.is_empty()
        && document.kubernetes.is_none()
    {
        let problem = "only the Kubernetes API tells the node's addresses; list them in probes.nodeAddresses";
        return Err(check.wrong(set, "probes.fromNodeAddresses", problem.to_owned()));
    }
    if settings.node_addresses.is_empty() && settings.cgroups.is_empty() {
        let ports = |w: &'_ Spanned<Workload>| Some(w.value.enroll.as_ref()?.value.probe_ports.first()?.clone());
        if let Some((i, port)) = workloads.iter().enumerate().find_map(|(i, w)| Some((i, ports(w)?))) {
            let problem = format!(
                "port {} is for the kubelet, and nothing says how the kubelet is recognised; list its cgroup in probes.cgroups",
                port.value
            );
            return Err(check.wrong(&port, &format!("workloads[{i}].enroll.probePorts[0]"), problem));
        }
    }
    Ok(settings)
}

/// A list with room for a few distinct values.
struct List<'a> {
    check: Check<'a>,
    name: &'static str,
    /// What the BPF map holds.
    most: usize,
}

impl List<'_> {
    fn parse<T: PartialEq>(
        &self,
        values: &[Spanned<String>],
        value: impl Fn(Check<'_>, &str, &Spanned<String>) -> Result<T, ConfigError>,
    ) -> Result<Vec<T>, ConfigError> {
        let Self { check, name, most } = *self;
        let mut parsed = Vec::with_capacity(values.len().min(most));
        for (i, text) in values.iter().enumerate() {
            let field = format!("{name}[{i}]");
            if i >= most {
                return Err(check.wrong(text, &field, format!("at most {most} entries are taken; remove the others")));
            }
            let new = value(check, &field, text)?;
            if parsed.contains(&new) {
                return Err(check.wrong(text, &field, format!("{} is listed twice; remove one", quoted(&text.value))));
            }
            parsed.push(new);
        }
        Ok(parsed)
    }
}

/// What is wrong about it on a particular node, such as being above the pods' cgroups, is seen by who attaches there.
fn cgroup(check: Check<'_>, field: &str, text: &Spanned<String>) -> Result<PathBuf, ConfigError> {
    let path = check.path(field, text)?;
    let value = quoted(&text.value);
    let levels = path.components().count() - 1;
    if levels == 0 {
        let problem =
            format!("{value} holds every process; name the kubelet's own cgroup, like /system.slice/kubelet.service");
        return Err(check.wrong(text, field, problem));
    }
    if levels > PROBE_CGROUP_LEVELS as usize {
        let problem =
            format!("{value} is {levels} levels deep, and {PROBE_CGROUP_LEVELS} are looked at; name one above it");
        return Err(check.wrong(text, field, problem));
    }
    if path.components().any(|c| c.as_os_str().as_encoded_bytes().windows(PODS.len()).any(|w| w == PODS.as_bytes())) {
        let problem = format!(
            "{value} holds pods, and none of them is exempt; name the kubelet's own cgroup, like /system.slice/kubelet.service"
        );
        return Err(check.wrong(text, field, problem));
    }
    Ok(path)
}

fn node_address(check: Check<'_>, field: &str, text: &Spanned<String>) -> Result<IpAddr, ConfigError> {
    let address = check.address(field, text)?;
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
        let problem = format!(
            "{} is no address that packets of the node have in a pod; write one of the node's addresses",
            quoted(&text.value)
        );
        return Err(check.wrong(text, field, problem));
    }
    Ok(address)
}
