//! The `file` source.

mod accepted;
mod access_log;
mod modes;
mod policies;
mod probes;
mod refused;
mod reload;

/// A small valid document; tests change one thing in it.
pub(super) const BASE: &str = r#"apiVersion: underpass.io/v1alpha1
kind: NodeConfig
node: node-a
trustDomain: cluster.local
issuer:
  local: { caDir: /run/underpass/ca }
mesh:
  mode: strict
  cidrs: [10.0.0.0/16]
workloads:
  - name: web
    namespace: default
    serviceAccount: web
    addresses: [10.77.0.2, "fd00::2"]
    ports: [{ port: 8080, mode: permissive }]
    enroll:
      netns: /run/netns/web
  - name: db
    namespace: data
    node: node-b
    addresses: [10.77.1.2]
services:
  - name: web
    namespace: default
    vips: [10.96.0.10]
    ports: [{ port: 80, targetPort: 8080 }]
    endpoints: [{ workload: default/web }]
"#;

/// A text with a `@`: without it, and how a message about its place begins.
pub(super) fn unmarked(marked: &str) -> (String, String) {
    let (before, after) = marked.split_once('@').expect("a marker");
    let (line, start) = before.rsplit_once('\n').map_or((1, before), |(b, l)| (b.matches('\n').count() + 2, l));
    (format!("{before}{after}"), format!("n.yaml:{line}:{}: ", start.chars().count() + 1))
}
