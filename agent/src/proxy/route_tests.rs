use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{Plan, Target, plan};
use crate::{
    mesh::{
        Endpoint, Held, InboundMode, MeshSettings, Protocol, Service, ServicePort, Snapshot, SnapshotBuilder, SpiffeId,
        Workload, WorkloadKey,
    },
    telemetry::RefusalReason,
};

fn workload(name: &str, addresses: &[&str], protocol: Protocol) -> Workload {
    Workload {
        key: WorkloadKey { namespace: "default".into(), name: name.into() },
        identity: identity(name),
        node: "node-b".into(),
        addresses: addresses.iter().map(|a| a.parse().expect("address")).collect(),
        protocol,
        mode: InboundMode::Permissive,
        port_modes: Vec::new(),
        local: None,
    }
}

fn identity(name: &str) -> SpiffeId {
    SpiffeId::new("cluster.local".parse().expect("trust domain"), "default", name).expect("identity")
}

fn mesh() -> Snapshot {
    let mut b = SnapshotBuilder::new("node-a", "cluster.local".parse().expect("td"), MeshSettings::default());
    let endpoints = [
        workload("one", &["10.0.0.1", "fd00::1"], Protocol::Underpass),
        workload("two", &["10.0.0.2"], Protocol::Underpass),
        workload("three", &["10.0.0.3"], Protocol::Underpass),
    ]
    .map(|w| Endpoint { workload: b.workload(w).expect("workload"), ports: Vec::new() });
    b.workload(workload("legacy", &["10.0.0.9"], Protocol::Plain)).expect("workload");
    let service = |name: &str, vip: &str, endpoints: Vec<Endpoint>| Service {
        namespace: "default".into(),
        name: name.into(),
        hostname: format!("{name}.default.svc.cluster.local").into(),
        vips: vec![vip.parse().expect("vip")],
        ports: vec![ServicePort { port: 80, target_port: 8080 }],
        endpoints,
        awaited: None,
    };
    b.service(service("web", "10.96.0.1", endpoints.to_vec())).expect("service");
    b.service(service("empty", "10.96.0.2", Vec::new())).expect("service");
    b.build()
}

fn at(address: &str) -> SocketAddr {
    address.parse().expect("socket address")
}

fn tunnel(name: &str, to: &str) -> Plan {
    Plan { targets: vec![Target::Tunnel { identity: identity(name), destination: at(to) }], service: None }
}

#[test]
fn a_workload_address_goes_through_the_tunnel_to_exactly_that_workload() {
    assert_eq!(plan(&mesh(), at("10.0.0.2:5432")), Ok(tunnel("two", "10.0.0.2:5432")));
    assert_eq!(plan(&mesh(), at("[fd00::1]:5432")), Ok(tunnel("one", "[fd00::1]:5432")));
    assert_eq!(plan(&mesh(), at("[::ffff:10.0.0.2]:5432")), Ok(tunnel("two", "10.0.0.2:5432")));
}

#[test]
fn unknown_and_plain_destinations_pass_through() {
    let plain = |to| Ok(Plan { targets: vec![Target::Plain(at(to))], service: None });
    assert_eq!(plan(&mesh(), at("192.0.2.1:443")), plain("192.0.2.1:443"));
    assert_eq!(plan(&mesh(), at("10.0.0.9:5432")), plain("10.0.0.9:5432"));
}

#[test]
fn a_vip_yields_two_different_endpoints_and_over_time_all_of_them() {
    let mesh = mesh();
    let mut seen = BTreeSet::<IpAddr>::new();
    for _ in 0..200 {
        let p = plan(&mesh, at("10.96.0.1:80")).expect("plan");
        assert_eq!(p.service, Some(Arc::from("web.default.svc.cluster.local")));
        assert_eq!(p.targets.len(), 2);
        assert_ne!(p.targets[0], p.targets[1]);
        let Target::Tunnel { destination, .. } = &p.targets[0] else { panic!("{p:?}") };
        assert_eq!(destination.port(), 8080);
        seen.insert(destination.ip());
    }
    assert_eq!(seen.len(), 3);
}

#[test]
fn refusals_say_why() {
    assert_eq!(plan(&mesh(), at("10.96.0.2:80")), Err(RefusalReason::NoEndpoint));
    assert_eq!(plan(&mesh(), at("10.96.0.1:81")), Err(RefusalReason::NoEndpoint), "a port the service does not have");
    for port in [15001, 15006, 15008, 15053, 15101] {
        assert_eq!(plan(&mesh(), at(&format!("10.0.0.1:{port}"))), Err(RefusalReason::AgentPort));
    }
}

#[test]
fn nothing_of_the_mesh_is_dialled_in_plaintext() {
    let mut b = SnapshotBuilder::amend(mesh());
    let pod = |name: &str| WorkloadKey { namespace: "default".into(), name: name.into() };
    b.settings().exclude.outbound_ports = vec![5432];
    b.settings().exclude.outbound_cidrs = vec!["10.0.0.3/32".parse().expect("a network")];
    assert!(b.hold("10.0.0.20".parse().expect("ip"), Held { pod: pod("lost"), awaited: false }));
    assert!(b.hold("10.0.0.21".parse().expect("ip"), Held { pod: pod("new"), awaited: true }));
    // A workload or service that has the address as well decides.
    assert!(b.hold("10.0.0.1".parse().expect("ip"), Held { pod: pod("lost"), awaited: false }));
    let service = Service {
        namespace: "default".into(),
        name: "awaited".into(),
        hostname: "awaited.default.svc.cluster.local".into(),
        vips: vec!["10.96.0.3".parse().expect("vip")],
        ports: vec![ServicePort { port: 80, target_port: 8080 }],
        endpoints: Vec::new(),
        awaited: Some("Pod default/new at 10.0.0.21".into()),
    };
    b.service(service).expect("service");
    let mesh = b.build();
    assert_eq!(plan(&mesh, at("10.0.0.20:80")), Err(RefusalReason::PlaintextToMesh));
    assert_eq!(plan(&mesh, at("10.0.0.21:80")), Err(RefusalReason::EndpointUnknown));
    assert_eq!(plan(&mesh, at("10.96.0.3:80")), Err(RefusalReason::EndpointUnknown));
    assert_eq!(plan(&mesh, at("10.0.0.1:80")), Ok(tunnel("one", "10.0.0.1:80")));
    let captured: BTreeSet<IpAddr> = mesh.captured_addresses().collect();
    assert_eq!(captured.len(), mesh.captured_addresses().count());
    for (to, allowed) in [
        ("10.0.0.1:80", false),
        ("[fd00::1]:80", false),
        ("[::ffff:10.0.0.2]:80", false),
        ("10.0.0.20:80", false),
        ("10.0.0.21:80", false),
        ("10.96.0.1:80", false),
        ("10.0.0.2:5432", true),
        ("10.0.0.3:80", true),
        ("10.0.0.9:80", true),
        ("192.0.2.1:80", true),
    ] {
        assert_eq!(mesh.allows_plaintext(&pod("one"), at(to)), allowed, "{to}");
        assert!(to.starts_with("192.") || mesh.captures(at(to).ip().to_canonical()), "{to}");
    }
}
