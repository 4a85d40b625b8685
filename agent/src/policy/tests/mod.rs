//! Evaluation, against an independent evaluator and against Istio's documentation.

mod examples;
mod explaining;
mod hostile;
mod measure;
mod plaintext;
mod properties;
mod reference;
mod selecting;

use std::net::{IpAddr, SocketAddr};

use super::{NodePolicies, Request, Verdict};
use crate::{
    mesh::{Snapshot, SpiffeId, WorkloadKey},
    sources::file,
};

/// A mesh of five pods, all on this node, with `policies` (YAML, in the form of the file source).
fn mesh(policies: &str) -> Snapshot {
    let text = format!(
        r#"
apiVersion: underpass.io/v1alpha1
kind: NodeConfig
node: node-a
trustDomain: cluster.local
issuer: {{ local: {{ caDir: /ca }} }}
workloads:
  - {{ name: httpbin, namespace: foo, labels: {{ app: httpbin, version: v1 }}, addresses: [10.0.0.1, "fd00::1"], enroll: {{ netns: /n/1 }} }}
  - {{ name: sleep, namespace: foo, serviceAccount: sleep, labels: {{ app: sleep }}, addresses: [10.0.0.2], enroll: {{ netns: /n/2 }} }}
  - {{ name: httpbin, namespace: bar, labels: {{ app: httpbin, version: v2 }}, addresses: [10.0.0.3], enroll: {{ netns: /n/3 }} }}
  - {{ name: bare, namespace: bar, addresses: [10.0.0.4], enroll: {{ netns: /n/4 }} }}
  - {{ name: gateway, namespace: istio-system, labels: {{ app: gateway }}, addresses: [10.0.0.5], enroll: {{ netns: /n/5 }} }}
policies:
{policies}
"#
    );
    file::parse("mesh.yaml", &text).unwrap_or_else(|e| panic!("{e}\n{text}")).snapshot
}

fn key(text: &str) -> WorkloadKey {
    let (namespace, name) = text.split_once('/').expect("NAMESPACE/NAME");
    WorkloadKey { namespace: namespace.into(), name: name.into() }
}

fn id(namespace: &str, account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local".parse().unwrap(), namespace, account).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// What a workload answers to a peer from 10.9.9.9.
fn verdict(snapshot: &Snapshot, workload: &str, peer: Option<&SpiffeId>, port: u16) -> Verdict {
    let key = key(workload);
    let address = snapshot.workload(&key).expect("a workload").addresses[0];
    let request = Request { peer, source: ip("10.9.9.9"), destination: SocketAddr::new(address, port) };
    NodePolicies::compile(snapshot).of(&key).expect("this node's").evaluate(&request)
}
