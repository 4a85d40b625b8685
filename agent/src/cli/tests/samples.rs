//! Answers that are made up, with a name of somebody else's wherever one can be.

use std::time::{Duration, SystemTime};

use crate::{
    admin::{
        api::{
            AllCounters, CertificateStatus, Connections, InterfaceStatus, KtlsStatus, PlaintextLeft, PodState,
            PodStatus, ProbeCgroupState, ProbeCgroupStatus, Status,
        },
        inventory::{
            CertificateDetails, CertificateInfo, Certificates, EndpointInfo, ServiceInfo, Services, WorkloadInfo,
            Workloads,
        },
    },
    capture::InterfaceGuard,
    cli::{certificates, status},
    mesh::{Action, EffectiveMode, InboundMode, ModeSource, PolicyStatus, PortMode, Protocol, ServicePort},
    policy::{Considered, Explanation, Explanations, Opinion, PolicyList, PolicySummary},
    relay::{ConnectionId, ConnectionInfo, DataPath, Direction},
    sources::file::ReloadStatus,
    telemetry::KtlsFallback,
};

/// Escape sequences in both forms, a forged line, text that runs backwards.
pub const HOSTILE: &str = "evil\x1b]0;title\x07\nforged line\u{202e}\u{9b}2J\r\u{7f}";

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";

pub fn connection(id: u64, name: &str) -> ConnectionInfo {
    ConnectionInfo {
        id: ConnectionId(id),
        age_s: 61.0,
        direction: Direction::Inbound,
        workload: name.into(),
        source_identity: Some(CLIENT.into()),
        destination_identity: Some(WEB.into()),
        source: "10.0.0.1:40000".parse().unwrap(),
        original_destination: "10.96.0.1:80".parse().unwrap(),
        upstream: "10.0.0.2:15008".parse().unwrap(),
        service: Some(name.into()),
        data_path: DataPath::Ktls,
        fallback: None,
        cipher: Some("TLS13_AES_256_GCM_SHA384".into()),
        resumed: true,
        sent: 2048,
        received: 0,
    }
}

pub fn connections(name: &str) -> Connections {
    let user = ConnectionInfo {
        data_path: DataPath::User,
        fallback: Some(KtlsFallback::Unavailable),
        direction: Direction::Outbound,
        resumed: false,
        ..connection(8, name)
    };
    let plain = ConnectionInfo {
        data_path: DataPath::Plain,
        cipher: None,
        source_identity: None,
        destination_identity: None,
        service: None,
        ..connection(9, name)
    };
    Connections { total: 5, connections: vec![connection(7, name), user, plain] }
}

pub fn a_status(name: &str) -> status::Report {
    let pod = |workload: &str, state, reason: Option<&str>| PodStatus {
        workload: workload.into(),
        identity: WEB.into(),
        netns: "/run/netns/web".into(),
        pod_id: (state == PodState::Enrolled).then_some(3),
        state,
        reason: reason.map(str::to_owned),
        certificate: (state == PodState::Enrolled).then(|| validity("4a2f")),
    };
    let pods = vec![
        pod("shop/web", PodState::Enrolled, None),
        pod(name, PodState::Refused, Some("port 15008 in the pod is already in use by nginx (17)")),
    ];
    let error = Some(format!("n.yaml:1:1: {name}"));
    let reload = ReloadStatus { accepted: 1, rejected: 2, from_last_good: true, error };
    let mut counters = AllCounters::default();
    counters.agent.refused.insert("not-tls".into(), 3);
    counters.bpf.extend([("captured".to_owned(), 9), ("guard_dropped".to_owned(), 0)]);
    let cgroup = |state, reason: Option<&str>| ProbeCgroupStatus {
        path: "/system.slice/kubelet.service".into(),
        state,
        reason: reason.map(str::to_owned),
    };
    let probe_cgroups = vec![
        cgroup(ProbeCgroupState::Active, None),
        cgroup(ProbeCgroupState::Active, Some("no room")),
        cgroup(ProbeCgroupState::Missing, None),
        cgroup(ProbeCgroupState::Refused, Some("pods are in it")),
    ];
    let left = PlaintextLeft {
        workload: "shop/web".into(),
        forbidden_by: "mode".into(),
        attempts: 3,
        error: "no descriptors".into(),
    };
    let interface = |name: &str, kind: &str, node_guard: Option<&str>, moved| InterfaceStatus {
        workload: "shop/web".into(),
        guard: InterfaceGuard {
            interface: name.into(),
            kind: kind.into(),
            node_guard: node_guard.map(str::to_owned),
            moved,
        },
    };
    let interfaces = vec![
        interface("eth0", "veth", Some("veth17"), false),
        interface("net1", "macvlan", None, false),
        interface("eth9", "veth", Some("veth18"), true),
    ];
    let status = Status {
        version: "1.2.3".into(),
        interfaces,
        node: "node-a".into(),
        trust_domain: "cluster.local".into(),
        generation: 4,
        probe_cgroups,
        probe_node_addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
        plaintext_left: vec![left],
        ..Status::new(KtlsStatus::default(), pods, reload)
    };
    status::Report { status, counters }
}

pub fn workloads(name: &str) -> Workloads {
    let local = WorkloadInfo {
        workload: "shop/web".into(),
        identity: WEB.into(),
        node: "node-a".into(),
        addresses: vec!["10.77.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
        protocol: Protocol::Underpass,
        mode: InboundMode::Strict,
        mode_set_by: ModeSource::Namespace,
        port_modes: vec![PortMode { port: 9090, mode: InboundMode::Permissive }],
        local: true,
        state: Some(PodState::Enrolled),
        pod_id: Some(3),
        reason: None,
    };
    let refused = WorkloadInfo {
        workload: name.into(),
        state: Some(PodState::Refused),
        pod_id: None,
        reason: Some("the namespace does not exist".into()),
        ..local.clone()
    };
    let remote = WorkloadInfo {
        workload: "shop/legacy".into(),
        node: name.into(),
        protocol: Protocol::Plain,
        mode: InboundMode::Permissive,
        mode_set_by: ModeSource::Mesh,
        port_modes: Vec::new(),
        local: false,
        state: None,
        pod_id: None,
        reason: None,
        ..local.clone()
    };
    let waiting = WorkloadInfo { state: None, pod_id: None, ..local.clone() };
    Workloads { total: 9, workloads: vec![local, refused, waiting, remote] }
}

pub fn services(name: &str) -> Services {
    let endpoint = |protocol| EndpointInfo {
        workload: name.into(),
        node: "node-b".into(),
        addresses: vec!["10.77.0.3".parse().unwrap()],
        protocol,
        ports: vec![],
    };
    let service = ServiceInfo {
        service: "shop/web".into(),
        hostname: name.into(),
        vips: vec!["10.96.0.1".parse().unwrap()],
        ports: vec![ServicePort { port: 80, target_port: 8080 }, ServicePort { port: 443, target_port: 443 }],
        awaited: None,
        endpoints_total: 200,
        endpoints: vec![endpoint(Protocol::Underpass), endpoint(Protocol::Plain)],
    };
    let empty = ServiceInfo { service: "shop/gone".into(), endpoints_total: 0, endpoints: vec![], ..service.clone() };
    Services { total: 2, services: vec![service, empty] }
}

pub fn policies(name: &str) -> PolicyList {
    let summary = |name: &str, status| PolicySummary {
        name: name.into(),
        scope: "namespace".into(),
        action: Action::Deny,
        dry_run: true,
        rules: 2,
        workloads: 7,
        local_workloads: 3,
        status,
    };
    PolicyList {
        policies: vec![
            summary("a/one", PolicyStatus::Active),
            summary("a/two", PolicyStatus::Partial { ignored: vec!["hosts".into(), "paths".into()] }),
            summary("a/three", PolicyStatus::Invalid { reason: name.into() }),
        ],
    }
}

pub fn explanations(name: &str) -> Explanations {
    let opinion = |allowed, reason: &str| Opinion { allowed, reason: reason.into(), decided_by: None };
    let considered = Considered {
        policy: "shop/clients".into(),
        scope: None,
        action: None,
        dry_run: false,
        matches: false,
        rule: None,
        because: name.into(),
    };
    let explanation = Explanation {
        from: None,
        source: "192.0.2.7".parse().unwrap(),
        source_of: None,
        to: "[fd00::2]:8080".parse().unwrap(),
        workload: name.into(),
        node: "node-a".into(),
        allowed: false,
        reason: "mode strict (set for the namespace) refuses plaintext".into(),
        decided_by: None,
        mode: EffectiveMode { mode: InboundMode::Strict, set_by: ModeSource::Namespace },
        policy: opinion(true, "nothing denies"),
        dry_run: Some(opinion(false, "DENY policy a/b, rules[0]")),
        considered: vec![considered],
    };
    Explanations {
        service: Some("web.shop.svc.cluster.local".into()),
        explanations: vec![explanation],
        endpoints_left_out: 3,
    }
}

pub fn validity(serial: &str) -> CertificateStatus {
    let start = SystemTime::UNIX_EPOCH + Duration::from_hours(500_000);
    CertificateStatus::new(serial, start, start + Duration::from_hours(2))
}

pub fn a_report(name: &str) -> certificates::Report {
    let details = CertificateDetails {
        status: validity("4a2f"),
        issuer: name.into(),
        key: "ECDSA 256".into(),
        chain: 1,
        roots: vec!["CN=root".into()],
        roots_sha256: "00ff".into(),
    };
    let with = CertificateInfo {
        identity: WEB.into(),
        workloads: vec!["shop/web".into(), name.into()],
        certificate: Some(details),
    };
    let without = CertificateInfo { identity: CLIENT.into(), workloads: vec!["shop/client".into()], certificate: None };
    certificates::Report {
        certificates: Certificates {
            trust_domain: "cluster.local".into(),
            source: "local".into(),
            certificates: vec![with, without],
        },
        now: SystemTime::UNIX_EPOCH + Duration::from_hours(500_001),
        expires_within: Duration::from_mins(5),
    }
}
