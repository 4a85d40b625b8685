//! Inbound modes of mesh, namespaces, workloads and ports.

use super::{super::parse, BASE, unmarked};
use crate::mesh::{EffectiveMode, InboundMode, ModeSource, WorkloadKey};

#[test]
fn the_narrowest_place_wins() {
    use InboundMode::{Permissive, Strict};
    let text = r"
apiVersion: underpass.io/v1alpha1
kind: NodeConfig
node: node-a
trustDomain: td
issuer: { local: { caDir: /ca } }
mesh: { mode: MESH }
namespaces: [{ name: shut, mode: strict }, { name: open, mode: permissive }]
workloads:
  - { name: a, namespace: shut, ports: [{ port: 80, mode: permissive }] }
  - { name: b, namespace: shut, mode: permissive, ports: [{ port: 80, mode: strict }] }
  - { name: old, namespace: shut, protocol: plain }
  - { name: a, namespace: open }
  - { name: b, namespace: open, mode: strict }
  - { name: a, namespace: other }
";
    for (mesh, of_mesh) in [("strict", Strict), ("permissive", Permissive)] {
        let snapshot = parse("n.yaml", &text.replace("MESH", mesh)).unwrap().snapshot;
        for (namespace, name, port, mode, set_by) in [
            ("shut", "a", 80, Permissive, ModeSource::Port),
            ("shut", "a", 81, Strict, ModeSource::Namespace),
            ("shut", "b", 80, Strict, ModeSource::Port),
            ("shut", "b", 81, Permissive, ModeSource::Workload),
            ("shut", "old", 80, Permissive, ModeSource::Workload),
            ("open", "a", 80, Permissive, ModeSource::Namespace),
            ("open", "b", 80, Strict, ModeSource::Workload),
            ("other", "a", 80, of_mesh, ModeSource::Mesh),
        ] {
            let key = WorkloadKey { namespace: namespace.into(), name: name.into() };
            let workload = snapshot.workload(&key).unwrap();
            assert_eq!(snapshot.effective_mode(workload, port), EffectiveMode { mode, set_by }, "{key} port {port}");
            assert_eq!(workload.mode_of(port), mode, "{key} port {port}: what capture reads");
        }
    }
}

#[test]
fn wrong_namespaces_are_refused() {
    for (namespaces, expected) in [
        (
            "[{ name: @A, mode: strict }]",
            r#"namespaces[0].name: namespace "A" must be an RFC 1123 name: a-z, 0-9, '-' and '.', starting and ending with a letter or digit"#,
        ),
        (
            "[{ name: a, mode: strict }, { name: @a, mode: strict }]",
            "namespaces[1].name: namespace a is listed twice; remove one",
        ),
        (
            "[{ name: a, mode: @disable }]",
            r#"namespaces[0].mode: "disable" is not accepted; write: permissive, strict"#,
        ),
        // A missing field is reported at the last field that is there.
        ("[{ @name: a }]", r#"namespaces[0]: field "mode" is missing; add it"#),
    ] {
        let (text, place) = unmarked(&format!("{BASE}namespaces: {namespaces}\n"));
        assert_eq!(parse("n.yaml", &text).unwrap_err().0, format!("{place}{expected}"));
    }
}
