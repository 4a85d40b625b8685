//! Every byte arrives, once, in order.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::atomic::Ordering::Relaxed,
};

use super::*;
use crate::{
    telemetry::RefusalReason,
    tunnel::{
        post_handshake::REQUESTING_KEY_UPDATE,
        records::{MAX_PLAINTEXT, Opened, RecordError},
    },
};

#[test]
fn bulk_both_ways_at_once() {
    let (near, far) = (Node::new(), Node::new());
    let ends = tunnelled(&near, &far);
    exchange(&ends, seed() >> 1, scaled(32 << 20), 128 << 10);
    assert_eq!(ends.reasons(), [CloseReason::Finished; 2]);
    for watched in &ends.relayed {
        assert_eq!(watched.connection.sent.load(Relaxed), scaled(32 << 20) as u64);
        assert_eq!(watched.connection.received.load(Relaxed), scaled(32 << 20) as u64);
    }
    assert_eq!(near.counters.closed_clean.load(Relaxed), 1);
    assert!(near.table.is_empty());
}

#[test]
fn bulk_in_plaintext() {
    let node = Node::new();
    let ends = plain(&node);
    exchange(&ends, seed() >> 1, scaled(32 << 20), 128 << 10);
    assert_eq!(ends.reasons(), [CloseReason::Finished]);
}

#[test]
fn both_ends_on_one_thread_with_the_least_buffer() {
    let node = Node::with(&RelayOptions { threads: 1, buffer: 0 });
    let ends = tunnelled(&node, &node);
    exchange(&ends, seed() >> 1, 4 << 20, 64 << 10);
    assert_eq!(ends.reasons(), [CloseReason::Finished; 2]);
}

#[test]
fn single_bytes() {
    let (near, far) = (Node::new(), Node::new());
    for ends in [tunnelled(&near, &far), plain(&near)] {
        let (mut client, mut server) = (&ends.client, &ends.server);
        client.set_nodelay(true).expect("TCP_NODELAY");
        for i in 0..=u8::MAX {
            client.write_all(&[i]).expect("sending");
            let mut got = [0];
            server.read_exact(&mut got).expect("receiving");
            assert_eq!(got, [i]);
            server.write_all(&[!i]).expect("sending");
            client.read_exact(&mut got).expect("receiving");
            assert_eq!(got, [!i]);
        }
        // And without waiting for each other.
        let bytes: Vec<u8> = (0..20_000u32).map(|i| i as u8).collect();
        let sender = send_singly(client, bytes.clone());
        let mut got = vec![0; bytes.len()];
        server.read_exact(&mut got).expect("receiving");
        assert!(got == bytes);
        sender.join().expect("sending");
    }
}

fn send_singly(to: &TcpStream, bytes: Vec<u8>) -> JoinHandle<()> {
    let mut to = to.try_clone().expect("a descriptor");
    thread::spawn(move || bytes.iter().for_each(|byte| to.write_all(&[*byte]).expect("sending")))
}

/// A byte sent as urgent, at whose mark reads stop, stays where it was.
#[test]
fn urgent_bytes_stay_in_the_stream() {
    let (near, far) = (Node::new(), Node::new());
    for ends in [tunnelled(&near, &far), plain(&near)] {
        let mut expected = Vec::new();
        for i in 0..50u8 {
            write_all(&ends.client, &[b"before"]);
            SockRef::from(&ends.client).send_out_of_band(&[i]).expect("MSG_OOB");
            write_all(&ends.client, &[b"after"]);
            expected.extend_from_slice(b"before");
            expected.push(i);
            expected.extend_from_slice(b"after");
        }
        ends.client.shutdown(Shutdown::Write).expect("ending");
        let (got, end) = read_all(&ends.server);
        assert_eq!(end, Ok(()));
        assert!(got == expected);
    }
}

/// A tunnel whose segments are cut at arbitrary places.
#[test]
fn fragmented_ciphertext() {
    let seed = seed() >> 1;
    let (near, far) = (Node::new(), Node::new());
    let ((a, inner_a), (inner_b, b)) = (sockets(), sockets());
    let dribblers = [dribble(&inner_a, &inner_b, seed), dribble(&inner_b, &inner_a, seed + 1)];
    let ends = through(&near, &far, a, b);
    exchange(&ends, seed, 2 << 20, 40 << 10);
    assert_eq!(ends.reasons(), [CloseReason::Finished; 2]);
    for dribbler in dribblers {
        dribbler.join().expect("passing on");
    }
}

/// Passes bytes on in small pieces of random size.
fn dribble(from: &TcpStream, to: &TcpStream, seed: u64) -> JoinHandle<()> {
    let (mut from, mut to) = (from.try_clone().expect("a descriptor"), to.try_clone().expect("a descriptor"));
    to.set_nodelay(true).expect("TCP_NODELAY");
    thread::spawn(move || {
        let mut sizes = StdRng::seed_from_u64(seed);
        let mut buffer = [0; 4096];
        loop {
            let most = if sizes.random_bool(0.5) { 7 } else { buffer.len() };
            let length = sizes.random_range(1..=most);
            match from.read(&mut buffer[..length]).expect("reading") {
                0 => break,
                read => to.write_all(&buffer[..read]).expect("writing"),
            }
        }
        to.shutdown(Shutdown::Write).expect("ending");
    })
}

/// Both sides change their keys again and again while data flows.
#[test]
fn key_updates_in_the_middle() {
    if cannot_replace_keys() {
        return a_key_that_cannot_be_replaced_ends_the_connection();
    }
    let seed = seed() >> 1;
    let (near, far) = (Node::new(), Node::new());
    let (mut ours, mut theirs) = pair();
    ours.per_key = Some(3);
    theirs.per_key = Some(5);
    let (a, b) = sockets();
    let (client, one) = near.tunnel(Direction::Outbound, a, ours);
    let (server, two) = far.tunnel(Direction::Inbound, b, theirs);
    let ends = Ends { client, server, relayed: vec![one, two] };
    exchange(&ends, seed, scaled(4 << 20), 64 << 10);
    assert_eq!(ends.reasons(), [CloseReason::Finished; 2]);
}

/// A key that has done what it may and cannot be replaced ends the connection, with a reset at both applications.
#[test]
fn a_key_that_cannot_be_replaced_ends_the_connection() {
    let Some(support) = ktls() else { return key_limit_of_records() };
    let fixed = Support { rekey: false, ..support.clone() };
    let (near, far) = (Node::new(), Node::new());
    let (mut ours, theirs) = pair();
    ours.per_key = Some(20);
    let (a, b) = sockets();
    let (mut client, one) = near.ktls_tunnel(Direction::Outbound, a, ours, &fixed);
    let (server, two) = far.ktls_tunnel(Direction::Inbound, b, theirs, &fixed);
    let reader = thread::spawn(move || read_all(&server));
    let mut sent = 0;
    while client.write_all(&[1; 1000]).is_ok() {
        sent += 1;
    }
    assert!(sent >= 1, "nothing was sent");
    let (received, end) = reader.join().expect("reading");
    assert_eq!(end, Err(ErrorKind::ConnectionReset));
    assert!(received.len() <= 20 * MAX_PLAINTEXT + (256 << 10), "{} bytes under one key", received.len());
    assert_eq!(one.ended(), CloseReason::KeyLimit);
    assert_eq!(near.counters.refused(RefusalReason::KeyLimit), 1);
    // An alert explains it, unless the reset behind overtakes it.
    assert!(matches!(two.ended(), CloseReason::Denied | CloseReason::UpstreamReset));
}

/// In the agent keys can always be replaced, so the limit is only met by a defect: then nothing more is sealed.
fn key_limit_of_records() {
    let (ours, _) = pair();
    let mut records = ours.records();
    records.limit_for_tests(u64::MAX, 1);
    records.seal(b"the last one").expect("a record");
    assert_eq!(records.seal(b"one too many"), Err(RecordError::Exhausted));
}

/// A key update that asks for ours is answered at once, though the application sends nothing; then data flows under the new
/// keys both ways.
#[test]
fn a_requested_key_update_is_answered() {
    let node = Node::new();
    let (ours, theirs) = pair();
    let mut theirs = theirs.records();
    let (a, b) = sockets();
    let (application, watched) = node.tunnel(Direction::Outbound, a, ours);
    let update = theirs.update_tx(REQUESTING_KEY_UPDATE).expect("an update");
    let data = theirs.seal(b"under new keys").expect("a record");
    // Together: a kernel that cannot replace keys resets the connection after the first of them.
    write_all(&b, &[&[update, data].concat()]);
    if cannot_replace_keys() {
        assert_reset(&application);
        return assert_eq!(watched.ended(), CloseReason::KeyLimit);
    }
    let mut got = [0; 14];
    (&application).read_exact(&mut got).expect("receiving");
    assert_eq!(&got, b"under new keys");
    // The answer is a whole record of its own: header, a message of five bytes, content type and tag.
    let mut answer = [0; 5 + 5 + 17];
    (&b).read_exact(&mut answer).expect("an answer");
    assert_eq!(theirs.open(&mut answer), Ok(Some((Opened::Control, answer.len()))));
    (&application).write_all(b"so are these").expect("sending");
    let mut record = [0; 5 + 12 + 17];
    (&b).read_exact(&mut record).expect("a record");
    let Ok(Some((Opened::Data(range), _))) = theirs.open(&mut record) else { panic!("no data record") };
    assert_eq!(&record[range], b"so are these");
    drop(b);
    assert_eq!(watched.ended(), CloseReason::Truncated);
}

/// While nobody reads, neither relay holds more than its buffer, and what is sent meanwhile waits in the kernel.
#[test]
fn a_slow_reader_bounds_memory() {
    let buffer = 64 << 10;
    let options = RelayOptions { threads: 1, buffer };
    let (near, far) = (Node::with(&options), Node::with(&options));
    for ends in [tunnelled(&near, &far), plain(&near)] {
        let seed = seed() >> 1;
        let total = 64 << 20;
        let sender = send(&ends.client, seed, total, 64 << 10, true);
        let held = || ends.relayed.iter().map(|w| w.connection.held.load(Relaxed)).collect::<Vec<_>>();
        // Everything between the two has filled up when each relay holds something and nothing moves any more.
        let mut last = (0, Instant::now());
        eventually("backpressure", || {
            let now = held();
            assert!(now.iter().all(|bytes| *bytes <= buffer as u64), "more than {buffer} bytes held: {now:?}");
            let sent = ends.relayed[0].connection.sent.load(Relaxed);
            if sent != last.0 || now.contains(&0) {
                last = (sent, Instant::now());
            }
            last.1.elapsed() > Duration::from_millis(300)
        });
        assert!(last.0 < total as u64, "the kernel took everything: {last:?}");
        receive(&ends.server, seed, total, 100 << 10, true).join().expect("every byte");
        sender.join().expect("sending");
        ends.server.shutdown(Shutdown::Write).expect("ending");
        assert!(ends.reasons().iter().all(|reason| *reason == CloseReason::Finished));
        assert!(held().iter().all(|bytes| *bytes == 0));
    }
}

/// Records of any size the protocol allows, among them empty ones, many to a segment.
#[test]
fn records_of_all_sizes() {
    let seed = seed();
    let node = Node::new();
    let (ours, theirs) = pair();
    let mut theirs = theirs.records();
    let (a, mut b) = sockets();
    let (application, watched) = node.tunnel(Direction::Inbound, a, ours);
    let mut random = StdRng::seed_from_u64(seed);
    let (mut wire, mut expected) = (Vec::new(), Vec::new());
    for i in 0..2000 {
        let length = match i % 4 {
            0 => 0,
            1 => random.random_range(1..40),
            2 => random.random_range(1..3000),
            _ => random.random_range(1..=MAX_PLAINTEXT),
        };
        let mut data = vec![0; length];
        random.fill_bytes(&mut data);
        wire.extend(theirs.seal(&data).expect("a record"));
        expected.extend(data);
    }
    wire.extend(theirs.seal_close_notify().expect("a record"));
    let sender = thread::spawn(move || {
        b.write_all(&wire).expect("sending");
        b
    });
    let (got, end) = read_all(&application);
    assert_eq!(end, Ok(()));
    assert!(got == expected, "lost or changed bytes, seed {seed}");
    drop(application);
    let mut b = sender.join().expect("sending");
    let mut rest = Vec::new();
    b.read_to_end(&mut rest).expect("an end");
    assert_eq!(theirs.open(&mut rest), Ok(Some((Opened::CloseNotify, rest.len()))));
    assert_eq!(watched.ended(), CloseReason::Finished);
}
