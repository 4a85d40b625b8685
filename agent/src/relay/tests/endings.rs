//! How connections end, cleanly and otherwise.

use std::{io::Write, sync::atomic::Ordering::Relaxed};

use rustls::AlertDescription;

use super::*;
use crate::{
    telemetry::RefusalReason,
    tunnel::records::{Opened, Records},
};

/// Every kind of connection there is.
fn kinds(near: &Node, far: &Node) -> [Ends; 2] {
    [tunnelled(near, far), plain(near)]
}

fn ask(mut to: &TcpStream, what: &[u8], mut from: &TcpStream) {
    to.write_all(what).expect("sending");
    let mut got = vec![0; what.len()];
    from.read_exact(&mut got).expect("receiving");
    assert_eq!(got, what);
}

fn end(socket: &TcpStream) {
    socket.shutdown(Shutdown::Write).expect("ending");
}

fn assert_end(from: &TcpStream) {
    assert_eq!(read_all(from), (Vec::new(), Ok(())));
}

#[test]
fn half_close_in_either_order() {
    let (near, far) = (Node::new(), Node::new());
    for client_first in [true, false] {
        for ends in kinds(&near, &far) {
            let (first, second) =
                if client_first { (&ends.client, &ends.server) } else { (&ends.server, &ends.client) };
            ask(first, b"request", second);
            end(first);
            assert_end(second);
            // The other direction lives on.
            ask(second, b"first answer", first);
            ask(second, b"second answer", first);
            end(second);
            assert_end(first);
            assert!(ends.reasons().iter().all(|reason| *reason == CloseReason::Finished));
        }
    }
    assert_eq!(near.counters.closed_clean.load(Relaxed), 4);
    assert_eq!(near.counters.closed_reset.load(Relaxed), 0);
}

#[test]
fn the_server_speaks_first() {
    let (near, far) = (Node::new(), Node::new());
    for ends in kinds(&near, &far) {
        ask(&ends.server, b"220 ready", &ends.client);
        ask(&ends.client, b"QUIT", &ends.server);
        drop(ends.server);
        assert_end(&ends.client);
        drop(ends.client);
        assert!(ends.relayed.iter().all(|watched| watched.ended() == CloseReason::Finished));
    }
}

/// What is still in the relays' send queues when both sides have ended is delivered, though the application's socket was
/// made to reset on close.
#[test]
fn the_tail_is_delivered_after_a_clean_end() {
    let seed = seed() >> 1;
    let (near, far) = (Node::new(), Node::new());
    for ends in kinds(&near, &far) {
        end(&ends.client);
        // Little enough for the kernels on the way, so that the relays are done before anything is read.
        let total = 200_000;
        send(&ends.server, seed, total, 8 << 10, true).join().expect("sending");
        assert!(ends.reasons().iter().all(|reason| *reason == CloseReason::Finished));
        receive(&ends.client, seed, total, 8 << 10, true).join().expect("every byte");
    }
}

#[test]
fn a_reset_crosses() {
    let (near, far) = (Node::new(), Node::new());
    for from_client in [true, false] {
        for half_closed in [true, false] {
            for ends in kinds(&near, &far) {
                ask(&ends.client, b"hello", &ends.server);
                ask(&ends.server, b"hello", &ends.client);
                let tunnelled = ends.relayed.len() == 2;
                let (resetting, other) =
                    if from_client { (ends.client, ends.server) } else { (ends.server, ends.client) };
                if half_closed {
                    end(&resetting);
                    assert_eq!((&other).read(&mut [0]).expect("an end"), 0);
                }
                reset(resetting);
                if half_closed {
                    // The end was already read; the reset shows on the next operation that can fail.
                    eventually("the reset", || {
                        SockRef::from(&other).take_error().expect("SO_ERROR").is_some_and(|error| {
                            matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
                        })
                    });
                } else {
                    assert_reset(&other);
                }
                let application =
                    if half_closed { CloseReason::ApplicationGone } else { CloseReason::ApplicationReset };
                let reasons: Vec<_> = ends.relayed.iter().map(Watched::ended).collect();
                let expected = match (tunnelled, from_client) {
                    (true, true) => vec![application, CloseReason::UpstreamReset],
                    (true, false) => vec![CloseReason::UpstreamReset, application],
                    (false, true) => vec![application],
                    (false, false) => vec![CloseReason::UpstreamReset],
                };
                assert_eq!(reasons, expected, "from client: {from_client}, half-closed: {half_closed}");
            }
        }
    }
    assert_eq!(near.counters.closed_clean.load(Relaxed), 0);
}

/// A reset in the middle of a transfer is never taken for an end.
#[test]
fn a_reset_under_load_crosses() {
    let (near, far) = (Node::new(), Node::new());
    for ends in kinds(&near, &far) {
        let mut client = ends.client;
        let sender = thread::spawn(move || {
            for _ in 0..200 {
                client.write_all(&vec![7; 32 << 10]).expect("sending");
            }
            reset(client);
        });
        let (_, end) = read_all(&ends.server);
        assert_eq!(end, Err(ErrorKind::ConnectionReset));
        sender.join().expect("sending");
        assert!(ends.relayed.iter().all(|watched| watched.ended() != CloseReason::Finished));
    }
}

/// Data for an application that has closed makes a reset for its sender.
#[test]
fn data_for_an_application_that_is_gone() {
    let (near, far) = (Node::new(), Node::new());
    let ends = tunnelled(&near, &far);
    ask(&ends.client, b"hello", &ends.server);
    drop(ends.server);
    let mut client = &ends.client;
    assert_eq!(client.read(&mut [0]).expect("an end"), 0);
    // Until the reset has come back.
    let start = Instant::now();
    while client.write_all(&[1; 1000]).is_ok() {
        assert!(start.elapsed() < PATIENCE, "no reset");
    }
    assert_eq!(ends.relayed[1].ended(), CloseReason::ApplicationGone);
    assert_eq!(ends.relayed[0].ended(), CloseReason::UpstreamReset);
}

/// A tunnel with one relay; the test plays the other.
struct Half {
    node: Node,
    application: TcpStream,
    watched: Watched,
    tunnel: TcpStream,
    records: Records,
}

fn half() -> Half {
    let node = Node::new();
    let (ours, theirs) = pair();
    let (a, tunnel) = sockets();
    let (application, watched) = node.tunnel(Direction::Outbound, a, ours);
    Half { node, application, watched, tunnel, records: theirs.records() }
}

#[test]
fn truncation_is_a_reset() {
    for complete in [true, false] {
        let mut half = half();
        let record = half.records.seal(b"some data").expect("a record");
        write_all(&half.tunnel, &[&record]);
        let mut got = [0; 9];
        (&half.application).read_exact(&mut got).expect("receiving");
        if !complete {
            let record = half.records.seal(b"lost").expect("a record");
            write_all(&half.tunnel, &[&record[..record.len() - 1]]);
        }
        end(&half.tunnel);
        assert_reset(&half.application);
        assert_reset(&half.tunnel);
        assert_eq!(half.watched.ended(), CloseReason::Truncated);
        assert_eq!(half.node.counters.refused(RefusalReason::Truncated), 1);
        assert_eq!(half.node.counters.closed_reset.load(Relaxed), 1);
    }
}

#[test]
fn alerts_are_resets_and_counted() {
    let cases = [
        (AlertDescription::AccessDenied, RefusalReason::DeniedByPeer),
        (AlertDescription::InternalError, RefusalReason::PeerUpstreamUnreachable),
        (AlertDescription::CertificateRevoked, RefusalReason::DeniedByPeer),
    ];
    for (alert, counted) in cases {
        let mut half = half();
        let alert = half.records.seal_alert(alert).expect("a record");
        write_all(&half.tunnel, &[&alert]);
        assert_reset(&half.application);
        assert_eq!(half.watched.ended(), CloseReason::Denied);
        assert_eq!(half.node.counters.refused(counted), 1);
    }
}

/// The peer refused and closed; what we still send is answered by a reset. The alert was there first and is found,
/// whichever of the two the relay meets first.
#[test]
fn an_alert_is_found_behind_a_reset() {
    for _ in 0..50 {
        let mut half = half();
        let alert = half.records.seal_alert(AlertDescription::AccessDenied).expect("a record");
        let mut application = half.application.try_clone().expect("a descriptor");
        let sender = thread::spawn(move || while application.write_all(&[5; 8 << 10]).is_ok() {});
        eventually("traffic", || half.watched.connection.sent.load(Relaxed) > 0);
        // Unread data makes this close a reset.
        write_all(&half.tunnel, &[&alert]);
        drop(half.tunnel);
        sender.join().expect("sending");
        assert_eq!(half.watched.ended(), CloseReason::Denied);
        assert_eq!(half.node.counters.refused(RefusalReason::DeniedByPeer), 1);
    }
}

#[test]
fn bad_records_are_answered_and_reset() {
    let garbage: [(&[u8], AlertDescription); 2] = [
        (b"HTTP/1.1 400 Bad Request\r\n", AlertDescription::DecodeError),
        (&[23, 3, 3, 0xff, 0xff, 0, 0], AlertDescription::DecodeError),
    ];
    for (bytes, alert) in garbage {
        bad_record(&mut half(), bytes, alert);
    }
    let mut half = half();
    let mut record = half.records.seal(b"to be changed").expect("a record");
    *record.last_mut().expect("a tag") ^= 1;
    bad_record(&mut half, &record, AlertDescription::BadRecordMac);
}

fn bad_record(half: &mut Half, bytes: &[u8], alert: AlertDescription) {
    write_all(&half.tunnel, &[bytes]);
    let (mut answer, _) = read_all(&half.tunnel);
    let length = answer.len();
    assert_eq!(half.records.open(&mut answer), Ok(Some((Opened::Alert(alert), length))));
    assert_reset(&half.application);
    assert_eq!(half.watched.ended(), CloseReason::BadRecord);
    assert_eq!(half.node.counters.refused(RefusalReason::BadRecord), 1);
}

/// What follows `close_notify` is no part of the stream.
#[test]
fn data_behind_the_end_is_ignored() {
    let mut half = half();
    let mut wire = half.records.seal(b"all").expect("a record");
    wire.extend(half.records.seal_close_notify().expect("a record"));
    wire.extend(half.records.seal(b"too late").expect("a record"));
    write_all(&half.tunnel, &[&wire]);
    assert_eq!(read_all(&half.application), (b"all".to_vec(), Ok(())));
    ask_sealed(&mut half);
    end(&half.application);
    assert_eq!(half.watched.ended(), CloseReason::Finished);
}

/// The application's direction still works.
fn ask_sealed(half: &mut Half) {
    (&half.application).write_all(b"answer").expect("sending");
    let mut wire = vec![0; 5 + 6 + 17];
    (&half.tunnel).read_exact(&mut wire).expect("a record");
    let Ok(Some((Opened::Data(range), _))) = half.records.open(&mut wire) else { panic!("no data record") };
    assert_eq!(&wire[range], b"answer");
}

/// A tunnel lost after its end was read is still noticed.
#[test]
fn a_reset_behind_the_end_is_noticed() {
    let mut half = half();
    let end = half.records.seal_close_notify().expect("a record");
    write_all(&half.tunnel, &[&end]);
    assert_end(&half.application);
    reset(half.tunnel);
    assert_eq!(half.watched.ended(), CloseReason::UpstreamReset);
}

/// A socket that was reset before the relay got it.
#[test]
fn a_reset_before_the_hand_over_crosses() {
    let node = Node::new();
    for application in [true, false] {
        let ((client, inner), (outer, server)) = (sockets(), sockets());
        let (resetting, other) = if application { (client, server) } else { (server, client) };
        reset(resetting);
        let path = Path::Plain { outward: Plain::default(), inward: Plain::default() };
        let watched = node.place(node.add(Direction::Outbound, DataPath::Plain), inner, outer, path);
        assert_reset(&other);
        let expected = if application { CloseReason::ApplicationReset } else { CloseReason::UpstreamReset };
        assert_eq!(watched.ended(), expected);
    }
}

/// With buffers that hold less than a record and a peer that reads slowly, the end comes behind the last byte all the same: kernel TLS keeps what
/// the socket does not take, and a FIN must not overtake it.
#[test]
fn the_end_waits_for_what_the_socket_does_not_take() {
    for round in 0..5 {
        let node = Node::new();
        let (ours, theirs) = pair();
        let mut records = theirs.records();
        let (a, tunnel) = sockets();
        SockRef::from(&a).set_send_buffer_size(4096).expect("SO_SNDBUF");
        SockRef::from(&tunnel).set_recv_buffer_size(4096).expect("SO_RCVBUF");
        let (mut application, watched) = node.tunnel(Direction::Outbound, a, ours);
        let total = 100_000 + round * 7919;
        let sender = thread::spawn(move || {
            application.write_all(&vec![3; total]).expect("sending");
            end(&application);
            application
        });
        let (mut wire, mut got, mut ended) = (Vec::new(), 0, false);
        let mut piece = [0; 1500];
        loop {
            let read = (&tunnel).read(&mut piece).expect("receiving");
            if read == 0 {
                break;
            }
            wire.extend_from_slice(&piece[..read]);
            while let Some((opened, length)) = records.open(&mut wire).expect("whole records") {
                match opened {
                    Opened::Data(range) => got += range.len(),
                    Opened::CloseNotify => ended = true,
                    other => panic!("{other:?}"),
                }
                wire.drain(..length);
                if ended {
                    break;
                }
            }
        }
        assert!(ended, "FIN without close_notify after {got} of {total} bytes");
        assert_eq!((got, wire.len()), (total, 0));
        drop(sender.join().expect("sending"));
        drop(tunnel);
        watched.ended();
    }
}
