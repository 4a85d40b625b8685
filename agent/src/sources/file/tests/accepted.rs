//! What valid documents mean.

use std::{fmt::Write as _, net::SocketAddr, time::Duration};

use proptest::prelude::*;

use super::{
    super::{IssuerConfig, parse},
    BASE,
};
use crate::mesh::{InboundMode, PlaintextRefusal, PodNamespace, Protocol, Resolution, WorkloadKey};

fn key(namespace: &str, name: &str) -> WorkloadKey {
    WorkloadKey { namespace: namespace.into(), name: name.into() }
}

#[test]
fn defaults() {
    let config = parse("n.yaml", BASE).unwrap();
    assert_eq!(
        config.issuer,
        IssuerConfig::Local { ca_dir: "/run/underpass/ca".into(), lifetime: Duration::from_hours(24) }
    );
    let mesh = config.snapshot;
    assert_eq!((&*mesh.node, mesh.trust_domain.as_str(), mesh.generation), ("node-a", "cluster.local", 0));
    assert!(!mesh.settings.capture_all);
    assert_eq!(mesh.settings.cidrs, ["10.0.0.0/16".parse().unwrap()]);

    let web = mesh.workload(&key("default", "web")).unwrap();
    assert_eq!(web.identity.to_string(), "spiffe://cluster.local/ns/default/sa/web");
    assert_eq!((&*web.node, web.protocol, web.mode), ("node-a", Protocol::Underpass, InboundMode::Strict));
    assert_eq!((web.mode_of(8080), web.mode_of(8081)), (InboundMode::Permissive, InboundMode::Strict));
    let local = web.local.as_ref().unwrap();
    assert_eq!(local.netns, PodNamespace::at("/run/netns/web".into()));
    assert!(local.cgroup.is_none() && local.files.is_none() && !local.capture_all);

    let db = mesh.workload(&key("data", "db")).unwrap();
    assert_eq!(db.identity.to_string(), "spiffe://cluster.local/ns/data/sa/default");
    assert!(db.local.is_none() && &*db.node == "node-b");

    let [service] = mesh.services() else { panic!("one service") };
    assert_eq!(&*service.hostname, "web.default.svc.cluster.local");
    assert_eq!(service.target_port(&service.endpoints[0], 80), Some(8080));
}

#[test]
fn everything_written_out() {
    let text = r#"
apiVersion: underpass.io/v1alpha1
kind: NodeConfig
node: node-a
trustDomain: cluster.local
issuer: { files: {} }
mesh:
  captureAll: true
  plaintextRefusal: drop
  exclude: { outboundPorts: [25], outboundCIDRs: [0.0.0.0/0, "fd00::/8"], inboundPorts: [9100] }
workloads:
  - &web
    name: web
    namespace: shop
    trustDomain: other.example
    node: node-a
    addresses: ["::ffff:10.77.0.2"]
    protocol: underpass
    mode: strict
    enroll:
      netns: /run/netns//web/
      cgroup: /sys/fs/cgroup/kubepods/web
      captureAll: true
      exclude: { outboundPorts: [26], inboundPorts: [1] }
      certificate: { certificate: /c, key: /k, roots: /r }
  - { name: old, namespace: shop, addresses: [10.77.0.3], protocol: plain }
services:
  - name: web
    namespace: shop
    hostname: shop.example
    vips: [10.96.0.10, "fd00:96::1"]
    ports: [{ port: 80 }, { port: 443, targetPort: 8443 }]
    endpoints:
      - { workload: shop/web, ports: [{ port: 443, targetPort: 9443 }] }
      - { workload: shop/old }
  - { name: headless, namespace: shop, ports: [{ port: 80 }] }
"#;
    let config = parse("n.yaml", text).unwrap();
    assert_eq!(config.issuer, IssuerConfig::Files);
    let mesh = config.snapshot;
    assert!(mesh.settings.capture_all);
    assert_eq!(mesh.settings.plaintext_refusal, PlaintextRefusal::Drop);
    assert_eq!(mesh.settings.exclude.outbound_ports, [25]);
    assert_eq!(mesh.settings.exclude.outbound_cidrs.len(), 2);
    assert_eq!(mesh.settings.exclude.inbound_ports, [9100]);

    let web = mesh.workload_at("10.77.0.2".parse().unwrap()).unwrap();
    assert_eq!(web.identity.to_string(), "spiffe://other.example/ns/shop/sa/default");
    let local = web.local.as_ref().unwrap();
    assert_eq!(local.netns.name().to_str(), Some("/run/netns/web"));
    assert_eq!(local.files.as_ref().unwrap().key.to_str(), Some("/k"));
    assert!(local.capture_all);
    assert_eq!((&local.exclude.outbound_ports[..], &local.exclude.inbound_ports[..]), (&[26][..], &[1][..]));

    let old = mesh.workload(&key("shop", "old")).unwrap();
    assert_eq!((old.protocol, old.mode), (Protocol::Plain, InboundMode::Permissive));

    let Resolution::Service(service) = mesh.resolve("fd00:96::1".parse().unwrap()) else { panic!("the service") };
    assert_eq!(&*service.hostname, "shop.example");
    let target = |endpoint: usize, port| service.target_port(&service.endpoints[endpoint], port);
    assert_eq!(
        (target(0, 443), target(1, 443), target(0, 80), target(0, 81)),
        (Some(9443), Some(8443), Some(80), None)
    );
    let to: SocketAddr = "10.96.0.10:443".parse().unwrap();
    assert_eq!((mesh.accepts(web, to), mesh.accepts(old, to)), (Some(9443), Some(8443)));
}

#[test]
fn an_enrolled_workload_can_use_an_anchor() {
    let text = BASE
        .replace("serviceAccount: web", "serviceAccount: &account web")
        .replace("    node: node-b\n", "    node: node-b\n    serviceAccount: *account\n");
    let mesh = parse("n.yaml", &text).unwrap().snapshot;
    assert_eq!(mesh.workload(&key("data", "db")).unwrap().identity.service_account(), "web");
}

#[test]
fn the_istio_issuer() {
    let issuer = |fields: &str| {
        let istio = format!("istio: {{ address: \"https://ca.mesh.svc:15012\", rootFile: /r, tokenFile: /t{fields} }}");
        match parse("n.yaml", &BASE.replace("local: { caDir: /run/underpass/ca }", &istio)).unwrap().issuer {
            IssuerConfig::Istio(ca) => ca,
            other => panic!("{other:?}"),
        }
    };
    let ca = issuer("");
    assert_eq!((ca.address.host(), ca.address.port()), ("ca.mesh.svc", 15012));
    assert_eq!((ca.root_file.to_str(), ca.token_file.to_str()), (Some("/r"), Some("/t")));
    assert_eq!((ca.cluster_id.as_str(), ca.lifetime, ca.server_name), ("Kubernetes", Duration::from_hours(24), None));
    let ca = issuer(", clusterId: east/1, lifetime: 1h, serverName: istiod.istio-system.svc");
    assert_eq!((ca.cluster_id.as_str(), ca.lifetime), ("east/1", Duration::from_hours(1)));
    assert_eq!(ca.server_name.as_deref(), Some("istiod.istio-system.svc"));
}

#[test]
fn a_node_with_many_workloads_is_within_the_limits() {
    let mut text = String::from(
        "apiVersion: underpass.io/v1alpha1\nkind: NodeConfig\nnode: a\ntrustDomain: td\nissuer: {local: {caDir: /ca}}\nworkloads:\n",
    );
    for i in 0..20_000_u32 {
        let ip = std::net::Ipv4Addr::from(0x0a00_0001 + i);
        writeln!(text, "  - {{ name: w{i}, namespace: default, serviceAccount: s{i}, addresses: [{ip}] }}").unwrap();
    }
    assert_eq!(parse("n.yaml", &text).unwrap().snapshot.workloads().count(), 20_000);
}

/// Every ```` ```yaml ```` block of the document that operators read.
#[test]
fn examples_in_the_documentation() {
    for (name, documentation, least) in [
        ("docs/configuration.md", include_str!("../../../../../docs/configuration.md"), 3),
        ("docs/policy.md", include_str!("../../../../../docs/policy.md"), 1),
    ] {
        let blocks = documentation.split("```yaml\n").skip(1);
        let blocks: Vec<_> = blocks.map(|rest| rest.split("```").next().expect("split yields one")).collect();
        assert!(blocks.len() >= least, "{name} has examples");
        for block in blocks {
            if let Err(e) = parse(name, block) {
                panic!("{e}\n{block}");
            }
        }
    }
}

proptest! {
    /// Whatever is typed, the answer is a model or a message; never a panic, never an unbounded message.
    #[test]
    fn one_changed_place_never_panics(at in 0..BASE.len(), cut in 0_usize..8, put in "[ -~\u{e9}\n\u{0}]{0,8}") {
        let mut text = BASE.as_bytes()[..at].to_vec();
        text.extend_from_slice(put.as_bytes());
        text.extend_from_slice(&BASE.as_bytes()[(at + cut).min(BASE.len())..]);
        let text = String::from_utf8_lossy(&text);
        if let Err(e) = parse("n.yaml", &text) {
            prop_assert!(e.0.starts_with("n.yaml"), "{e}");
            prop_assert!(e.0.len() < 2000 && !e.0.chars().any(char::is_control), "{e:?}");
        }
    }
}
