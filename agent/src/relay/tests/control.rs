//! What other threads do to connections, and the table.

use std::{
    io::Write,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::Ordering::Relaxed,
};

use super::*;
use crate::{
    relay::{Job, Upstream},
    telemetry::{AccessLog, Account, Labels, LogChoice, Reporter, Telemetry, logging::LogFormat},
};

#[test]
fn close_resets_both_sides_within_a_second() {
    let (near, far) = (Node::new(), Node::new());
    let ends = tunnelled(&near, &far);
    (&ends.client).write_all(b"x").expect("sending");
    (&ends.server).read_exact(&mut [0]).expect("receiving");
    let id = ends.relayed[0].connection.id;
    let start = Instant::now();
    assert!(near.table.close(id, CloseReason::Policy));
    assert_reset(&ends.client);
    assert_reset(&ends.server);
    assert!(start.elapsed() < Duration::from_secs(1), "took {:?}", start.elapsed());
    assert_eq!(ends.reasons(), [CloseReason::Policy, CloseReason::UpstreamReset]);
    assert!(!near.table.close(id, CloseReason::Policy), "it is gone");
    assert_eq!(near.table.len(), 0);
}

/// Also one that is busy, and one that can move nothing.
#[test]
fn close_reaches_a_busy_connection() {
    let (near, far) = (Node::new(), Node::new());
    let ends = tunnelled(&near, &far);
    let mut client = ends.client.try_clone().expect("a descriptor");
    let sender = thread::spawn(move || while client.write_all(&vec![1; 64 << 10]).is_ok() {});
    eventually("backpressure", || ends.relayed[0].connection.held.load(Relaxed) > 0);
    assert_eq!(near.table.close_where(CloseReason::Unenrolled, |c| c.what.pod_id == 2), 0);
    assert_eq!(near.table.close_where(CloseReason::Unenrolled, |c| c.what.pod_id == 1), 1);
    sender.join().expect("the sender sees the reset");
    assert_eq!(ends.relayed[0].ended(), CloseReason::Unenrolled);
}

#[test]
fn the_first_reason_counts_also_before_submission() {
    let node = Node::new();
    let connection = node.add(Direction::Outbound, DataPath::Plain);
    assert!(node.table.close(connection.id, CloseReason::Operator));
    assert!(node.table.close(connection.id, CloseReason::Policy));
    let ((client, inner), (outer, server)) = (sockets(), sockets());
    let path = Path::Plain { outward: Plain::default(), inward: Plain::default() };
    let watched = node.place(connection, inner, outer, path);
    assert_eq!(watched.ended(), CloseReason::Operator);
    assert_reset(&client);
    assert_reset(&server);
}

#[test]
fn close_races_with_submission() {
    let node = Node::new();
    for _ in 0..300 {
        let connection = node.add(Direction::Outbound, DataPath::Plain);
        let ((_client, inner), (outer, _server)) = (sockets(), sockets());
        let path = Path::Plain { outward: Plain::default(), inward: Plain::default() };
        let (table, id) = (Arc::clone(&node.table), connection.id);
        let closer = thread::spawn(move || assert!(table.close(id, CloseReason::Policy)));
        let watched = node.place(connection, inner, outer, path);
        closer.join().expect("closing");
        assert_eq!(watched.ended(), CloseReason::Policy);
    }
}

#[test]
fn shutdown_resets_everything() {
    let (near, far) = (Node::with(&RelayOptions { threads: 2, ..RelayOptions::default() }), Node::new());
    let all: Vec<_> = (0..10).map(|_| tunnelled(&near, &far)).collect();
    near.relay.shutdown();
    for ends in &all {
        assert_eq!(ends.reasons(), [CloseReason::Shutdown, CloseReason::UpstreamReset]);
        assert_reset(&ends.client);
        assert_reset(&ends.server);
    }
    // What comes too late is not left hanging.
    let late = plain(&near);
    assert_eq!(late.reasons(), [CloseReason::Shutdown]);
    assert_reset(&late.client);
    assert_reset(&late.server);
    assert_eq!(near.table.len(), 0);
    near.relay.shutdown();
}

/// The last reference to a relay may go away on one of its own threads.
#[test]
fn a_guard_may_own_the_relay() {
    #[expect(dead_code, reason = "held for their drop")]
    struct Guard(Arc<Relay>, mpsc::Sender<()>);
    let Node { relay, table, counters } = Node::new();
    let node = Node { relay: Arc::clone(&relay), table, counters };
    let ((client, inner), (outer, server)) = (sockets(), sockets());
    for socket in [&inner, &outer] {
        socket.set_nonblocking(true).expect("non-blocking");
    }
    let (sender, end) = mpsc::channel();
    let slot = Slot::new(
        inner.into(),
        outer.into(),
        Path::Plain { outward: Plain::default(), inward: Plain::default() },
        node.add(Direction::Outbound, DataPath::Plain),
        Box::new(Guard(relay, sender)),
    );
    node.relay.place(Box::new(slot));
    drop(node);
    drop((client, server));
    assert_eq!(end.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected));
}

/// A panic while one connection ends leaves its thread to the others.
#[test]
fn a_panicking_guard_harms_nobody_else() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("expected by the test");
        }
    }
    let node = Node::new();
    let ((client, inner), (outer, server)) = (sockets(), sockets());
    for socket in [&inner, &outer] {
        socket.set_nonblocking(true).expect("non-blocking");
    }
    let path = Path::Plain { outward: Plain::default(), inward: Plain::default() };
    let connection = node.add(Direction::Outbound, DataPath::Plain);
    node.relay.place(Box::new(Slot::new(inner.into(), outer.into(), path, connection, Box::new(Bomb))));
    drop((client, server));
    let ends = plain(&node);
    exchange(&ends, seed() >> 1, 100_000, 1024);
    assert_eq!(ends.reasons(), [CloseReason::Finished]);
    assert!(catch_unwind(AssertUnwindSafe(|| drop(node))).is_ok());
}

#[test]
fn the_table_lists_the_oldest_first() {
    let node = Node::new();
    let all: Vec<_> = (0..200).map(|_| node.add(Direction::Inbound, DataPath::User)).collect();
    all[3].sent.store(17, Relaxed);
    let (listed, count) = node.table.list(10);
    assert_eq!(count, 200);
    assert_eq!(listed.iter().map(|c| c.id).collect::<Vec<_>>(), all[..10].iter().map(|c| c.id).collect::<Vec<_>>());
    assert_eq!(listed[3].sent, 17);
    assert_eq!(listed[0].workload, "default/test");
    // Dropped without having reached a relay.
    drop(all);
    assert_eq!(node.table.list(10).1, 0);
    assert!(node.table.is_empty());
}

#[test]
fn the_table_lists_what_is_asked_for_in_the_order_asked_for() {
    use crate::relay::ConnectionOrder::{Bytes, Newest, Oldest, Received, Sent};
    let node = Node::new();
    let all: Vec<_> = (0..6)
        .map(|n| node.add(if n % 2 == 0 { Direction::Inbound } else { Direction::Outbound }, DataPath::User))
        .collect();
    for (n, (sent, received)) in [(5, 0), (0, 9), (3, 3), (5, 9), (0, 0), (0, 0)].into_iter().enumerate() {
        all[n].sent.store(sent, Relaxed);
        all[n].received.store(received, Relaxed);
    }
    for (order, expected) in [
        (Oldest, [0, 1, 2, 3, 4, 5]),
        (Newest, [5, 4, 3, 2, 1, 0]),
        (Sent, [0, 3, 2, 1, 4, 5]),
        (Received, [1, 3, 2, 0, 4, 5]),
        (Bytes, [3, 1, 2, 0, 4, 5]),
    ] {
        let (listed, count) = node.table.list_where(10, order, |_| true);
        assert_eq!(count, 6);
        assert_eq!(listed.iter().map(|c| c.id).collect::<Vec<_>>(), expected.map(|n| all[n].id), "{order:?}");
    }
    let (listed, count) = node.table.list_where(2, Newest, |c| c.what.direction == Direction::Inbound);
    assert_eq!(count, 3, "as many as are selected, not as are listed");
    assert_eq!(listed.iter().map(|c| c.id).collect::<Vec<_>>(), [all[4].id, all[2].id]);
}

/// What telemetry hears of a connection, live and at its end; every byte once.
#[test]
fn telemetry_hears_of_bytes_and_of_the_end() {
    let sink = Sink::default();
    let (access, writer) = AccessLog::to(sink.clone(), LogFormat::Text);
    let (node, telemetry) = (Node::new(), Telemetry::new(8000, access));
    let what = node.add(Direction::Outbound, DataPath::Plain).what.clone();
    let account = Account::open(&telemetry, Labels::new(Reporter::Source), LogChoice::Always, None);
    let connection = node.table.add_accounted(what, Some(account));
    let (client, inner) = sockets();
    let (outer, server) = sockets();
    let path = Path::Plain { outward: Plain::default(), inward: Plain::default() };
    let watched = node.place(Arc::clone(&connection), inner, outer, path);
    let counted = || {
        let (_, series) = telemetry.traffic.exposed().remove(0);
        (series.sent(), series.received(), series.open())
    };
    (&client).write_all(&[1; 12]).expect("sending");
    eventually("the bytes are counted", || connection.sent.load(Relaxed) == 12);
    node.table.settled();
    node.table.settled();
    assert_eq!(counted(), (0, 12, 1), "the client's bytes are what the server receives");
    (&server).write_all(&[1; 5]).expect("sending");
    (&client).write_all(&[1; 8]).expect("sending");
    eventually("the bytes are counted", || {
        (connection.sent.load(Relaxed), connection.received.load(Relaxed)) == (20, 5)
    });
    node.table.close(connection.id, CloseReason::Policy);
    assert_eq!(watched.ended(), CloseReason::Policy);
    assert_eq!(counted(), (5, 20, 0));
    let totals = node.table.totals();
    assert_eq!((totals.moved(DataPath::Plain), totals.moved(DataPath::Ktls)), ((20, 5), (0, 0)));
    assert_eq!((totals.ended(CloseReason::Policy), totals.ended(CloseReason::Finished)), (1, 0));
    drop(writer);
    let line = String::from_utf8(sink.0.lock().expect("a lock").clone()).expect("text");
    assert_eq!(line.lines().count(), 1);
    let begin = format!(
        " WARN access: connection complete id={} src.addr=127.0.0.1:1 dst.addr=127.0.0.1:1 direction=outbound",
        connection.id.0
    );
    for part in [&*begin, "bytes_sent=20 bytes_recv=5 duration=", "data_path=plain reason=policy response_flags=DENY"] {
        assert!(line.contains(part), "{part:?} is not in {line:?}");
    }
}

#[derive(Clone, Default)]
struct Sink(Arc<std::sync::Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("a lock").write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A guard that does not come to an end holds up its thread: that shows, and the other thread goes on.
#[test]
fn a_stuck_thread_is_noticed() {
    struct Stuck(std::sync::mpsc::Receiver<()>);
    impl Drop for Stuck {
        fn drop(&mut self) {
            let _ = self.0.recv(); // until the sender is dropped
        }
    }
    let node = Node::with(&RelayOptions { threads: 2, ..RelayOptions::default() });
    let (release, stuck) = std::sync::mpsc::channel();
    let (application, _theirs) = sockets();
    let (upstream, _peer) = sockets();
    let connection = node.add(Direction::Outbound, DataPath::Plain);
    let id = connection.id;
    for socket in [&application, &upstream] {
        socket.set_nonblocking(true).expect("non-blocking");
    }
    node.relay.submit(Job {
        application: application.into(),
        upstream: Upstream::Plain(upstream.into()),
        connection,
        guard: Box::new(Stuck(stuck)),
    });
    node.table.close(id, CloseReason::Operator);
    eventually("one thread is stuck", || node.relay.health().iter().any(|t| t.stuck >= Duration::from_millis(200)));
    assert_eq!(node.relay.health().iter().filter(|t| t.stuck.is_zero() && !t.ended).count(), 1);
    drop(release);
    eventually("it goes on", || node.relay.health().iter().all(|t| t.stuck.is_zero() && !t.ended));
    node.relay.shutdown();
    assert!(node.relay.health().iter().all(|t| t.ended), "{:?}", node.relay.health());
}
