//! The policy loader: any text is refused with a bounded message, or policies whose compiled form agrees with the rules
//! read literally.
#![no_main]

use std::net::SocketAddr;

use libfuzzer_sys::fuzz_target;
use underpass::{
    mesh::{PolicyStatus, Snapshot, SpiffeId},
    policy::{Disposition, NodePolicies, Peer, Query, Request, explain, plaintext_rules, summaries},
    sources::file::parse,
};

/// Everything but the policies; the input goes behind it.
const HEAD: &str = r#"apiVersion: underpass.io/v1alpha1
kind: NodeConfig
node: a
trustDomain: td
issuer: { files: {} }
workloads:
  - { name: w, namespace: a, labels: { app: w }, addresses: [10.0.0.1, "fd00::1"] }
  - name: l
    namespace: b
    addresses: [10.0.0.2]
    enroll: { netns: /n, certificate: { certificate: /c, key: /k, roots: /r } }
policies:
"#;

fuzz_target!(|text: &str| {
    match parse("fuzz.yaml", &format!("{HEAD}{text}")) {
        Ok(config) => used(&config.snapshot),
        Err(e) => {
            assert!(e.0.starts_with("fuzz.yaml") && e.0.len() < 8192, "{e:?}");
            assert!(!e.0.chars().any(char::is_control), "{e:?}");
        }
    }
});

fn used(snapshot: &Snapshot) {
    let identity: SpiffeId = "spiffe://td/ns/a/sa/x".parse().expect("an identity");
    for policy in summaries(snapshot).policies {
        if let PolicyStatus::Invalid { reason } = policy.status {
            assert!(!reason.is_empty());
        }
    }
    let node = NodePolicies::compile(snapshot);
    for workload in snapshot.local_workloads() {
        let set = node.of(&workload.key).expect("compiled");
        let plaintext = plaintext_rules(snapshot, workload, set);
        for peer in [None, Some(&identity)] {
            for source in ["10.0.0.9", "::ffff:192.0.2.1", "fd00::9"].map(|s| s.parse().expect("an address")) {
                for port in [1, 80, 443] {
                    let destination = SocketAddr::new(workload.addresses[0], port);
                    let verdict = set.evaluate(&Request { peer, source, destination });
                    let asked = match peer {
                        Some(identity) => Peer::Mesh { identity: identity.clone(), source: Some(source) },
                        None => Peer::Plaintext(source),
                    };
                    let explained = explain(snapshot, &Query { peer: asked, to: destination }).expect("a destination");
                    let explanation = &explained.explanations[0];
                    assert_eq!(explanation.policy.allowed, verdict.is_allowed());
                    let enforced = || explanation.considered.iter().filter(|c| !c.dry_run && c.matches);
                    match &explanation.policy.decided_by {
                        Some(by) => assert!(enforced().any(|c| c.policy == by.policy && c.rule == by.rule)),
                        None => assert!(enforced().all(|c| c.action.is_some_and(|a| a.to_string() == "AUDIT"))),
                    }
                    if peer.is_none() {
                        match plaintext.of(port) {
                            Disposition::Allow => assert!(explanation.allowed),
                            Disposition::Deny => assert!(!explanation.allowed),
                            Disposition::Evaluate => {}
                        }
                    }
                }
            }
        }
    }
}
