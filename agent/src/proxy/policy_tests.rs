use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{Enforcement, Hold};
use crate::{
    mesh::{
        Action, Exclusions, InboundMode, Labels, LocalPod, MeshSettings, ModeSource, PodNamespace, Policy, PolicyKey,
        Protocol, Rule, Scope, Snapshot, SnapshotBuilder, SpiffeId, Workload, WorkloadKey, WorkloadPolicy,
    },
    policy::{Disposition, NodePolicies},
    proxy::hold::ARRIVAL,
};

fn workload() -> WorkloadKey {
    WorkloadKey { namespace: "shop".into(), name: "web".into() }
}

fn policy(name: &str) -> PolicyKey {
    PolicyKey { namespace: "shop".into(), name: name.into() }
}

/// A node with one workload that names these policies, of which those exist that are `known`, with
/// what they do.
fn mesh(names: &[&str], known: &[(&str, Action)]) -> Arc<Snapshot> {
    let mut builder = SnapshotBuilder::new("n", "td.test".parse().unwrap(), MeshSettings::default());
    let local = LocalPod {
        netns: PodNamespace::at("/run/netns/web".into()),
        cgroup: None,
        exclude: Exclusions::default(),
        capture_all: false,
        probe_ports: Vec::new(),
        files: None,
        uid: None,
    };
    let web = Workload {
        key: workload(),
        identity: peer(),
        node: "n".into(),
        addresses: vec![to().ip()],
        protocol: Protocol::Underpass,
        mode: InboundMode::Permissive,
        port_modes: Vec::new(),
        local: Some(local),
    };
    builder.workload(web).unwrap();
    let policies = names.iter().map(|name| policy(name)).collect();
    let facts = WorkloadPolicy { labels: Labels::default(), policies, mode_set_by: ModeSource::default() };
    builder.workload_policy(&workload(), facts);
    for (name, action) in known {
        let (key, rules) = (policy(name), vec![Rule::default()]);
        let (action, selector) = (*action, Labels::default());
        builder
            .policy(Policy { key, scope: Scope::Named, selector, action, dry_run: false, rules, invalid: None })
            .unwrap();
    }
    Arc::new(builder.build())
}

fn peer() -> SpiffeId {
    SpiffeId::new("td.test".parse().unwrap(), "shop", "web").unwrap()
}

fn from() -> IpAddr {
    "10.0.0.9".parse().unwrap()
}

fn to() -> SocketAddr {
    "10.0.0.1:80".parse().unwrap()
}

/// What a policy does that arrives says what becomes of the connection that waited for it.
#[tokio::test]
async fn a_new_connection_waits_for_the_policy() {
    for (arrives, allowed) in [(Action::Allow, true), (Action::Deny, false)] {
        for plaintext in [false, true] {
            let missing = mesh(&["late"], &[]);
            let enforcement = Arc::new(Enforcement::new(Arc::clone(&missing)));
            assert!(enforcement.set(&missing));
            assert_eq!(enforcement.plaintext_rules(&workload()).of(80), Disposition::Evaluate);
            let waiting = Arc::clone(&enforcement);
            let admitted = tokio::spawn(async move {
                if plaintext {
                    waiting.plaintext(&workload(), from(), to()).await
                } else {
                    waiting.tunnel(&workload(), &peer(), from(), to()).await
                }
            });
            // Something else changes.
            tokio::time::sleep(Duration::from_millis(50)).await;
            enforcement.set(&mesh(&["late"], &[("other", Action::Allow)]));
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(!admitted.is_finished(), "it has not arrived yet");
            assert!(!enforcement.forbids_plaintext(&workload(), from(), to()), "what is open is left alone");
            enforcement.set(&mesh(&["late"], &[("late", arrives)]));
            assert_eq!(admitted.await.unwrap().is_ok(), allowed, "{arrives} {plaintext}");
            assert_eq!(enforcement.forbids_plaintext(&workload(), from(), to()), !allowed);
            assert_eq!(enforcement.due(), None);
        }
    }
}

#[test]
fn the_time_is_that_of_the_policy_and_begins_once() {
    let (hold, start) = (Hold::default(), Instant::now());
    let compiled = |names: &[&str], known: &[(&str, Action)]| NodePolicies::compile(&mesh(names, known));
    let second = Duration::from_secs(1);
    hold.set(&compiled(&["a"], &[]), start);
    assert_eq!((hold.until(&workload(), start), hold.due()), (Some(start + ARRIVAL), Some(start + ARRIVAL)));
    hold.set(&compiled(&["a", "b"], &[]), start + second);
    assert_eq!(hold.until(&workload(), start + second), Some(start + ARRIVAL), "the first one decides");
    assert!(hold.take_over(start + second).is_empty());
    // The first arrives: the second has its own time.
    hold.set(&compiled(&["a", "b"], &[("a", Action::Allow)]), start + 2 * second);
    let end = start + second + ARRIVAL;
    assert_eq!(hold.until(&workload(), start + ARRIVAL), Some(end));
    assert_eq!((hold.until(&workload(), end), hold.due()), (None, Some(end)));
    assert_eq!(hold.take_over(end), [workload()]);
    assert_eq!((hold.take_over(end).len(), hold.due()), (0, None), "each is told once");
    // As long as it is missing, nobody waits for it again.
    hold.set(&compiled(&["b"], &[]), end + second);
    assert_eq!((hold.until(&workload(), end + second), hold.due()), (None, None));
    hold.set(&compiled(&["b"], &[("b", Action::Allow)]), end + 2 * second);
    assert_eq!((hold.until(&workload(), end), hold.due()), (None, None));
    hold.set(&compiled(&["b"], &[]), end + 3 * second);
    assert_eq!(hold.due(), Some(end + 3 * second + ARRIVAL), "missing again");
}
