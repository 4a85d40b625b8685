//! Documents that are refused, with the whole message.

use std::fmt::Write as _;

use super::{
    super::{MAX_DOCUMENT, parse},
    BASE, unmarked,
};

fn refusal(text: &str) -> String {
    parse("n.yaml", text).expect_err("must be refused").0
}

/// `(what is replaced in the base, by what, the message)`; one change each. `@` marks where the message must point.
fn check(cases: &[(&str, &str, &str)]) {
    for (from, to, expected) in cases {
        assert_eq!(BASE.matches(from).count(), 1, "{from:?} must occur once");
        let marked = BASE.replacen(from, to, 1);
        let (text, place) = unmarked(&marked);
        assert_eq!(refusal(&text), format!("{place}{expected}"), "after {from:?} -> {to:?}");
    }
}

#[test]
fn the_base_is_accepted() {
    parse("n.yaml", BASE).unwrap();
}

#[test]
fn shapes_and_types() {
    check(&[
        ("mode: strict\n", "mode: @strictt\n", r#"mesh.mode: "strictt" is not accepted; write: permissive, strict"#),
        ("  mode: strict\n", "  captureAll: @yes\n", r#"mesh.captureAll: "yes" is no boolean; write true or false"#),
        (
            "port: 8080, mode",
            "port: @70000, mode",
            r#"workloads[0].ports[0].port: "70000" is no port; write a whole number from 1 to 65535"#,
        ),
        (
            "port: 8080, mode",
            "port@: , mode",
            "workloads[0].ports[0].port: nothing is no port; write a whole number from 1 to 65535",
        ),
        (
            "[10.77.0.2, \"fd00::2\"]",
            "@10.77.0.2",
            "workloads[0].addresses: a list, like [a, b], is expected here; see docs/configuration.md",
        ),
        ("node: node-a", "node: @{}", "node: a single value is expected here; see docs/configuration.md"),
        ("kind: NodeConfig", "kind@:", "kind: the value is missing; write one after the colon, or remove the field"),
        ("node: node-a", "node: node-a\n@node: x", r#"field "node" is given twice; remove one"#),
        // A missing field is reported at the last field that is there.
        (
            "    namespace: data\n    node: node-b\n    addr",
            "    node: node-b\n    @addr",
            r#"workloads[1]: field "namespace" is missing; add it"#,
        ),
        (
            ", targetPort: 8080",
            ", targetPort: 8080, @port: 81",
            r#"services[0].ports[0]: field "port" is given twice; remove one"#,
        ),
    ]);
}

#[test]
fn unknown_fields_everywhere() {
    check(&[
        (
            "node: node-a",
            "@nodes: node-a",
            r#"nodes: unknown field "nodes"; known here: apiVersion, kind, node, trustDomain, issuer, kubernetes, mesh, probes, accessLog, namespaces, workloads, services, policies"#,
        ),
        ("local: {", "@remote: {", r#"issuer.remote: unknown field "remote"; known here: local, files, istio"#),
        (
            "local: { caDir",
            "local: { @cadir",
            r#"issuer.local.cadir: unknown field "cadir"; known here: caDir, lifetime"#,
        ),
        (
            "local: { caDir: /run/underpass/ca }",
            "files: { @dir: x }",
            r#"issuer.files.dir: unknown field "dir"; known here: crlFile"#,
        ),
        (
            "  mode: strict\n",
            "  exclude: { @ports: [] }\n",
            r#"mesh.exclude.ports: unknown field "ports"; known here: outboundPorts, outboundCIDRs, inboundPorts"#,
        ),
        (
            "serviceAccount: web",
            "@serviceaccount: web",
            r#"workloads[0].serviceaccount: unknown field "serviceaccount"; known here: name, namespace, serviceAccount, trustDomain, node, labels, addresses, protocol, mode, ports, enroll"#,
        ),
        (
            "      netns: /run/netns/web",
            "      netns: /run/netns/web\n      @cgroups: x",
            r#"workloads[0].enroll.cgroups: unknown field "cgroups"; known here: netns, cgroup, captureAll, exclude, probePorts, certificate"#,
        ),
        (
            "endpoints: [{ workload: default/web }]",
            "endpoints: [{ workload: default/web, @weight: 1 }]",
            r#"services[0].endpoints[0].weight: unknown field "weight"; known here: workload, ports"#,
        ),
    ]);
}

#[test]
fn versions_and_names() {
    check(&[
        (
            "underpass.io/v1alpha1",
            "@underpass.io/v9",
            r#"apiVersion: "underpass.io/v9" is not supported; write underpass.io/v1alpha1"#,
        ),
        ("kind: NodeConfig", "kind: @Pod", r#"kind: "Pod" is not supported; write NodeConfig"#),
        (
            "trustDomain: cluster.local",
            "trustDomain: @Cluster",
            r#"trustDomain: trust domain "Cluster" must be 1 to 255 characters of a-z, 0-9, '.', '-' and '_'"#,
        ),
        (
            "serviceAccount: web",
            "serviceAccount: @../web",
            r#"workloads[0].serviceAccount: service account "../web" must be an RFC 1123 name: a-z, 0-9, '-' and '.', starting and ending with a letter or digit"#,
        ),
        (
            "namespace: data",
            "namespace: @Data",
            r#"workloads[1].namespace: namespace "Data" must be an RFC 1123 name: a-z, 0-9, '-' and '.', starting and ending with a letter or digit"#,
        ),
        (
            "- name: db",
            "- name: @\"d\\eb\"",
            r#"workloads[1].name: name "d\u{1b}b" must be an RFC 1123 name: a-z, 0-9, '-' and '.', starting and ending with a letter or digit"#,
        ),
        (
            "    node: node-b",
            "    node: @node_b",
            r#"workloads[1].node: node "node_b" must be an RFC 1123 name: a-z, 0-9, '-' and '.', starting and ending with a letter or digit"#,
        ),
        (
            "    vips: [10",
            "    hostname: @Web.example\n    vips: [10",
            r#"services[0].hostname: "Web.example" is no host name; write lower-case DNS labels, like web.default.svc.cluster.local"#,
        ),
        (
            "    vips: [10",
            "    hostname: @web..example\n    vips: [10",
            r#"services[0].hostname: "web..example" is no host name; write lower-case DNS labels, like web.default.svc.cluster.local"#,
        ),
    ]);
}

#[test]
fn issuers() {
    check(&[
        (
            "issuer:\n  local: { caDir: /run/underpass/ca }",
            "issuer@:\n",
            "issuer: no issuer is given; write one of local: {caDir: ...}, files: {} or istio: {address: ..., rootFile: ..., tokenFile: ...}",
        ),
        (
            "local: { caDir: /run/underpass/ca }",
            "@files: {}\n  local: { caDir: /x }",
            "issuer: local and files are given; keep one",
        ),
        (
            "local: { caDir: /run/underpass/ca }",
            "@istio: { address: \"https://ca:15012\", rootFile: /r, tokenFile: /t }\n  local: { caDir: /x }",
            "issuer: local and istio are given; keep one",
        ),
        (
            "local: { caDir: /run/underpass/ca }",
            "istio: { address: @\"http://ca:15012\", rootFile: /r, tokenFile: /t }",
            r#"issuer.istio.address: "http://ca:15012" is no address of an authority; write https://HOST:PORT, like https://underpass-ca.underpass-system.svc:15012"#,
        ),
        (
            "local: { caDir: /run/underpass/ca }",
            "istio: { address: \"https://ca:15012\", rootFile: @r, tokenFile: /t }",
            r#"issuer.istio.rootFile: "r" must be an absolute path without "..", shorter than 4096 bytes"#,
        ),
        (
            "local: { caDir: /run/underpass/ca }",
            "files: { crlFile: @crl.pem }",
            r#"issuer.files.crlFile: "crl.pem" must be an absolute path without "..", shorter than 4096 bytes"#,
        ),
        (
            "local: { caDir: /run/underpass/ca }",
            "istio: { address: \"https://ca:15012\", rootFile: /r, tokenFile: /t, crlFile: @crl.pem }",
            r#"issuer.istio.crlFile: "crl.pem" must be an absolute path without "..", shorter than 4096 bytes"#,
        ),
        (
            "local: { caDir: /run/underpass/ca }",
            "istio: { address: \"https://ca:15012\", rootFile: /r, tokenFile: @/t/../u }",
            r#"issuer.istio.tokenFile: "/t/../u" must be an absolute path without "..", shorter than 4096 bytes"#,
        ),
        (
            "local: { caDir: /run/underpass/ca }",
            "istio: { address: \"https://ca:15012\", rootFile: /r, tokenFile: /t, clusterId: @a b }",
            r#"issuer.istio.clusterId: "a b" must be 1 to 253 printable ASCII characters without spaces, like Kubernetes"#,
        ),
        (
            "local: { caDir: /run/underpass/ca }",
            "istio: { address: \"https://ca:15012\", rootFile: /r, tokenFile: /t, lifetime: @24 }",
            r#"issuer.istio.lifetime: "24" is no duration; write a number and a unit, like 30s, 15m or 24h"#,
        ),
        (
            "local: { caDir: /run/underpass/ca }",
            "istio: { address: \"https://ca:15012\", rootFile: /r, tokenFile: /t, serverName: @Istiod! }",
            r#"issuer.istio.serverName: server name "Istiod!" must be an RFC 1123 name: a-z, 0-9, '-' and '.', starting and ending with a letter or digit"#,
        ),
        (
            "local: { caDir: /run/underpass/ca }",
            "istio: { address: \"https://ca:15012\", @rootFile: /r }",
            r#"issuer.istio: field "tokenFile" is missing; add it"#,
        ),
        (
            "local: { caDir: /run/underpass/ca }",
            "istio: { @url: x }",
            r#"issuer.istio.url: unknown field "url"; known here: address, rootFile, tokenFile, clusterId, lifetime, serverName, crlFile"#,
        ),
        (
            "local: { caDir: /run/underpass/ca }",
            "local: { caDir: @ca }",
            r#"issuer.local.caDir: "ca" must be an absolute path without "..", shorter than 4096 bytes"#,
        ),
        (
            "caDir: /run/underpass/ca }",
            "caDir: /x, lifetime: @5 }",
            r#"issuer.local.lifetime: "5" is no duration; write a number and a unit, like 30s, 15m or 24h"#,
        ),
        (
            "caDir: /run/underpass/ca }",
            "caDir: /x, lifetime: @2years }",
            r#"issuer.local.lifetime: "2years" is out of range; write 1s to 1year"#,
        ),
        (
            "      netns: /run/netns/web",
            "      netns: /run/netns/web\n      certificate: @{ certificate: /c, key: /k, roots: /r }",
            "workloads[0].enroll.certificate: certificate paths are read by the files issuer only, and the issuer is local; remove them",
        ),
    ]);
    let files = BASE.replace("local: { caDir: /run/underpass/ca }", "files: {}");
    assert_eq!(
        refusal(&files),
        "n.yaml:17:7: workloads[0].enroll: default/web has no certificate and the issuer is files; add certificate: {certificate: ..., key: ..., roots: ...}"
    );
    let files = files.replace(
        "      netns: /run/netns/web",
        "      netns: /run/netns/web\n      certificate: { certificate: c.pem, key: /k, roots: /r }",
    );
    assert_eq!(
        refusal(&files),
        r#"n.yaml:18:35: workloads[0].enroll.certificate.certificate: "c.pem" must be an absolute path without "..", shorter than 4096 bytes"#
    );
}

#[test]
fn addresses_and_networks() {
    check(&[
        (
            "10.77.1.2",
            "@10.77.1.256",
            r#"workloads[1].addresses[0]: "10.77.1.256" is no IP address; write one like 10.0.0.1 or "fd00::1""#,
        ),
        (
            "10.77.1.2",
            "@10.77.0.2",
            "workloads[1].addresses[0]: address 10.77.0.2 belongs to workload default/web and to workload data/db; an address identifies one workload or service",
        ),
        (
            "10.77.1.2",
            "@\"::ffff:10.77.0.2\"",
            "workloads[1].addresses[0]: address 10.77.0.2 belongs to workload default/web and to workload data/db; an address identifies one workload or service",
        ),
        (
            "10.77.1.2",
            "10.77.1.2, @10.77.1.2",
            "workloads[1].addresses[1]: address 10.77.1.2 is listed twice; remove one",
        ),
        (
            "10.77.1.2",
            "@127.0.0.1",
            "workloads[1].addresses[0]: address 127.0.0.1 of workload data/db is loopback, unspecified, link-local or multicast; use an address that other nodes can reach",
        ),
        (
            "10.77.1.2",
            "@\"fe80::1\"",
            "workloads[1].addresses[0]: address fe80::1 of workload data/db is loopback, unspecified, link-local or multicast; use an address that other nodes can reach",
        ),
        (
            "web\n    namespace: default\n    serviceAccount: web\n    addresses: [10.77.0.2, \"fd00::2\"]",
            "@web\n    namespace: default\n    addresses: []",
            "workloads[0].name: local workload default/web has no address; list at least one under `addresses`",
        ),
        (
            "10.96.0.10",
            "@10.77.1.2",
            "services[0].vips[0]: address 10.77.1.2 belongs to workload data/db and to service default/web; an address identifies one workload or service",
        ),
        (
            "10.96.0.10",
            "10.96.0.10, @224.0.0.1",
            "services[0].vips[1]: address 224.0.0.1 of service default/web is loopback, unspecified, link-local or multicast; use an address that other nodes can reach",
        ),
        (
            "10.0.0.0/16",
            "@10.0.0.0/33",
            r#"mesh.cidrs[0]: "10.0.0.0/33" is no network; write ADDRESS/LENGTH, like 10.0.0.0/16 or "fd00::/64""#,
        ),
        (
            "10.0.0.0/16",
            "@10.0.1.0/16",
            r#"mesh.cidrs[0]: "10.0.1.0/16" has bits set beyond its length; write 10.0.0.0/16"#,
        ),
        (
            "10.0.0.0/16",
            "@0.0.0.0/0",
            r#"mesh.cidrs[0]: "0.0.0.0/0" is every address; set mesh.captureAll: true instead"#,
        ),
        (
            "10.0.0.0/16",
            "@127.0.0.0/8",
            r#"mesh.cidrs[0]: "127.0.0.0/8" is loopback, link-local or multicast, which never leaves a pod for another node; remove it"#,
        ),
        (
            "10.0.0.0/16",
            "@\"::ffff:10.0.0.0/112\"",
            r#"mesh.cidrs[0]: "::ffff:10.0.0.0/112" is an IPv4 network written as IPv6; write it as IPv4"#,
        ),
        (
            "  mode: strict\n",
            "  exclude: { outboundCIDRs: [@10.1.2.3] }\n",
            r#"mesh.exclude.outboundCIDRs[0]: "10.1.2.3" is no network; write ADDRESS/LENGTH, like 10.0.0.0/16 or "fd00::/64""#,
        ),
    ]);
}

#[test]
fn ports() {
    check(&[
        (
            "port: 8080, mode",
            "port: @0, mode",
            "workloads[0].ports[0].port: port 0 does not exist; write a number from 1 to 65535",
        ),
        (
            "port: 8080, mode",
            "port: @15008, mode",
            "workloads[0].ports[0].port: port 15008 is one of the agent's own inside every pod; use another port",
        ),
        (
            "mode: permissive }]",
            "mode: strict }, { port: @8080, mode: strict }]",
            "workloads[0].ports[1].port: port 8080 is listed twice; remove one",
        ),
        (
            "  mode: strict\n",
            "  exclude: { inboundPorts: [@15107] }\n",
            "mesh.exclude.inboundPorts[0]: port 15107 is one of the agent's own inside every pod; use another port",
        ),
        (
            "  mode: strict\n",
            "  exclude: { outboundPorts: [25, @25] }\n",
            "mesh.exclude.outboundPorts[1]: port 25 is listed twice; remove one",
        ),
        (
            "[{ port: 80, targetPort: 8080 }]",
            "@[]",
            "services[0].ports: service default/web has no port; add at least one, like {port: 80, targetPort: 8080}",
        ),
        (
            "port: 80, targetPort: 8080",
            "port: 80, targetPort: @0",
            "services[0].ports[0].targetPort: port 0 does not exist; write a number from 1 to 65535",
        ),
        (
            "port: 80, targetPort: 8080",
            "port: @15001",
            "services[0].ports[0].port: port 15001 is one of the agent's own inside every pod; use another port",
        ),
        (
            "workload: default/web }",
            "workload: default/web, ports: [{ port: @80 }] }",
            "services[0].endpoints[0].ports[0]: port 80 has no targetPort; an endpoint lists only ports it maps elsewhere: add it",
        ),
        (
            "workload: default/web }",
            "workload: default/web, ports: [{ port: @81, targetPort: 1 }] }",
            "services[0].endpoints[0].ports[0].port: port 81 is not among the service's ports; add it there or remove it here",
        ),
    ]);
}

#[test]
fn references_and_duplicates() {
    check(&[
        (
            "workload: default/web",
            "workload: @default/wep",
            r#"services[0].endpoints[0].workload: "default/wep" is not among the workloads of this document; add it there or correct the name"#,
        ),
        (
            "workload: default/web",
            "workload: @web",
            r#"services[0].endpoints[0].workload: "web" is no workload; write NAMESPACE/NAME"#,
        ),
        (
            "workload: default/web }",
            "workload: default/web }, { workload: @default/web }",
            "services[0].endpoints[1].workload: workload default/web is listed twice; remove one",
        ),
        (
            "- name: db\n    namespace: data",
            "- name: @web\n    namespace: default",
            "workloads[1].name: workload default/web is defined twice; give one of them another name or namespace",
        ),
        (
            "services:\n  - name: web",
            "services:\n  - { name: web, namespace: default, ports: [{ port: 1 }] }\n  - name: @web",
            "services[1].name: service default/web is defined twice; give one of them another name or namespace",
        ),
        (
            "services:\n  - name: web",
            "services:\n  - { name: x, namespace: default, hostname: web.default.svc.cluster.local, ports: [{ port: 1 }] }\n  - name: @web",
            r#"services[1].hostname: host name "web.default.svc.cluster.local" belongs to service default/x already; give one of them another"#,
        ),
    ]);
}

#[test]
fn enrolment() {
    check(&[
        (
            "    node: node-b\n",
            "    node: node-b\n    enroll: @{ netns: /run/netns/db }\n",
            "workloads[1].enroll: data/db runs on node node-b, and this node is node-a; only a node's own workloads are enrolled: remove enroll or correct node",
        ),
        (
            "    node: node-b\n",
            "    enroll: { netns: @/run/./netns//web }\n",
            "workloads[1].enroll.netns: network namespace /run/netns/web already belongs to workload default/web; a pod has its own, or enrol only one of them",
        ),
        (
            "    enroll:\n      netns",
            "    protocol: plain\n    enroll:\n      @netns",
            "workloads[0].enroll: default/web is enrolled, so peers reach it through the tunnel; remove protocol: plain, or enroll",
        ),
        (
            "    node: node-b\n",
            "    protocol: plain\n    mode: @strict\n",
            "workloads[1].mode: a workload with protocol: plain is reached by plaintext only, which strict refuses; remove one of them",
        ),
        (
            "netns: /run/netns/web",
            "netns: @/run/../netns/web",
            r#"workloads[0].enroll.netns: "/run/../netns/web" must be an absolute path without "..", shorter than 4096 bytes"#,
        ),
        (
            "netns: /run/netns/web",
            "netns: /run/netns/web\n      cgroup: @kubepods",
            r#"workloads[0].enroll.cgroup: "kubepods" must be an absolute path without "..", shorter than 4096 bytes"#,
        ),
    ]);
}

#[test]
fn documents_that_are_no_document() {
    for (text, expected) in [
        ("", "n.yaml:1:1: the document is empty or ends too early; see docs/configuration.md"),
        ("[]", "n.yaml:1:1: a mapping of fields, like {name: value}, is expected here; see docs/configuration.md"),
        ("hello", "n.yaml:1:1: a mapping of fields, like {name: value}, is expected here; see docs/configuration.md"),
    ] {
        assert_eq!(refusal(text), expected);
    }
    let two = refusal(&format!("{BASE}---\nkind: NodeConfig\n"));
    assert!(two.contains("a second YAML document follows; keep one document per file"), "{two}");
}

#[test]
fn bombs_are_refused_early() {
    let large = refusal(&" ".repeat(MAX_DOCUMENT + 1));
    assert!(large.contains("16777217 bytes, at most 16777216"), "{large}");

    let deep = refusal(&"{".repeat(100_000));
    assert!(deep.len() < 1000 && deep.contains("recursion limit"), "{deep}");

    let mut laughs = String::from("apiVersion: &a0 [x]\n");
    for i in 1..40 {
        writeln!(laughs, "k{i}: &a{i} [*a{p}, *a{p}, *a{p}, *a{p}, *a{p}]", p = i - 1).unwrap();
    }
    let laughs = refusal(&laughs);
    assert!(laughs.len() < 1000, "{laughs}");

    // The same through a field whose value is skipped by nothing: a list of addresses made of aliases.
    let mut lists = format!("{BASE}x: &a0 [10.0.0.1, 10.0.0.2]\n");
    for i in 1..30 {
        writeln!(lists, "y{i}: &a{i} [*a{p}, *a{p}, *a{p}]", p = i - 1).unwrap();
    }
    assert!(refusal(&lists).contains("unknown field"), "unknown fields end the parse before their value is expanded");

    let long = refusal(&format!("{BASE}{}: 1\n", "n".repeat(100_000)));
    assert!(long.len() < 1500, "{} bytes of message", long.len());
}
