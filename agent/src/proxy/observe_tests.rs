use std::{net::SocketAddr, sync::Arc};

use super::{Refused, established, unestablished};
use crate::{
    mesh::{Snapshot, SpiffeId, WorkloadKey},
    relay::{DataPath, Direction, NewConnection},
    sources::file::parse,
    telemetry::{Labels, RefusalReason, Reporter},
};

fn mesh() -> Snapshot {
    let text = r"
apiVersion: underpass.io/v1alpha1
kind: NodeConfig
node: node-a
trustDomain: cluster.local
issuer: { local: { caDir: /ca } }
workloads:
  - { name: web-1, namespace: shop, serviceAccount: web, addresses: [10.0.0.1], labels: { app: web, version: v2 }, enroll: { netns: /run/netns/web } }
  - { name: client, namespace: default, serviceAccount: client, addresses: [10.0.0.2] }
  - { name: old, namespace: default, addresses: [10.0.0.9], protocol: plain }
services:
  - { name: web, namespace: shop, vips: [10.96.0.1], ports: [{ port: 80, targetPort: 8080 }], endpoints: [{ workload: shop/web-1 }] }
  - { name: other, namespace: shop, vips: [10.96.0.2], ports: [{ port: 80 }], endpoints: [{ workload: default/client }] }
";
    parse("n.yaml", text).unwrap().snapshot
}

fn at(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

fn identity(namespace: &str, name: &str) -> SpiffeId {
    SpiffeId::new("cluster.local".parse().unwrap(), namespace, name).unwrap()
}

fn web() -> WorkloadKey {
    WorkloadKey { namespace: "shop".into(), name: "web-1".into() }
}

/// A tunnel to web, from somebody.
fn inbound(peer: &SpiffeId, from: &str, service: Option<&str>) -> NewConnection {
    NewConnection {
        workload: web(),
        pod_id: 1,
        direction: Direction::Inbound,
        source_identity: Some(peer.clone()),
        destination_identity: Some(identity("shop", "web")),
        peer: None,
        source: at(from),
        original_destination: at("10.0.0.1:8080"),
        upstream: at("10.0.0.1:8080"),
        service: service.map(Into::into),
        data_path: DataPath::Ktls,
        fallback: None,
        cipher: None,
        resumed: false,
    }
}

fn names(labels: &Labels) -> [Option<&str>; 4] {
    #[expect(clippy::ref_option, reason = "applied to fields")]
    fn name(n: &Option<Arc<str>>) -> Option<&str> {
        n.as_deref()
    }
    [
        name(&labels.source.namespace),
        name(&labels.source.workload),
        name(&labels.destination.namespace),
        name(&labels.destination.workload),
    ]
}

#[test]
fn a_tunnel_is_told_by_both_workloads_and_what_they_proved() {
    let client = identity("default", "client");
    let labels = established(&mesh(), &inbound(&client, "10.0.0.2:40000", Some("web.shop.svc.cluster.local")));
    assert_eq!(labels.reporter, Reporter::Destination);
    assert_eq!(names(&labels), [Some("default"), Some("client"), Some("shop"), Some("web-1")]);
    assert_eq!(labels.source.principal, Some(client));
    assert_eq!(labels.destination.principal, Some(identity("shop", "web")));
    assert_eq!(labels.destination.app.as_deref(), Some("web"));
    assert_eq!((labels.destination.version.as_deref(), labels.source.version.as_deref()), (Some("v2"), Some("latest")));
    assert_eq!(labels.service.map(|s| s.name).as_deref(), Some("web"));
    assert!(labels.mutual_tls);
}

#[test]
fn a_client_cannot_choose_its_labels() {
    let mesh = mesh();
    // At client's address, but not as client.
    let stranger = identity("default", "stranger");
    let labels = established(&mesh, &inbound(&stranger, "10.0.0.2:40000", None));
    assert_eq!(names(&labels)[..2], [Some("default"), None]);
    assert_eq!(labels.source.principal, Some(stranger));
    // Services that do not exist, or select other pods.
    let client = identity("default", "client");
    for service in ["evil\n.example", "other.shop.svc.cluster.local"] {
        let labels = established(&mesh, &inbound(&client, "10.0.0.2:40000", Some(service)));
        assert_eq!(labels.service, None, "{service}");
    }
}

#[test]
fn plaintext_proves_nothing() {
    let mut new = inbound(&identity("default", "client"), "10.0.0.2:40000", None);
    (new.source_identity, new.data_path) = (None, DataPath::Plain);
    let labels = established(&mesh(), &new);
    assert_eq!(names(&labels), [Some("default"), Some("client"), Some("shop"), Some("web-1")]);
    assert_eq!((labels.source.principal, labels.destination.principal, labels.mutual_tls), (None, None, false));
    new.source = at("192.0.2.1:40000");
    assert_eq!(names(&established(&mesh(), &new))[..2], [None, None]);
}

#[test]
fn outbound_connections_are_told_by_where_they_go() {
    let mut new = inbound(&identity("shop", "web"), "127.0.0.1:40000", Some("other.shop.svc.cluster.local"));
    new.direction = Direction::Outbound;
    new.destination_identity = Some(identity("default", "client"));
    (new.original_destination, new.upstream) = (at("10.96.0.2:80"), at("10.0.0.2:15008"));
    let labels = established(&mesh(), &new);
    assert_eq!(labels.reporter, Reporter::Source);
    assert_eq!(names(&labels), [Some("shop"), Some("web-1"), Some("default"), Some("client")]);
    assert_eq!(labels.service.map(|s| s.name).as_deref(), Some("other"));
    (new.destination_identity, new.data_path, new.service) = (None, DataPath::Plain, None);
    new.upstream = at("10.0.0.9:80");
    let labels = established(&mesh(), &new);
    assert_eq!(names(&labels)[2..], [Some("default"), Some("old")]);
    assert!(!labels.mutual_tls && labels.service.is_none() && labels.source.principal.is_none());
}

#[test]
fn refusals_are_told_by_what_was_known() {
    let refused = |direction, destination: Option<&str>, identity| Refused {
        direction,
        reason: RefusalReason::UpstreamUnreachable,
        detail: &"",
        source: at("10.0.0.2:40000"),
        destination: destination.map(at),
        identity,
        service: None,
        trace: None,
    };
    let mesh = mesh();
    let labels = unestablished(&mesh, &web(), &refused(Direction::Outbound, Some("10.96.0.2:80"), None));
    assert_eq!(names(&labels), [Some("shop"), Some("web-1"), None, None]);
    assert_eq!(labels.service.map(|s| s.name).as_deref(), Some("other"));
    let labels = unestablished(&mesh, &web(), &refused(Direction::Outbound, Some("10.0.0.2:80"), None));
    assert_eq!(names(&labels)[2..], [Some("default"), Some("client")]);
    let client = identity("default", "client");
    let labels = unestablished(&mesh, &web(), &refused(Direction::Inbound, None, Some(&client)));
    assert_eq!(names(&labels), [Some("default"), Some("client"), Some("shop"), Some("web-1")]);
    assert_eq!(labels.source.principal, Some(client));
    assert!(labels.mutual_tls);
}
