//! What top shows, on a screen in memory.

use std::time::{Duration, Instant};

use crossterm::event::{KeyCode, KeyModifiers};
use expect_test::expect;
use ratatui::{Terminal, backend::TestBackend};

use super::{
    draw::draw,
    model::{Model, Sample, Sort},
};
use crate::{
    admin::api::{AllCounters, Connections, KtlsStatus, Status},
    relay::{ConnectionId, ConnectionInfo, DataPath, Direction},
    sources::file::ReloadStatus,
    telemetry::logging::hidden,
};

fn connection(id: u64, age_s: f64, bytes: (u64, u64)) -> ConnectionInfo {
    let account = if id.is_multiple_of(2) { "even" } else { "odd" };
    ConnectionInfo {
        id: ConnectionId(id),
        age_s,
        direction: if id.is_multiple_of(2) { Direction::Inbound } else { Direction::Outbound },
        workload: format!("shop/pod-{id}"),
        source_identity: Some(format!("spiffe://cluster.local/ns/shop/sa/{account}")),
        destination_identity: Some("spiffe://other.domain/ns/shop/sa/web".into()),
        source: "10.0.0.1:40000".parse().unwrap(),
        original_destination: "10.96.0.1:80".parse().unwrap(),
        upstream: "10.0.0.2:15008".parse().unwrap(),
        service: None,
        data_path: if id.is_multiple_of(2) { DataPath::Ktls } else { DataPath::User },
        fallback: None,
        cipher: None,
        resumed: false,
        sent: bytes.0,
        received: bytes.1,
    }
}

fn sample(at: Instant, tunnels: u64, connections: Vec<ConnectionInfo>) -> Sample {
    let mut counters = AllCounters::default();
    counters.agent.tunnels_out = tunnels;
    counters.agent.refused.insert("policy".into(), 2);
    let status = Status {
        version: "1.2.3".into(),
        node: "node-a".into(),
        trust_domain: "cluster.local".into(),
        generation: 7,
        ..Status::new(KtlsStatus::default(), Vec::new(), ReloadStatus::default())
    };
    Sample { at, status, counters, connections: Connections { total: connections.len(), connections } }
}

fn screen(model: &mut Model, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, model)).unwrap();
    let lines = terminal.backend().to_string();
    lines.lines().map(|l| l.trim_matches('"').trim_end()).collect::<Vec<_>>().join("\n")
}

/// Two seconds between the two answers.
fn moving() -> Model {
    let start = Instant::now();
    let mut model = Model::new(sample(start, 10, vec![connection(1, 60.0, (0, 0)), connection(2, 60.0, (4096, 0))]));
    let later = vec![
        connection(1, 62.0, (2 << 20, 1 << 20)),
        connection(2, 62.0, (4096, 0)),
        connection(3, 1.0, (20_480, 0)),
        connection(4, 500.0, (1 << 30, 1 << 30)),
    ];
    model.update(sample(start + Duration::from_secs(2), 14, later));
    model
}

#[test]
fn rates_are_differences_over_time() {
    let mut model = moving();
    let rates: Vec<_> = model.rows.iter().map(|r| (r.info.id.0, r.rate.sent, r.rate.received)).collect();
    // The third is new and moved its bytes in the interval; the fourth is old and only new in the list.
    assert_eq!(rates, [(1, 1 << 20, 1 << 19), (3, 10_240, 0), (2, 0, 0), (4, 0, 0)]);
    assert!((model.opened - 2.0).abs() < f64::EPSILON, "{}", model.opened);
    assert_eq!((model.total.connections, model.total.ktls, model.total.user), (4, 2, 2));
    assert_eq!(model.pairs.len(), 2);
    assert_eq!(model.pairs[0].client.as_deref(), Some("spiffe://cluster.local/ns/shop/sa/odd"));
    // A restarted agent counts from the beginning: no rate instead of a huge one.
    let at = model.sample.at + Duration::from_secs(2);
    model.update(sample(at, 0, vec![connection(1, 60.0, (5, 5))]));
    assert_eq!((model.rows[0].rate.both(), model.total.rate.both()), (0, 0));
    assert!(model.opened.abs() < f64::EPSILON);
}

#[test]
fn the_picture() {
    let mut model = moving();
    expect![[r"
        underpass top  node node-a, cluster.local, version 1.2.3
        0 of 0 pods enrolled, configuration 7, tunnels use user
        4 connections: 2 ktls, 2 user, 0 plain; 2.0 tunnels/s, 2 refused so far
        sent 1.0 MiB/s, received 512.0 KiB/s; 2.0 GiB moved by connections that are open

        ID      AGE      WAY WORKLOAD             CLIENT               SERVER              DESTINATION          PATH               SENT         RECEIVED     BYTES
        1       1m 2s    out shop/pod-1           ns/shop/sa/odd       spiffe://other.doma 10.96.0.1:80         user               1.0 MiB/s    512.0 KiB/s  3.0 MiB
        3       1s       out shop/pod-3           ns/shop/sa/odd       spiffe://other.doma 10.96.0.1:80         user               10.0 KiB/s   0 B/s        20.0 KiB
        2       1m 2s    in  shop/pod-2           ns/shop/sa/even      spiffe://other.doma 10.96.0.1:80         ktls               0 B/s        0 B/s        4.0 KiB
        4       8m 20s   in  shop/pod-4           ns/shop/sa/even      spiffe://other.doma 10.96.0.1:80         ktls               0 B/s        0 B/s        2.0 GiB



        1-4 of 4  order: rate  q quit  s order  Tab connections/identities  p pause  arrows scroll"]].assert_eq(&screen(&mut model, 160, 14));
    model.key(KeyCode::Tab, KeyModifiers::NONE);
    expect![[r"
        underpass top  node node-a, cluster.local, version 1.2.3
        0 of 0 pods enrolled, configuration 7, tunnels use user
        4 connections: 2 ktls, 2 user, 0 plain; 2.0 tunnels/s, 2 refused so far
        sent 1.0 MiB/s, received 512.0 KiB/s; 2.0 GiB moved by connections that are open

        CLIENT IDENTITY                              SERVER IDENTITY                              CONNECTIONS KTLS   USER   PLAIN  SENT         RECEIVED     BYTES
        spiffe://cluster.local/ns/shop/sa/odd        spiffe://other.domain/ns/shop/sa/web         2           0      2      0      1.0 MiB/s    512.0 KiB/s  3.0 MiB
        spiffe://cluster.local/ns/shop/sa/even       spiffe://other.domain/ns/shop/sa/web         2           2      0      0      0 B/s        0 B/s        2.0 GiB





        1-2 of 2  order: rate  q quit  s order  Tab connections/identities  p pause  arrows scroll"]].assert_eq(&screen(&mut model, 160, 14));
    model.fail("no agent is running: nobody listens on /run/underpass/admin.sock".into());
    assert!(screen(&mut model, 160, 14).contains("NO ANSWER: no agent is running"));
}

#[test]
fn keys_sort_scroll_pause_and_end() {
    let mut model = moving();
    let none = KeyModifiers::NONE;
    assert!(screen(&mut model, 100, 8).contains("1-1 of 4"));
    for (key, offset) in [
        (KeyCode::Down, 1),
        (KeyCode::PageDown, 2),
        (KeyCode::End, 3),
        (KeyCode::Down, 3),
        (KeyCode::Up, 2),
        (KeyCode::Home, 0),
        (KeyCode::Up, 0),
    ] {
        assert!(!model.key(key, none));
        assert_eq!(model.offset, offset, "{key:?}");
    }
    for (sort, first) in [(Sort::Bytes, 4), (Sort::Newest, 4), (Sort::Workload, 1), (Sort::Rate, 1)] {
        model.key(KeyCode::Char('s'), none);
        assert_eq!((model.sort, model.rows[0].info.id.0), (sort, first));
    }
    model.key(KeyCode::Char('p'), none);
    assert!(model.paused && screen(&mut model, 100, 8).contains("paused"));
    assert!(model.key(KeyCode::Char('q'), none) && model.key(KeyCode::Char('c'), KeyModifiers::CONTROL));
}

#[test]
fn hostile_names_and_small_screens_break_nothing() {
    for name in ["\x1b[2J\u{9b}31m\n\u{202e}".to_owned(), "x".repeat(64 * 1024)] {
        let mut hostile = connection(1, 1.0, (1, 1));
        hostile.workload.clone_from(&name);
        hostile.source_identity = Some(name.clone());
        let mut model = Model::new(sample(Instant::now(), 0, vec![hostile]));
        model.sample.status.node.clone_from(&name);
        model.fail(name);
        for (width, height) in [(160, 20), (40, 8), (3, 2), (1, 1)] {
            let text = screen(&mut model, width, height);
            assert!(!text.chars().any(|c| c != '\n' && hidden(c)), "{text:?}");
            model.key(KeyCode::Tab, KeyModifiers::NONE);
        }
    }
}
