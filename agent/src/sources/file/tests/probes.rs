//! Who sends probes.

use std::fmt::Write as _;

use super::{super::parse, BASE, unmarked};

/// The base with a section `probes`, before the workloads.
fn with(probes: &str) -> String {
    BASE.replace("workloads:\n", &format!("probes: {probes}\nworkloads:\n"))
}

/// The base with probe ports for the enrolled workload.
fn with_ports(text: &str, ports: &str) -> String {
    text.replace("netns: /run/netns/web\n", &format!("netns: /run/netns/web\n      probePorts: {ports}\n"))
}

/// `@` marks where the message must point.
fn refused(marked: &str, expected: &str) {
    let (text, place) = unmarked(marked);
    assert_eq!(parse("n.yaml", &text).expect_err("must be refused").0, format!("{place}{expected}"), "{marked}");
}

#[test]
fn nobody_by_default() {
    let mesh = parse("n.yaml", BASE).unwrap().snapshot;
    assert_eq!(mesh.settings.probes, crate::mesh::ProbeSettings::default());
    assert!(mesh.local_workloads().all(|w| w.local.as_ref().unwrap().probe_ports.is_empty()));
}

#[test]
fn cgroups_addresses_and_ports() {
    let text = with(
        r#"{ cgroups: [/system.slice//kubelet.service/, /a], nodeAddresses: ["::ffff:10.0.0.1", "fd00::9", 169.254.7.127] }"#,
    );
    let mesh = parse("n.yaml", &with_ports(&text, "[8080, 8081]")).unwrap().snapshot;
    let probes = &mesh.settings.probes;
    let cgroups: Vec<_> = probes.cgroups.iter().map(|c| c.to_str().unwrap()).collect();
    assert_eq!(cgroups, ["/system.slice/kubelet.service", "/a"]);
    let addresses: Vec<_> = probes.node_addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["10.0.0.1", "fd00::9", "169.254.7.127"]);
    let local = mesh.local_workloads().next().unwrap().local.as_ref().unwrap();
    assert_eq!(local.probe_ports, [8080, 8081]);
    assert!(!probes.from_node_addresses);
    // Ports need somebody who probes them, known in whichever way.
    let mesh = parse("n.yaml", &with_ports(&with("{ cgroups: [/a] }"), "[8080]")).unwrap().snapshot;
    assert!(mesh.settings.probes.node_addresses.is_empty());
    let text = with("{ nodeAddresses: [10.0.0.1], fromNodeAddresses: true }");
    assert!(parse("n.yaml", &text).unwrap().snapshot.settings.probes.from_node_addresses);
}

#[test]
fn what_would_let_pods_in_is_refused() {
    let own = "name the kubelet's own cgroup, like /system.slice/kubelet.service";
    refused(&with("{ cgroups: [@/] }"), &format!(r#"probes.cgroups[0]: "/" holds every process; {own}"#));
    for pods in ["/kubepods", "/kubepods.slice/kubepods-burstable.slice", "/kubelet.slice/kubelet-kubepods.slice"] {
        let problem = format!("probes.cgroups[0]: {pods:?} holds pods, and none of them is exempt; {own}");
        refused(&with(&format!("{{ cgroups: [@{pods}] }}")), &problem);
    }
}

#[test]
fn values_that_cannot_be_meant() {
    let deep = "/a".repeat(17);
    refused(
        &with(&format!("{{ cgroups: [@{deep}] }}")),
        &format!("probes.cgroups[0]: {deep:?} is 17 levels deep, and 16 are looked at; name one above it"),
    );
    refused(
        &with("{ cgroups: [@kubelet.service] }"),
        r#"probes.cgroups[0]: "kubelet.service" must be an absolute path without "..", shorter than 4096 bytes"#,
    );
    refused(&with("{ cgroups: [/a, @/a/] }"), r#"probes.cgroups[1]: "/a/" is listed twice; remove one"#);
    for address in ["127.0.0.1", "0.0.0.0", "224.0.0.1"] {
        let problem = format!(
            "probes.nodeAddresses[0]: {address:?} is no address that packets of the node have in a pod; write one of the node's addresses"
        );
        refused(&with(&format!("{{ nodeAddresses: [@{address}] }}")), &problem);
    }
    let mut many = String::new();
    for i in 0..16 {
        write!(many, "/c{i}, ").unwrap();
    }
    refused(
        &with(&format!("{{ cgroups: [{many}@/c16] }}")),
        "probes.cgroups[16]: at most 16 entries are taken; remove the others",
    );
    refused(
        &with_ports(BASE, "[@8080]"),
        "workloads[0].enroll.probePorts[0]: port 8080 is for the kubelet, and nothing says how the kubelet is recognised; list its cgroup in probes.cgroups",
    );
    refused(
        &with("{ fromNodeAddresses: @true }"),
        "probes.fromNodeAddresses: only the Kubernetes API tells the node's addresses; list them in probes.nodeAddresses",
    );
    refused(
        &with_ports(&with("{ nodeAddresses: [10.0.0.1] }"), "[@15001]"),
        "workloads[0].enroll.probePorts[0]: port 15001 is one of the agent's own inside every pod; use another port",
    );
}
