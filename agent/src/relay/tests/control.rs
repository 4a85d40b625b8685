//! What other threads do to connections, and the table.

use std::{
    io::Write,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::Ordering::Relaxed,
};

use super::*;

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

/// What operators read in the access log.
#[test]
fn the_access_log_line() {
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
    let (node, sink) = (Node::new(), Sink::default());
    let connection = node.add(Direction::Outbound, DataPath::User);
    connection.sent.store(12, Relaxed);
    let writer = sink.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    tracing::subscriber::with_default(subscriber, || {
        crate::relay::access::log(&connection, &CloseReason::Truncated.into());
    });
    let line = String::from_utf8(sink.0.lock().expect("a lock").clone()).expect("text");
    assert_eq!(line.lines().count(), 1);
    for part in [
        "access: closed id=1 direction=Outbound workload=default/test source=127.0.0.1:1",
        "source_identity=spiffe://td.test/ns/default/sa/client",
        "destination_identity=spiffe://td.test/ns/default/sa/server",
        "service=- data_path=User sent=12 received=0 duration_ms=",
        "reason=\"truncated\" refusal=- detail=-",
    ] {
        assert!(line.contains(part), "{part:?} is not in {line:?}");
    }
}
