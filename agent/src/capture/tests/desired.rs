use std::sync::Arc;

use proptest::prelude::*;
use underpass_abi::{
    DIRECTION_INBOUND, DIRECTION_OUTBOUND, DIRECTION_PROBE, POD_CAPTURE_ALL, POD_SILENT, POD_STRICT, PORT_EXCLUDED,
    PORT_PERMISSIVE, PORT_PROBE, PORT_STRICT, TUNNEL_PORT,
};

use super::{
    super::desired::{
        ALL_PODS, Everywhere, MeshState, PortSlot, Strictness, address, excluded_prefix, mesh, mesh_changes,
        mesh_prefix, pod,
    },
    workload,
};
use crate::mesh::{
    Exclusions, InboundMode, MeshSettings, PlaintextRefusal, PortMode, Service, ServicePort, Snapshot, SnapshotBuilder,
    Workload,
};

fn nets(list: &[&str]) -> Vec<ipnet::IpNet> {
    list.iter().map(|n| n.parse().unwrap()).collect()
}

fn state(settings: MeshSettings, workloads: Vec<Workload>) -> MeshState {
    let mut builder = SnapshotBuilder::new("node", "cluster.local".parse().unwrap(), settings);
    for w in workloads {
        builder.workload(w).unwrap();
    }
    builder
        .service(Service {
            namespace: "default".into(),
            name: "web".into(),
            hostname: "web.default.svc.cluster.local".into(),
            vips: vec!["10.96.0.10".parse().unwrap()],
            ports: vec![ServicePort { port: 80, target_port: 8080 }],
            endpoints: Vec::new(),
            awaited: None,
        })
        .unwrap();
    mesh(&builder.build())
}

/// What a longest-prefix match finds, as the kernel's trie would.
fn lookup(state: &MeshState, ip: &str) -> Option<u32> {
    let key = address(ip.parse().unwrap());
    let bit = |bytes: &[u8; 16], n: u32| bytes[n as usize / 8] >> (7 - n % 8) & 1;
    state
        .mesh
        .iter()
        .filter(|(p, _)| (0..p.bits).all(|n| bit(&p.bytes, n) == bit(&key, n)))
        .max_by_key(|(p, _)| p.bits)
        .map(|(_, e)| e.flags)
}

#[test]
fn addresses_vips_and_cidrs_are_captured() {
    let mut remote = workload("web", "10.0.1.1", None);
    remote.addresses.push("2001:db8::1".parse().unwrap());
    let settings = MeshSettings { cidrs: nets(&["10.244.3.7/16"]), ..MeshSettings::default() };
    let state = state(settings, vec![remote]);
    let keys: Vec<_> = state.mesh.keys().copied().collect();
    let mut expected: Vec<_> = nets(&["10.0.1.1/32", "2001:db8::1/128", "10.96.0.10/32", "10.244.0.0/16"])
        .into_iter()
        .map(mesh_prefix)
        .collect();
    expected.sort();
    assert_eq!(keys, expected);
    assert_eq!(expected.iter().map(|p| p.bits).max(), Some(128));
    assert!(expected.iter().any(|p| p.bits == 96 + 16 && p.bytes[10..14] == [0xff, 0xff, 10, 244]));
    for (ip, flags) in [("10.0.1.1", Some(1)), ("10.244.9.9", Some(1)), ("10.0.1.2", None), ("2001:db8::2", None)] {
        assert_eq!(lookup(&state, ip), flags, "{ip}");
    }
}

#[test]
fn a_short_ipv6_prefix_is_not_ipv4() {
    let settings = |cidrs: &[&str]| MeshSettings { cidrs: nets(cidrs), ..MeshSettings::default() };
    for short in ["::/0", "::/80", "::fffe:0:0/95"] {
        let state = state(settings(&[short]), vec![workload("web", "10.0.1.1", None)]);
        assert_eq!(lookup(&state, "8.8.8.8"), Some(0), "{short}");
        assert_eq!(lookup(&state, "10.0.1.1"), Some(1), "{short}: addresses of the mesh stay captured");
    }
    assert_eq!(lookup(&state(settings(&["::/0"]), vec![]), "2001:db8::1"), Some(1));
    let both = state(settings(&["::/0", "0.0.0.0/0"]), vec![]);
    assert_eq!(lookup(&both, "8.8.8.8"), Some(1), "IPv4 is captured when it is asked for");
    let elsewhere = state(settings(&["2001:db8::/32"]), vec![]);
    assert_eq!(elsewhere.mesh.len(), 2, "no hole where none is needed");
}

#[test]
fn mesh_wide_exclusions_are_under_no_pod() {
    let exclude = Exclusions {
        outbound_ports: vec![53],
        outbound_cidrs: nets(&["169.254.169.254/32", "2001:db8:ffff::/48"]),
        inbound_ports: vec![9090],
    };
    let state = state(MeshSettings { exclude, capture_all: true, ..MeshSettings::default() }, vec![]);
    assert!(state.everywhere.capture_all);
    let cidrs = nets(&["169.254.169.254/32", "2001:db8:ffff::/48"]);
    assert_eq!(state.rules.excluded.len(), 2);
    for net in cidrs {
        assert!(state.rules.excluded.contains_key(&excluded_prefix(ALL_PODS, net)), "{net}");
    }
    assert!(state.rules.ports.keys().all(|s| s.pod_id == ALL_PODS));
    assert!(state.rules.ports.values().all(|r| r.action == PORT_EXCLUDED));
    assert_eq!(state.rules.ports.len(), 2);
}

#[test]
fn exclusion_keys_start_with_the_pod_in_network_order() {
    let key = excluded_prefix(0x0102_0304, "10.0.0.0/8".parse().unwrap());
    assert_eq!(key.bits, 32 + 96 + 8);
    assert_eq!(key.bytes[..4], [1, 2, 3, 4]);
    assert_eq!(key.bytes[4..], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 0]);
    assert_eq!(excluded_prefix(1, "2001:db8::/32".parse().unwrap()).bits, 32 + 32);
}

#[test]
fn a_pod_gets_its_first_addresses_and_flags() {
    let mut w = workload("web", "10.0.1.1", Some("/run/netns/web"));
    w.addresses.extend(["10.0.1.2", "2001:db8::1"].map(|a| a.parse::<std::net::IpAddr>().unwrap()));
    let local = w.local.clone().unwrap();
    let plain = pod(3, &w, &local, None, Everywhere::default());
    assert_eq!((plain.config.pod_id, plain.config.flags), (3, 0));
    assert_eq!(plain.config.addr4, address("10.0.1.1".parse().unwrap()));
    assert_eq!(plain.config.addr6, address("2001:db8::1".parse().unwrap()));
    assert!(plain.rules.ports.is_empty() && plain.rules.excluded.is_empty());

    w.mode = InboundMode::Strict;
    w.addresses.truncate(2);
    assert_eq!(pod(3, &w, &local, None, EVERYTHING).config.flags, POD_STRICT | POD_CAPTURE_ALL);
    assert_eq!(pod(3, &w, &local, None, EVERYTHING).config.addr6, [0; 16]);
    let settings = MeshSettings { plaintext_refusal: PlaintextRefusal::Drop, ..MeshSettings::default() };
    let silent = state(settings, vec![]).everywhere;
    assert_eq!(pod(3, &w, &local, None, silent).config.flags, POD_STRICT | POD_SILENT);
}

const EVERYTHING: Everywhere = Everywhere { capture_all: true, silent: false };

#[test]
fn port_rules_follow_modes_and_exclusions() {
    let mut w = workload("web", "10.0.1.1", Some("/run/netns/web"));
    w.mode = InboundMode::Strict;
    let mode = |port, mode| PortMode { port, mode };
    w.port_modes = vec![
        mode(80, InboundMode::Permissive),
        mode(80, InboundMode::Strict), // the first one counts, as everywhere
        mode(81, InboundMode::Strict),
        mode(82, InboundMode::Strict),
        mode(TUNNEL_PORT, InboundMode::Permissive),
    ];
    let mut local = w.local.clone().unwrap();
    local.probe_ports = vec![80, 15001];
    local.exclude = Exclusions {
        outbound_ports: vec![5432],
        outbound_cidrs: nets(&["10.9.0.0/16"]),
        inbound_ports: vec![82, 15001],
    };
    let state = pod(3, &w, &local, None, Everywhere::default());
    let slot = |direction, port| PortSlot { pod_id: 3, direction, port };
    let rules: Vec<_> = state.rules.ports.iter().map(|(s, r)| (*s, r.action)).collect();
    assert_eq!(
        rules,
        [
            (slot(DIRECTION_OUTBOUND, 5432), PORT_EXCLUDED),
            (slot(DIRECTION_INBOUND, 80), PORT_PERMISSIVE),
            (slot(DIRECTION_INBOUND, 81), PORT_STRICT),
            (slot(DIRECTION_INBOUND, 82), PORT_EXCLUDED),
            (slot(DIRECTION_PROBE, 80), PORT_PROBE),
        ],
        "the agent's ports take no rules"
    );
    assert_eq!(state.rules.excluded.len(), 1);
}

#[test]
fn strictness_is_that_of_the_programs() {
    let mut w = workload("web", "10.0.1.1", Some("/run/netns/web"));
    let local = w.local.clone().unwrap();
    let exclude = Exclusions { inbound_ports: vec![9090, 9091], ..Exclusions::default() };
    let everyone = state(MeshSettings { exclude, ..MeshSettings::default() }, vec![]).rules;
    let strictness = |w: &Workload| {
        let state = pod(1, w, &local, None, Everywhere::default());
        Strictness::new(&state.config, &state.rules, &everyone)
    };
    let permissive = strictness(&w);
    assert!(!permissive.refuses(80) && !permissive.refuses(9090));

    w.port_modes = vec![PortMode { port: 80, mode: InboundMode::Strict }];
    let one_port = strictness(&w);
    assert!(one_port.refuses(80) && !one_port.refuses(81));
    assert!(one_port.tightens(&permissive) && !permissive.tightens(&one_port));

    w.mode = InboundMode::Strict;
    w.port_modes =
        vec![PortMode { port: 80, mode: InboundMode::Permissive }, PortMode { port: 9091, mode: InboundMode::Strict }];
    let strict = strictness(&w);
    assert!(strict.refuses(81) && !strict.refuses(80));
    assert!(!strict.refuses(9090), "excluded for everyone");
    assert!(strict.refuses(9091), "a pod's own rule wins");
    assert!(strict.tightens(&one_port));
    assert!(!strict.tightens(&strict));

    let without = Strictness::new(
        &pod(1, &w, &local, None, Everywhere::default()).config,
        &pod(1, &w, &local, None, Everywhere::default()).rules,
        &Arc::default(),
    );
    assert!(without.tightens(&strict), "an exclusion that goes away");
}

/// Workloads at addresses by their number, on top of a snapshot or of nothing.
fn at(numbers: &[u8], over: Option<&Snapshot>, settings: &MeshSettings) -> Snapshot {
    let name = |n: u8| (format!("w{n}"), format!("10.0.0.{n}"));
    let mut builder = match over {
        Some(snapshot) => SnapshotBuilder::amend(snapshot.clone()),
        None => SnapshotBuilder::new("node", "cluster.local".parse().unwrap(), settings.clone()),
    };
    for n in 1..=20 {
        let new = workload(&name(n).0, &name(n).1, None);
        let (is, wanted) = (builder.so_far().workload(&new.key).is_some(), numbers.contains(&n));
        if is && !wanted {
            builder.remove_workload(&new.key);
        } else if wanted && !is {
            builder.workload(new).unwrap();
        }
    }
    builder.build()
}

proptest! {
    #[test]
    fn changes_of_the_mesh_lead_from_one_state_to_the_other(
        before in proptest::collection::vec(1u8..=20, 0..20),
        after in proptest::collection::vec(1u8..=20, 0..20),
        amended in any::<bool>(),
    ) {
        // One network is exactly an address that comes and goes.
        let settings = MeshSettings { cidrs: nets(&["10.0.0.7/32", "10.1.0.0/16"]), ..MeshSettings::default() };
        let before = at(&before, None, &settings);
        let after = at(&after, amended.then_some(&before), &settings);
        let mut changed = mesh(&before).mesh;
        for (prefix, entry) in mesh_changes(&before, &after).unwrap() {
            match entry {
                Some(entry) => drop(changed.insert(prefix, entry)),
                None => drop(changed.remove(&prefix)),
            }
        }
        prop_assert_eq!(changed, mesh(&after).mesh);
        let other = MeshSettings { capture_all: true, ..settings };
        prop_assert!(mesh_changes(&before, &at(&[], None, &other)).is_none());
    }
}
