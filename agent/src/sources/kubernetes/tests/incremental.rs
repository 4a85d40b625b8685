//! What is made of changes is what would be made of everything anew.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::support::{NODE, Scene};
use crate::{
    mesh::{InboundMode, Resolution, Snapshot},
    sources::kubernetes::{compile::Compiled, watch::Seen},
};

const NAMESPACES: [&str; 3] = ["one", "two", "istio-system"];
/// Few, so that pods and services claim the same ones. The last can be nobody's.
const ADDRESSES: [&str; 8] =
    ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "fd00::1", "10.0.0.6", "169.254.0.1"];

/// Numbers that a change is made of, one after the other.
struct Dice<'a>(std::slice::Iter<'a, u8>);

impl Dice<'_> {
    fn roll(&mut self, sides: usize) -> usize {
        self.0.next().map_or(0, |n| usize::from(*n) % sides)
    }

    fn one_of<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len())].clone()
    }

    /// One time in so many.
    fn rarely(&mut self, times: usize) -> bool {
        self.roll(times) == times - 1
    }

    fn address(&mut self) -> &'static str {
        // The unusable one is rarer than the others.
        ADDRESSES[self.roll(2 * ADDRESSES.len() - 1) % ADDRESSES.len()]
    }

    fn addresses(&mut self) -> Vec<&'static str> {
        (0..self.one_of(&[1, 1, 1, 2, 2, 0])).map(|_| self.address()).collect()
    }

    fn name(&mut self, kind: &str, of: usize) -> String {
        format!("{kind}-{}", self.roll(of))
    }

    fn metadata(&mut self, kind: &str, of: usize) -> Value {
        let created = format!("2026-01-0{}T00:00:00Z", 1 + self.roll(2));
        json!({ "namespace": self.one_of(&NAMESPACES), "name": self.name(kind, of), "creationTimestamp": created })
    }

    fn labels(&mut self) -> Value {
        let mut labels = self.one_of(&[
            json!({ "underpass.io/mode": "enabled" }),
            json!({ "istio.io/dataplane-mode": "ambient" }),
            json!({}),
            json!({ "underpass.io/mode": "disabled" }),
        ]);
        labels["app"] = json!(self.name("app", 2));
        labels
    }

    fn annotations(&mut self) -> Value {
        self.one_of(&[json!({}), json!({}), json!({ "underpass.io/exclude-outbound-ports": "1,x" })])
    }

    fn pod(&mut self) -> Value {
        let mut metadata = self.metadata("pod", 4);
        metadata["labels"] = self.labels();
        metadata["annotations"] = self.annotations();
        metadata["uid"] = json!(self.name("uid", 2));
        if self.rarely(4) {
            metadata["deletionTimestamp"] = json!("2026-02-01T00:00:00Z");
        }
        let ips: Vec<Value> = self.addresses().into_iter().map(|ip| json!({ "ip": ip })).collect();
        json!({
            "kind": "Pod", "metadata": metadata,
            "spec": { "nodeName": self.one_of(&[NODE, "node-b", ""]), "hostNetwork": self.rarely(6),
                "serviceAccountName": self.one_of(&["web", "api", "no account"]) },
            "status": { "phase": self.one_of(&["Running", "Running", "Pending", "Failed"]), "podIPs": ips },
        })
    }

    fn namespace(&mut self) -> Value {
        let (labels, annotations) = (self.labels(), self.annotations());
        json!({ "kind": "Namespace", "metadata": { "name": self.one_of(&NAMESPACES), "labels": labels, "annotations": annotations } })
    }

    fn service(&mut self) -> Value {
        let policy = self.one_of(&["Cluster", "Cluster", "Local"]);
        json!({ "kind": "Service", "metadata": self.metadata("service", 3),
            "spec": { "clusterIPs": self.addresses(), "ports": [{ "name": "http", "port": 80 }], "internalTrafficPolicy": policy } })
    }

    fn slice(&mut self) -> Value {
        let mut metadata = self.metadata("slice", 3);
        metadata["labels"] = json!({ "kubernetes.io/service-name": self.name("service", 3) });
        let endpoints: Vec<_> = (0..self.roll(4)).map(|_| self.endpoint(&metadata["namespace"])).collect();
        json!({ "kind": "EndpointSlice", "metadata": metadata, "addressType": "IPv4", "endpoints": endpoints,
            "ports": [{ "name": "http", "port": self.one_of(&[8080, 8080, 9090]) }] })
    }

    fn endpoint(&mut self, namespace: &Value) -> Value {
        let namespace = if self.rarely(4) { json!(self.one_of(&NAMESPACES)) } else { namespace.clone() };
        let mut endpoint = json!({ "addresses": [self.address()], "nodeName": self.one_of(&[NODE, "node-b"]),
            "conditions": { "ready": !self.rarely(4), "serving": true, "terminating": true } });
        if !self.rarely(5) {
            endpoint["targetRef"] = json!({ "kind": "Pod", "namespace": namespace, "name": self.name("pod", 4) });
            if self.rarely(3) {
                endpoint["targetRef"]["uid"] = json!(self.name("uid", 2));
            }
        }
        if self.rarely(3) {
            endpoint["hints"] = json!({ "forZones": [{ "name": self.name("zone", 2) }] });
        }
        endpoint
    }

    fn node(&mut self) -> Value {
        json!({ "kind": "Node",
            "metadata": { "name": NODE, "labels": { "topology.kubernetes.io/zone": self.name("zone", 2) } },
            "status": { "addresses": [{ "type": "InternalIP", "address": self.one_of(&["192.0.2.1", "192.0.2.2"]) }] } })
    }

    fn policy(&mut self) -> Value {
        let spec = self.one_of(&[
            json!({ "action": "ALLOW", "rules": [{}] }),
            json!({ "rules": [{ "to": [{ "operation": { "ports": ["http"] } }] }] }),
            json!({ "targetRefs": [{ "kind": "Gateway", "name": "w" }] }),
        ]);
        json!({ "kind": "AuthorizationPolicy", "metadata": self.metadata("policy", 2), "spec": spec })
    }

    fn authentication(&mut self) -> Value {
        let mut spec = json!({ "mtls": { "mode": self.one_of(&["STRICT", "PERMISSIVE", "SOMETIMES"]) } });
        if self.rarely(3) {
            spec["selector"] = json!({ "matchLabels": { "app": self.name("app", 2) } });
        }
        json!({ "kind": "PeerAuthentication", "metadata": self.metadata("authentication", 2), "spec": spec })
    }

    fn object(&mut self) -> Value {
        match self.roll(12) {
            0..=3 => self.pod(),
            4 | 5 => self.slice(),
            6 | 7 => self.service(),
            8 => self.namespace(),
            9 => self.node(),
            10 => self.policy(),
            _ => self.authentication(),
        }
    }

    /// Something happens.
    fn happen(&mut self, scene: &mut Scene, now: &mut Instant) {
        match self.roll(24) {
            0..=15 => drop(scene.apply(self.object())),
            16..=18 => drop(scene.delete(self.object())),
            19 => {
                let objects: Vec<_> = (0..self.roll(4)).map(|_| self.pod()).collect();
                scene.change(json!({ "kind": "Pod" }), |_| Seen::ListBegins);
                for object in objects {
                    scene.change(object, Seen::Listed);
                }
                scene.change(json!({ "kind": "Pod" }), |_| Seen::ListEnds);
            }
            20 => {
                let settings = &mut scene.base.settings;
                settings.mode = self.one_of(&[InboundMode::Strict, InboundMode::Permissive]);
                settings.probes.node_addresses = self.one_of(&[vec![], vec![IpAddr::from([192, 0, 2, 9])]]);
                settings.probes.from_node_addresses = self.one_of(&[false, true]);
            }
            _ => *now += Duration::from_millis(self.one_of(&[1, 700, 1_999, 2_000, 5_000])),
        }
    }
}

/// Everything that can be asked of a snapshot and a compilation.
fn told(compiled: &Compiled) -> impl PartialEq + std::fmt::Debug + use<> {
    let snapshot = &compiled.snapshot;
    let resolved = ADDRESSES.map(|address| match snapshot.resolve(address.parse().unwrap()) {
        Resolution::Workload(w) => format!("{w:?}"),
        Resolution::Service(s) => format!("{s:?}"),
        Resolution::Held(held) => format!("{held:?}"),
        Resolution::Unknown => String::new(),
    });
    let mut workloads: Vec<_> =
        snapshot.workloads().map(|w| format!("{w:?} {:?}", snapshot.workload_policy(&w.key))).collect();
    workloads.sort();
    let services: Vec<_> = snapshot
        .services()
        .iter()
        .inspect(|s| assert!(Arc::ptr_eq(s, snapshot.service_named(&s.hostname).unwrap())))
        .map(|s| format!("{s:?}"))
        .collect();
    let local: Vec<_> = snapshot.local_workloads().map(|w| w.key.clone()).collect();
    let captured: BTreeSet<IpAddr> = snapshot.captured_addresses().collect();
    let held: Vec<_> =
        ADDRESSES.map(|address| snapshot.held_at(address.parse().unwrap())).map(|h| format!("{h:?}")).into();
    let policies: Vec<_> = snapshot.policies().map(|p| format!("{p:?}")).collect();
    let mut problems: Vec<_> = compiled.problems.iter().map(|p| (p.object.clone(), p.problem.clone())).collect();
    problems.sort();
    (
        (resolved, workloads, services, local, held),
        (captured, policies, snapshot.settings.clone(), problems),
        (compiled.due, compiled.complete),
    )
}

/// The delta names every address that is captured in one of the two and not in the other.
fn assert_delta(before: &Snapshot, after: &Snapshot) {
    let [old, new] = [before, after].map(|s| s.captured_addresses().collect::<BTreeSet<_>>());
    let told: BTreeSet<_> =
        after.captured_apart(before).filter(|a| before.captures(*a) != after.captures(*a)).collect();
    assert_eq!(told, old.symmetric_difference(&new).copied().collect());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 512 } else { 2_000 }))]
    #[test]
    fn any_changes_make_what_everything_anew_makes(
        changes in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 24), 1..80),
    ) {
        let (mut scene, mut now) = (Scene::new(), Instant::now());
        let mut last = scene.compile_at(now);
        for change in &changes {
            let mut dice = Dice(change.iter());
            // Most changes are compiled one by one, some together.
            let more = dice.rarely(4);
            dice.happen(&mut scene, &mut now);
            if more {
                continue;
            }
            let (next, anew) = (scene.compile_at(now), scene.compile_anew_at(now));
            prop_assert_eq!(told(&next), told(&anew));
            prop_assert!(next.snapshot.says_the_same(&anew.snapshot) && anew.snapshot.says_the_same(&next.snapshot));
            assert_delta(&last.snapshot, &next.snapshot);
            assert_delta(&last.snapshot, &anew.snapshot);
            last = next;
        }
    }
}

#[test]
fn a_change_leaves_alone_what_it_does_not_concern() {
    let mut scene = Scene::new();
    let pod = |name: &str, ip: &str, account: &str| {
        json!({ "kind": "Pod", "metadata": { "namespace": "one", "name": name, "uid": name, "labels": { "underpass.io/mode": "enabled" } },
            "spec": { "nodeName": "node-b", "serviceAccountName": account }, "status": { "phase": "Running", "podIPs": [{ "ip": ip }] } })
    };
    let slice = |service: &str, pod: &str, ip: &str| {
        json!({ "kind": "EndpointSlice", "addressType": "IPv4", "ports": [{ "name": "http", "port": 8080 }],
            "metadata": { "namespace": "one", "name": format!("{service}-1"), "labels": { "kubernetes.io/service-name": service } },
            "endpoints": [{ "addresses": [ip], "targetRef": { "kind": "Pod", "name": pod } }] })
    };
    for (i, name) in ["a", "b"].into_iter().enumerate() {
        let (ip, vip) = (format!("10.0.0.{}", 1 + i), format!("10.96.0.{}", 1 + i));
        scene.apply(pod(name, &ip, "web"));
        scene.apply(json!({ "kind": "Service", "metadata": { "namespace": "one", "name": name },
            "spec": { "clusterIPs": [vip], "ports": [{ "name": "http", "port": 80 }] } }));
        scene.apply(slice(name, name, &ip));
    }
    let before = scene.compile().snapshot;
    assert!(scene.apply(pod("a", "10.0.0.1", "other")));
    let after = scene.compile().snapshot;
    let same = |ip: &str| match (before.resolve(ip.parse().unwrap()), after.resolve(ip.parse().unwrap())) {
        (Resolution::Workload(a), Resolution::Workload(b)) => Arc::ptr_eq(&a, &b),
        (Resolution::Service(a), Resolution::Service(b)) => Arc::ptr_eq(&a, &b),
        other => panic!("{ip}: {other:?}"),
    };
    assert_eq!(["10.0.0.1", "10.96.0.1", "10.0.0.2", "10.96.0.2"].map(same), [false, false, true, true]);
    assert_eq!(after.services()[0].endpoints[0].workload.identity.service_account(), "other");
    assert!(after.shares_policies(&before) && after.shares_local_workloads(&before));
    assert_eq!(after.captured_apart(&before).count(), 0);
}
