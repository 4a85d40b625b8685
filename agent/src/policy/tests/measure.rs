//! What an evaluation costs. Run with `cargo test -p underpass --lib policy::tests::measure -- --ignored --nocapture`.

#![expect(clippy::cast_precision_loss, reason = "figures for people")]

use std::{fmt::Write as _, hint::black_box, net::SocketAddr, time::Instant};

use super::*;

const POLICIES: usize = 1000;
const ROUNDS: u32 = 20_000;

/// A document with a thousand policies for `foo`, each with the rule that `rule` writes.
fn thousand(rule: impl Fn(usize) -> String) -> Snapshot {
    let mut text = String::new();
    for i in 0..POLICIES {
        writeln!(
            text,
            "  - {{ name: p{i}, namespace: foo, action: {}, rules: [{}] }}",
            if i % 4 == 0 { "DENY" } else { "ALLOW" },
            rule(i)
        )
        .unwrap();
    }
    mesh(&text)
}

fn nanoseconds(snapshot: &Snapshot, peer: Option<&SpiffeId>) -> (f64, bool) {
    let node = NodePolicies::compile(snapshot);
    let set = node.of(&key("foo/httpbin")).unwrap();
    assert_eq!(set.selection().policies.len(), POLICIES, "every policy selects the workload");
    let request = Request { peer, source: ip("10.200.3.77"), destination: SocketAddr::new(ip("10.0.0.1"), 8080) };
    let run = || (0..ROUNDS).filter(|_| black_box(set).evaluate(black_box(&request)).is_allowed()).count();
    run();
    let start = Instant::now();
    let allowed = run() > 0;
    (start.elapsed().as_nanos() as f64 / f64::from(ROUNDS), allowed)
}

/// A quarter of the policies deny. Nothing matches but in the last case, so that no policy ends the search early; the
/// cases differ in what has to be looked up and in how many rows stay alive how long.
#[test]
#[ignore = "a measurement, not a test"]
fn costs() {
    let peer = id("team-500", "account-500");
    let long = id(&"a".repeat(253), &"b".repeat(253));
    let prefix = |i: usize| format!("cluster.local/ns/{}", &"a".repeat(253)[..=i % 253]);
    let cases = [
        (
            "exact principals, 10 each",
            thousand(|i| {
                let list: Vec<_> = (0..10).map(|n| format!("cluster.local/ns/team-{i}/sa/other-{n}")).collect();
                format!("{{ from: [{{ source: {{ principals: [{}] }} }}] }}", list.join(", "))
            }),
            &peer,
        ),
        (
            "namespaces, ports and networks",
            thousand(|i| {
                format!(
                    "{{ from: [{{ source: {{ namespaces: [team-{i}, x-{i}], notIpBlocks: [10.{}.0.0/16, \"fd00::/8\"] }} }}], to: [{{ operation: {{ ports: [\"{}\", \"443\"] }} }}] }}",
                    i % 200,
                    9000 + i
                )
            }),
            &peer,
        ),
        (
            "the same namespace everywhere, other ports",
            thousand(|i| {
                format!(
                    "{{ from: [{{ source: {{ namespaces: [\"team-*\"] }} }}], to: [{{ operation: {{ ports: [\"{}\"] }} }}] }}",
                    9000 + i
                )
            }),
            &peer,
        ),
        (
            "253 prefixes around one another, other ports",
            thousand(|i| {
                format!("{{ from: [{{ source: {{ principals: [\"{}*\"], notNamespaces: [\"*a\"] }} }}] }}", prefix(i))
            }),
            &long,
        ),
        (
            "negations that all hold, other networks",
            thousand(|i| {
                format!(
                    "{{ from: [{{ source: {{ notPrincipals: [\"*/sa/x-{i}\"], notNamespaces: [y-{i}] }} }}], when: [{{ key: source.ip, values: [192.168.{}.0/24] }}, {{ key: destination.port, notValues: [\"{}\"] }}] }}",
                    i % 256,
                    9000 + i
                )
            }),
            &peer,
        ),
        (
            "two lists for one property, prefix and suffix",
            thousand(|i| {
                format!(
                    "{{ from: [{{ source: {{ namespaces: [\"team-*\"] }} }}], when: [{{ key: source.namespace, values: [\"*-{}\"] }}] }}",
                    i + 10_000
                )
            }),
            &peer,
        ),
        (
            "three lists for one property, the third read row by row",
            thousand(|i| {
                format!(
                    "{{ from: [{{ source: {{ namespaces: [\"team-*\"] }} }}], when: [{{ key: source.namespace, values: [\"*-500\"] }}, {{ key: source.namespace, values: [x-{i}] }}] }}",
                )
            }),
            &peer,
        ),
    ];
    for (name, snapshot, peer) in &cases {
        let (ns, allowed) = nanoseconds(snapshot, Some(peer));
        assert!(!allowed, "{name}: nothing may match");
        eprintln!("{ns:7.0} ns  {name}");
    }
    let (ns, _) = nanoseconds(&cases[0].1, None);
    eprintln!("{ns:7.0} ns  plaintext against exact principals");
    let (ns, allowed) = nanoseconds(&cases[0].1, Some(&id("team-501", "other-3")));
    assert!(allowed);
    eprintln!("{ns:7.0} ns  exact principals, allowed by one");
}
