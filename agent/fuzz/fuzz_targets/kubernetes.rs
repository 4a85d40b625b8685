//! Objects of the Kubernetes API: whatever they hold becomes a snapshot that can be projected, or is refused.
#![no_main]

use std::{collections::HashSet, net::IpAddr};

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use underpass::{
    mesh::{MeshSettings, Protocol, Snapshot, SnapshotBuilder},
    sources::kubernetes::manifests::compile,
};

fn base() -> Snapshot {
    let settings = MeshSettings { root_namespace: "istio-system".into(), ..MeshSettings::default() };
    SnapshotBuilder::new("node-a", "cluster.local".parse().expect("a trust domain"), settings).build()
}

fn dialable(address: &IpAddr) -> bool {
    !(address.is_loopback() || address.is_unspecified() || address.is_multicast())
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(objects) = serde_json::from_slice::<Vec<Value>>(bytes) else { return };
    let Ok((snapshot, _)) = compile(&base(), "cluster.local", objects) else { return };
    for workload in snapshot.workloads() {
        assert!(workload.addresses.iter().all(dialable), "{workload:?}");
        assert!(workload.local.is_none(), "no pod is on this node: {workload:?}");
    }
    let of_the_mesh: HashSet<_> = snapshot
        .workloads()
        .filter(|workload| workload.protocol == Protocol::Underpass)
        .flat_map(|workload| &workload.addresses)
        .collect();
    for service in snapshot.services() {
        assert!(service.vips.iter().all(dialable), "{service:?}");
        let plain = service.endpoints.iter().filter(|endpoint| endpoint.workload.protocol == Protocol::Plain);
        let mut dialled = plain.flat_map(|endpoint| &endpoint.workload.addresses);
        assert!(dialled.all(|address| !of_the_mesh.contains(address)), "plaintext to the mesh: {service:?}");
    }
});
