use std::{
    io::{self, Write},
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use super::{
    AccessLog, Account, Labels, LogChoice, Party, Record, RefusalReason, Reporter, ResponseFlag, Telemetry, TraceId,
    Traffic, Transfer,
    logging::{LogFormat, QUEUED_LINES, hidden},
};
use crate::{mesh::SpiffeId, telemetry::Failure};

/// Keeps what is written.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn identity(name: &str) -> SpiffeId {
    SpiffeId::new("cluster.local".parse().unwrap(), "default", name).unwrap()
}

/// What a server sees of a client that proved who it is.
fn from(client: &str) -> Labels {
    let mut labels = Labels::new(Reporter::Destination);
    labels.source = Party { namespace: Some("default".into()), principal: Some(identity(client)), ..Party::default() };
    labels.mutual_tls = true;
    labels
}

/// A whole connection.
fn connection(traffic: &Traffic, labels: Labels, flag: ResponseFlag) {
    let (_, series) = traffic.open(labels);
    series.moved(10, 1);
    traffic.close(&series, flag);
}

/// Sums over everything that is exposed.
fn sums(traffic: &Traffic) -> (u64, u64, u64, u64) {
    traffic.exposed().iter().fold((0, 0, 0, 0), |(opened, closed, failed, sent), (_, s)| {
        let of = |count: fn(&super::Series, ResponseFlag) -> u64| {
            ResponseFlag::ALL.into_iter().map(|flag| count(s, flag)).sum::<u64>()
        };
        (opened + s.opened(), closed + of(super::Series::closed), failed + of(super::Series::failed), sent + s.sent())
    })
}

#[test]
fn every_refusal_has_a_flag_and_only_none_is_a_dash() {
    for reason in RefusalReason::ALL {
        assert_ne!(ResponseFlag::from(reason), ResponseFlag::None, "{reason}");
    }
    for flag in ResponseFlag::ALL {
        assert_eq!(flag.as_str() == "-", flag == ResponseFlag::None);
        assert_eq!(ResponseFlag::ALL[flag as usize], flag);
    }
}

#[test]
fn connections_with_the_same_labels_share_a_series() {
    let traffic = Traffic::new(8000);
    for flag in [ResponseFlag::None, ResponseFlag::None, ResponseFlag::Deny] {
        connection(&traffic, from("client"), flag);
    }
    let (_, live) = traffic.open(from("client"));
    let all = traffic.exposed();
    let [(_, series)] = &all[..] else { panic!("{} series", all.len()) };
    assert_eq!((series.opened(), series.open(), series.sent(), series.received()), (4, 1, 30, 3));
    assert_eq!((series.closed(ResponseFlag::None), series.closed(ResponseFlag::Deny)), (2, 1));
    assert_eq!(live.open(), 1);
}

/// Fifty thousand identities, each of which also fails in its own way: nothing is lost, and nothing grows.
#[test]
fn a_scan_from_many_sources_stays_within_the_limit() {
    const SOURCES: u64 = 50_000;
    let traffic = Traffic::new(8000);
    for n in 0..SOURCES {
        let flag = ResponseFlag::ALL[n as usize % ResponseFlag::ALL.len()];
        connection(&traffic, from(&format!("scanner-{n}")), flag);
        traffic.fail(from(&format!("stranger-{n}")), ResponseFlag::Deny);
        assert!(traffic.samples() <= 8000);
    }
    assert_eq!(sums(&traffic), (SOURCES, SOURCES, SOURCES, 10 * SOURCES));
    assert!(traffic.overflow() > SOURCES, "most are counted together: {}", traffic.overflow());
    assert!(traffic.exposed().len() < 8000 / 5, "{} sets of labels", traffic.exposed().len());
}

#[test]
fn what_is_not_used_any_more_gives_way_and_what_is_used_stays() {
    let mut traffic = Traffic::new(Traffic::MIN_LIMIT);
    let known = |traffic: &Traffic, name: &str| {
        traffic.exposed().iter().any(|(labels, _)| labels.source.principal == Some(identity(name)))
    };
    let (_, live) = traffic.open(from("live"));
    let mut others = 0;
    while traffic.overflow() == 0 {
        connection(&traffic, from(&format!("scanner-{others}")), ResponseFlag::None);
        others += 1;
    }
    assert!((5..=20).contains(&others), "{others} fit");
    connection(&traffic, from("late"), ResponseFlag::None);
    assert!(known(&traffic, "scanner-0") && !known(&traffic, "late"), "what was used a moment ago is not pushed out");

    traffic.age(Duration::from_mins(6));
    connection(&traffic, from("late"), ResponseFlag::None);
    assert!(known(&traffic, "late") && !known(&traffic, "scanner-0"), "now there is room");
    assert!(known(&traffic, "live"), "a live connection keeps its series");

    drop(live);
    traffic.age(Duration::from_hours(2));
    assert!(!known(&traffic, "live") && !known(&traffic, "late"), "in the end all expire");
    assert!(traffic.samples() <= Traffic::MIN_LIMIT);
}

/// Strings that a metric or a log must survive.
fn hostile() -> Vec<String> {
    vec![
        "a\"b\\c\n\r\t\0\u{1b}[2J\u{9b}1m\u{202e}\u{feff}".to_owned(),
        "} 1\nforged_total 7".to_owned(),
        "ä".repeat(32 * 1024),
        "x".repeat(64 * 1024),
    ]
}

#[test]
fn hostile_names_are_escaped_and_cut_in_labels() {
    use prometheus_client::{
        metrics::{counter::Counter, family::Family},
        registry::Registry,
    };
    #[derive(Clone, PartialEq, Eq, Hash)]
    struct Set(Labels);
    impl std::fmt::Debug for Set {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("Set")
        }
    }
    impl prometheus_client::encoding::EncodeLabelSet for Set {
        fn encode(&self, to: &mut prometheus_client::encoding::LabelSetEncoder<'_>) -> std::fmt::Result {
            super::Exposed { labels: &self.0, flag: ResponseFlag::None }.encode(to)
        }
    }
    for name in hostile() {
        let mut labels = from("client");
        labels.source.workload = Some(name.as_str().into());
        labels.destination.namespace = Some(name.as_str().into());
        let family = Family::<Set, Counter>::default();
        family.get_or_create(&Set(labels)).inc();
        let mut registry = Registry::default();
        registry.register("name", "Help", family);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text:?}");
        assert!(lines[2].starts_with("name_total{") && lines[2].ends_with("} 1"), "{}", lines[2]);
        assert!(!text.chars().any(|c| hidden(c) && c != '\n'), "{text:?}");
        assert!(text.len() < 4096, "{}", text.len());
    }
}

/// A record of an established connection.
fn record<'a>(labels: &'a Labels, service: &'a str, in_order: bool) -> Record<'a> {
    Record {
        id: Some(7),
        trace: Some(TraceId([0xab; 16])),
        labels,
        source: Some("10.0.0.1:40000".parse().unwrap()),
        destination: Some("10.0.0.2:8080".parse().unwrap()),
        dialled: Some("10.96.0.1:80".parse().unwrap()),
        service: Some(service),
        transfer: Some(Transfer {
            sent: 1,
            received: 2,
            duration: Duration::from_millis(1500),
            data_path: "ktls",
            cipher: Some("TLS13_AES_256_GCM_SHA384"),
            resumed: true,
        }),
        reason: "finished",
        flag: ResponseFlag::None,
        detail: None,
        in_order,
    }
}

fn logged(format: LogFormat, write: impl FnOnce(&AccessLog)) -> String {
    let sink = Sink::default();
    let (log, guard) = AccessLog::to(sink.clone(), format);
    write(&log);
    drop(guard);
    String::from_utf8(sink.0.lock().unwrap().clone()).unwrap()
}

#[test]
fn a_line_has_every_field() {
    let labels = from("client");
    let text = logged(LogFormat::Text, |log| log.write(LogChoice::Always, &record(&labels, "web.default.svc", true)));
    let expected = concat!(
        " INFO access: connection complete id=7 trace_id=abababababababababababababababab src.addr=10.0.0.1:40000 src.namespace=\"default\" ",
        "src.identity=spiffe://cluster.local/ns/default/sa/client dst.addr=10.0.0.2:8080 ",
        "dst.dialled_addr=10.96.0.1:80 dst.service=\"web.default.svc\" direction=inbound bytes_sent=1 bytes_recv=2 ",
        "duration=1500ms data_path=ktls cipher=TLS13_AES_256_GCM_SHA384 resumed=true reason=finished response_flags=-\n"
    );
    assert!(text.contains(expected), "{text}");
    let json = logged(LogFormat::Json, |log| log.write(LogChoice::Always, &record(&labels, "web.default.svc", true)));
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    for (field, expected) in [
        ("id", serde_json::json!(7)),
        ("src.identity", "spiffe://cluster.local/ns/default/sa/client".into()),
        ("dst.service", "web.default.svc".into()),
        ("bytes_recv", 2.into()),
        ("resumed", true.into()),
        ("duration", "1500ms".into()),
        ("target", "access".into()),
    ] {
        assert_eq!(value[field], expected, "{field}: {json}");
    }
}

#[test]
fn hostile_names_break_no_line() {
    let labels = from("client");
    for name in hostile() {
        for format in [LogFormat::Text, LogFormat::Json] {
            let text = logged(format, |log| {
                let detail: &dyn std::fmt::Display = &name;
                let record = Record { detail: Some(detail), ..record(&labels, &name, true) };
                log.write(LogChoice::Always, &record);
            });
            assert_eq!(text.matches('\n').count(), 1, "{text:?}");
            assert!(!text.trim_end_matches('\n').chars().any(hidden), "{text:?}");
            assert!(text.len() < 4096, "{}", text.len());
            if format == LogFormat::Json {
                serde_json::from_str::<serde_json::Value>(&text).expect("one object");
            }
        }
    }
}

#[test]
fn choices_say_which_lines_there_are() {
    let labels = from("client");
    let lines = |choice, in_order| {
        logged(LogFormat::Text, |log| log.write(choice, &record(&labels, "web", in_order))).lines().count()
    };
    assert_eq!((lines(LogChoice::Always, true), lines(LogChoice::Always, false)), (1, 1));
    assert_eq!((lines(LogChoice::Failures, true), lines(LogChoice::Failures, false)), (0, 1));
    assert_eq!((lines(LogChoice::Never, true), lines(LogChoice::Never, false)), (0, 0));
}

/// A standard output that takes nothing: ends of connections go on at full speed, and the lines that do not fit are counted.
#[test]
fn a_stalled_reader_slows_nothing() {
    struct Stalled(mpsc::Receiver<()>);
    impl Write for Stalled {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv(); // until the sender is dropped
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    const MORE: usize = 20_000;
    let (release, stalled) = mpsc::channel();
    let (access, guard) = AccessLog::to(Stalled(stalled), LogFormat::Text);
    let telemetry = Telemetry::new(8000, access);
    let began = Instant::now();
    for _ in 0..QUEUED_LINES + MORE {
        let account = Account::open(&telemetry, from("client"), LogChoice::Always, None);
        account.close(&record(account.labels(), "web", true));
    }
    let took = began.elapsed();
    // The writer may have taken one line out of the queue.
    assert!((MORE - 1..=MORE).contains(&(telemetry.access.dropped() as usize)), "{}", telemetry.access.dropped());
    // Microseconds each; a write that waits even once would wait for ever.
    assert!(took < Duration::from_secs(20), "{took:?}");
    drop(release);
    drop(guard);
}

#[test]
fn a_failure_is_counted_by_reason_and_by_who_it_was() {
    let sink = Sink::default();
    let (access, guard) = AccessLog::to(sink.clone(), LogFormat::Text);
    let telemetry = Telemetry::new(8000, access);
    telemetry.fail(
        from("client"),
        LogChoice::Always,
        &Failure {
            reason: RefusalReason::Policy,
            detail: &"no ALLOW policy matches",
            trace: None,
            source: Some("10.0.0.1:40000".parse().unwrap()),
            destination: None,
            service: None,
        },
    );
    drop(guard);
    assert_eq!(telemetry.counters.refused(RefusalReason::Policy), 1);
    assert_eq!(sums(&telemetry.traffic), (0, 0, 1, 0));
    let line = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
    let expected = concat!(
        " WARN access: connection failed src.addr=10.0.0.1:40000 src.namespace=\"default\" ",
        "src.identity=spiffe://cluster.local/ns/default/sa/client direction=inbound reason=policy ",
        "response_flags=DENY error=\"no ALLOW policy matches\"\n"
    );
    assert!(line.contains(expected), "{line}");
}

/// What one connection costs beside its bytes; printed, not judged. `cargo test --release -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn measure_one_connection() {
    const CONNECTIONS: u32 = 200_000;
    for (what, choice) in [("with a line", LogChoice::Always), ("without", LogChoice::Never)] {
        let (access, guard) = AccessLog::to(io::sink(), LogFormat::Text);
        let telemetry = Telemetry::new(8000, access);
        let began = Instant::now();
        for _ in 0..CONNECTIONS {
            let account = Account::open(&telemetry, from("client"), choice, None);
            account.close(&record(account.labels(), "web.default.svc.cluster.local", true));
        }
        println!(
            "{what}: {:?} a connection, {} lines dropped",
            began.elapsed() / CONNECTIONS,
            telemetry.access.dropped()
        );
        drop(guard);
    }
}
