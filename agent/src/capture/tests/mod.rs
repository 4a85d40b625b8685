//! Tests of the whole: pure ones, and ones with real programs in cgroups, pin directories and namespaces of their own.
//! These need root.

mod cleanup;
mod desired;
mod enrol;
mod kept;
mod lab;
mod logs;
mod netkit;
mod node_guard;
mod overflow;
mod pins;
mod probes;
mod restart;
mod scale;
mod scene;
mod start;
mod sweeps;
mod table;

use crate::mesh::{Exclusions, InboundMode, LocalPod, PodNamespace, Protocol, Workload, WorkloadKey};

/// A workload with one address; local when it has a namespace.
fn workload(name: &str, address: &str, netns: Option<&str>) -> Workload {
    Workload {
        key: WorkloadKey { namespace: "default".into(), name: name.into() },
        identity: format!("spiffe://cluster.local/ns/default/sa/{name}").parse().unwrap(),
        node: "node".into(),
        addresses: vec![address.parse().unwrap()],
        protocol: Protocol::Underpass,
        mode: InboundMode::Permissive,
        port_modes: Vec::new(),
        local: netns.map(|netns| LocalPod {
            uid: None,
            netns: PodNamespace::at(netns.into()),
            cgroup: None,
            exclude: Exclusions::default(),
            capture_all: false,
            probe_ports: Vec::new(),
            files: None,
        }),
    }
}
