//! The model: building, looking up, replacing.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use proptest::prelude::*;

use super::*;

fn ip(s: &str) -> IpAddr {
    s.parse().unwrap()
}

fn to(s: &str) -> SocketAddr {
    s.parse().unwrap()
}

fn trust_domain() -> TrustDomain {
    "cluster.local".parse().unwrap()
}

fn builder() -> SnapshotBuilder {
    SnapshotBuilder::new("node-a", trust_domain(), MeshSettings::default())
}

fn workload(name: &str, addresses: &[&str]) -> Workload {
    Workload {
        key: WorkloadKey { namespace: "default".into(), name: name.into() },
        identity: SpiffeId::new(trust_domain(), "default", name).unwrap(),
        node: "node-a".into(),
        addresses: addresses.iter().map(|a| ip(a)).collect(),
        protocol: Protocol::Underpass,
        mode: InboundMode::Permissive,
        port_modes: Vec::new(),
        local: None,
    }
}

fn local() -> LocalPod {
    LocalPod {
        uid: None,
        netns: PodNamespace::at("/run/netns/x".into()),
        cgroup: None,
        exclude: Exclusions::default(),
        capture_all: false,
        probe_ports: Vec::new(),
        files: None,
    }
}

fn service(name: &str, vips: &[&str], ports: &[(u16, u16)], endpoints: Vec<Endpoint>) -> Service {
    Service {
        namespace: "default".into(),
        name: name.into(),
        hostname: format!("{name}.default.svc.cluster.local").into(),
        vips: vips.iter().map(|a| ip(a)).collect(),
        ports: ports.iter().map(|&(port, target_port)| ServicePort { port, target_port }).collect(),
        endpoints,
        awaited: None,
    }
}

#[test]
fn addresses_and_vips_resolve() {
    let mut b = builder();
    let web = b.workload(workload("web", &["10.0.0.1", "fd00::1"])).unwrap();
    b.service(service("web", &["10.96.0.1"], &[(80, 8080)], vec![Endpoint { workload: web, ports: vec![] }])).unwrap();
    let s = b.build();
    for address in ["10.0.0.1", "fd00::1", "::ffff:10.0.0.1"] {
        let Resolution::Workload(w) = s.resolve(ip(address)) else { panic!("{address}: {:?}", s.resolve(ip(address))) };
        assert_eq!(&*w.key.name, "web");
        assert!(s.workload_at(ip(address)).is_some());
    }
    for address in ["10.96.0.1", "::ffff:10.96.0.1"] {
        assert!(matches!(s.resolve(ip(address)), Resolution::Service(_)), "{address}");
        assert!(s.workload_at(ip(address)).is_none(), "a VIP is no workload's address");
    }
    assert!(matches!(s.resolve(ip("10.0.0.2")), Resolution::Unknown));
    // An IPv4-compatible address (deprecated, RFC 4291 section 2.5.5.1) is another address than the IPv4 one.
    assert!(matches!(s.resolve(ip("::10.0.0.1")), Resolution::Unknown));
    let mut captured: Vec<_> = s.captured_addresses().collect();
    captured.sort();
    assert_eq!(captured, [ip("10.0.0.1"), ip("10.96.0.1"), ip("fd00::1")]);
}

#[test]
fn a_destination_is_accepted_by_its_owner_and_by_selected_workloads_only() {
    let mut b = builder();
    let web = b.workload(workload("web", &["10.0.0.1"])).unwrap();
    let api = b.workload(workload("api", &["10.0.0.2"])).unwrap();
    let other = b.workload(workload("other", &["10.0.0.3"])).unwrap();
    let endpoints = vec![
        Endpoint { workload: Arc::clone(&web), ports: vec![] },
        Endpoint { workload: Arc::clone(&api), ports: vec![ServicePort { port: 80, target_port: 9090 }] },
    ];
    b.service(service("web", &["10.96.0.1", "fd00:96::1"], &[(80, 8080)], endpoints)).unwrap();
    let s = b.build();
    for (who, destination, expected) in [
        (&web, "10.0.0.1:1234", Some(1234)),
        (&web, "[::ffff:10.0.0.1]:1234", Some(1234)),
        (&web, "10.0.0.2:1234", None),
        (&web, "10.96.0.1:80", Some(8080)),
        (&web, "[::ffff:10.96.0.1]:80", Some(8080)),
        (&web, "[fd00:96::1]:80", Some(8080)),
        (&web, "10.96.0.1:8080", None),
        (&api, "10.96.0.1:80", Some(9090)),
        (&other, "10.96.0.1:80", None),
        (&other, "127.0.0.1:80", None),
        (&other, "8.8.8.8:80", None),
    ] {
        assert_eq!(s.accepts(who, to(destination)), expected, "{} {destination}", who.key);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut b = builder();
    b.workload(workload("web", &["10.0.0.1"])).unwrap();
    assert!(
        matches!(b.workload(workload("web", &["10.0.0.2"])), Err(BuildError::DuplicateWorkload(k)) if k.to_string() == "default/web")
    );

    let mut b = builder();
    b.workload(workload("web", &["10.0.0.1"])).unwrap();
    let error = b.workload(workload("db", &["::ffff:10.0.0.1"])).unwrap_err();
    assert_eq!(
        error,
        BuildError::DuplicateAddress {
            address: ip("10.0.0.1"),
            first: "workload default/web".into(),
            second: "workload default/db".into()
        }
    );
    assert!(matches!(b.service(service("s", &["10.0.0.1"], &[], vec![])), Err(BuildError::DuplicateAddress { .. })));

    for address in [
        "127.0.0.1",
        "0.0.0.0",
        "169.254.1.1",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "ff02::1",
        "::ffff:127.0.0.1",
    ] {
        let error = builder().workload(workload("web", &[address])).unwrap_err();
        assert!(matches!(error, BuildError::UnusableAddress { .. }), "{address}: {error}");
        let error = builder().service(service("web", &[address], &[], vec![])).unwrap_err();
        assert!(matches!(error, BuildError::UnusableAddress { .. }), "{address}: {error}");
    }

    let without = Workload { local: Some(local()), ..workload("web", &[]) };
    assert!(matches!(builder().workload(without), Err(BuildError::NoAddress(_))));
    builder().workload(workload("remote", &[])).unwrap();
}

#[test]
fn local_workloads_and_their_identities() {
    let mut b = builder();
    b.workload(Workload { local: Some(local()), ..workload("web", &["10.0.0.1"]) }).unwrap();
    let same_account = Workload { identity: workload("web", &[]).identity, ..workload("web2", &["10.0.0.2"]) };
    b.workload(Workload { local: Some(local()), ..same_account }).unwrap();
    b.workload(workload("remote", &["10.0.0.3"])).unwrap();
    let s = b.build();
    assert_eq!(s.local_workloads().count(), 2);
    assert_eq!(s.workloads().count(), 3);
    let identities: Vec<_> = s.local_identities().into_iter().map(|i| i.to_string()).collect();
    assert_eq!(identities, ["spiffe://cluster.local/ns/default/sa/web"]);
}

#[test]
fn modes_of_ports() {
    let w = Workload {
        mode: InboundMode::Strict,
        port_modes: vec![PortMode { port: 80, mode: InboundMode::Permissive }],
        ..workload("web", &[])
    };
    assert_eq!((w.mode_of(80), w.mode_of(81)), (InboundMode::Permissive, InboundMode::Strict));
}

#[test]
fn identities_have_one_spelling() {
    let text = "spiffe://cluster.local/ns/default/sa/web";
    let id: SpiffeId = text.parse().unwrap();
    assert_eq!(id.to_string(), text);
    assert_eq!(id, SpiffeId::new(trust_domain(), "default", "web").unwrap());
    assert_eq!((id.trust_domain().as_str(), id.namespace(), id.service_account()), ("cluster.local", "default", "web"));
    for wrong in [
        "",
        "web",
        "SPIFFE://cluster.local/ns/default/sa/web",
        "spiffe://cluster.local/ns/default/sa/web/",
        "spiffe://cluster.local/ns/default/sa/",
        "spiffe://cluster.local/ns//sa/web",
        "spiffe:///ns/default/sa/web",
        "spiffe://cluster.local:443/ns/default/sa/web",
        "spiffe://user@cluster.local/ns/default/sa/web",
        "spiffe://Cluster.local/ns/default/sa/web",
        "spiffe://cluster.local/ns/default/sa/web?x",
        "spiffe://cluster.local/ns/default/sa/web#x",
        "spiffe://cluster.local/ns/default/sa/%77eb",
        "spiffe://cluster.local/ns/../sa/web",
        "spiffe://cluster.local/sa/web/ns/default",
        "spiffe://cluster.local/ns/default/sa/web\n",
        "spiffe://cluster.local/ns/default\0/sa/web",
    ] {
        assert!(wrong.parse::<SpiffeId>().is_err(), "{wrong:?}");
    }
    let long = format!("spiffe://cluster.local/ns/default/sa/{}", "a".repeat(254));
    assert!(long.parse::<SpiffeId>().unwrap_err().to_string().len() < 300, "foreign text is shortened");
}

#[test]
fn a_store_counts_generations_and_wakes_watchers() {
    let store = MeshStore::new(Snapshot::empty("node-a", trust_domain()));
    let mut watcher = store.subscribe();
    assert_eq!(store.load().generation, 0);
    assert!(!watcher.has_changed().unwrap());
    assert_eq!(store.replace(builder().build()).generation, 1);
    assert!(watcher.has_changed().unwrap());
    assert_eq!(*watcher.borrow_and_update(), 1);
    assert_eq!(store.replace(builder().build()).generation, 2);
    assert_eq!(store.load().generation, 2);
}

#[test]
fn whoever_is_woken_sees_at_least_that_generation() {
    let store = MeshStore::new(Snapshot::empty("node-a", trust_domain()));
    std::thread::scope(|scope| {
        let watcher = store.subscribe();
        let store = &store;
        scope.spawn(move || {
            for _ in 0..1000 {
                store.replace(builder().build());
            }
        });
        while *watcher.borrow() < 1000 {
            let seen = *watcher.borrow();
            assert!(store.load().generation >= seen);
        }
    });
}

fn usable_v4() -> impl Strategy<Value = Ipv4Addr> {
    any::<u32>().prop_map(Ipv4Addr::from).prop_filter("an address a pod can have", |a| {
        !(a.is_loopback() || a.is_unspecified() || a.is_multicast() || a.is_link_local() || a.is_broadcast())
    })
}

proptest! {
    /// Both spellings of an IPv4 address mean the same, wherever one of them is used.
    #[test]
    fn v4_mapped_is_v4(a in usable_v4(), mapped_in_config: bool, port: u16) {
        let (v4, v6) = (IpAddr::V4(a), IpAddr::V6(a.to_ipv6_mapped()));
        let mut b = builder();
        let w = b.workload(Workload {
            addresses: vec![if mapped_in_config { v6 } else { v4 }],
            ..workload("web", &[])
        }).unwrap();
        let s = b.build();
        for address in [v4, v6] {
            prop_assert!(matches!(s.resolve(address), Resolution::Workload(_)));
            prop_assert_eq!(s.accepts(&w, SocketAddr::new(address, port)), Some(port));
        }
        prop_assert!(s.captured_addresses().eq([v4]));
    }

    /// Every accepted address resolves to the workload that claimed it, and no address is accepted twice.
    #[test]
    fn an_address_has_one_owner(lists in prop::collection::vec(prop::collection::vec(0_u8..20, 0..4), 1..8)) {
        let mut b = builder();
        let mut owners = std::collections::HashMap::new();
        for (i, list) in lists.iter().enumerate() {
            let addresses: Vec<IpAddr> = list.iter().map(|n| Ipv4Addr::new(10, 0, 0, *n).into()).collect();
            let name = format!("w{i}");
            let fits = {
                let mut seen = std::collections::HashSet::new();
                addresses.iter().all(|a| !owners.contains_key(a) && seen.insert(*a))
            };
            let built = b.workload(Workload { addresses: addresses.clone(), ..workload(&name, &[]) });
            prop_assert_eq!(built.is_ok(), fits);
            if !fits {
                return Ok(()); // a failed build is thrown away whole
            }
            owners.extend(addresses.into_iter().map(|a| (a, name.clone())));
        }
        let s = b.build();
        for (address, owner) in &owners {
            let Resolution::Workload(w) = s.resolve(*address) else { panic!("{address} is unknown") };
            prop_assert_eq!(&*w.key.name, owner.as_str());
        }
        prop_assert_eq!(s.captured_addresses().count(), owners.len());
    }

    /// What is displayed parses to the same identity, and nothing else parses.
    #[test]
    fn identities_round_trip(td in "[a-z0-9._-]{1,20}", ns in "[a-z0-9]([a-z0-9.-]{0,10}[a-z0-9])?", sa in "[a-z0-9]([a-z0-9.-]{0,10}[a-z0-9])?") {
        let id = SpiffeId::new(td.parse().unwrap(), &ns, &sa).unwrap();
        prop_assert_eq!(id.to_string().parse::<SpiffeId>().unwrap(), id);
    }

    #[test]
    fn foreign_text_never_panics(s in "\\PC{0,60}") {
        if let Ok(id) = s.parse::<SpiffeId>() {
            prop_assert_eq!(id.to_string(), s);
        }
    }
}
