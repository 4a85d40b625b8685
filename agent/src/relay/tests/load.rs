//! Many connections at once.

use std::{
    io::Write,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use nix::sys::{
    epoll::EpollFlags,
    resource::{Resource, getrlimit, setrlimit},
    socket::{
        setsockopt,
        sockopt::{RcvBufForce, SndBufForce},
    },
};

use super::*;
use crate::relay::{
    buffers::Scratch,
    slot::{TURN_BYTES, TURN_STEPS, Turn},
};

fn many_descriptors() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    assert!(hard >= 16 * 1024, "needs 16,384 descriptors, the hard limit is {hard}");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("raising the limit");
}

#[test]
fn two_thousand_connections_on_two_threads() {
    let connections = scaled(2000);
    many_descriptors();
    let node = Node::with(&RelayOptions { threads: 2, ..RelayOptions::default() });
    // Both relays of each connection on the same two threads: 4,000 in all.
    let all: Vec<_> = (0..connections).map(|_| tunnelled(&node, &node)).collect();
    assert_eq!(node.table.len(), 2 * connections);
    let mut random = StdRng::seed_from_u64(seed());
    for round in 0..3u8 {
        let messages: Vec<Vec<u8>> =
            all.iter().map(|_| vec![round ^ random.random::<u8>(); random.random_range(1..3000)]).collect();
        for (ends, message) in all.iter().zip(&messages) {
            (&ends.client).write_all(message).expect("sending");
        }
        for (ends, message) in all.iter().zip(&messages) {
            let mut got = vec![0; message.len()];
            (&ends.server).read_exact(&mut got).expect("receiving");
            assert!(got == *message);
            (&ends.server).write_all(message).expect("sending");
        }
        for (ends, message) in all.iter().zip(&messages) {
            let mut got = vec![0; message.len()];
            (&ends.client).read_exact(&mut got).expect("receiving");
            assert!(got == *message);
        }
    }
    for ends in &all {
        assert!(ends.relayed.iter().all(|watched| watched.connection.held.load(Relaxed) == 0));
        ends.client.shutdown(Shutdown::Write).expect("ending");
        ends.server.shutdown(Shutdown::Write).expect("ending");
    }
    for ends in &all {
        assert_eq!(ends.reasons(), [CloseReason::Finished; 2]);
    }
    assert_eq!(node.table.len(), 0);
    assert_eq!(node.counters.closed_clean.load(Relaxed), 2 * connections as u64);
}

/// A turn ends although there is more to move and nothing in its way.
#[test]
fn a_turn_is_bounded() {
    let (node, buffer) = (Node::new(), 64 << 10);
    for piece in [TURN_BYTES, buffer / 64] {
        let ((mut client, inner), (outer, server)) = (sockets(), sockets());
        for socket in [&client, &inner, &outer, &server] {
            setsockopt(socket, RcvBufForce, &(16 << 20)).expect("SO_RCVBUFFORCE (needs root)");
            setsockopt(socket, SndBufForce, &(16 << 20)).expect("SO_SNDBUFFORCE (needs root)");
        }
        for socket in [&inner, &outer] {
            socket.set_nonblocking(true).expect("non-blocking");
        }
        let total = 4 * TURN_BYTES;
        client.write_all(&vec![1; total]).expect("sending");
        let path = Path::Plain { outward: Plain::default(), inward: Plain::default() };
        let connection = node.add(Direction::Outbound, DataPath::Plain);
        let mut slot = Slot::new(inner.into(), outer.into(), path, Arc::clone(&connection), Box::new(()));
        slot.application.note(EpollFlags::EPOLLIN);
        let mut scratch = Scratch::new(buffer);
        // With little room for each read, the number of steps is what ends the turn.
        if piece < buffer {
            scratch.bytes = vec![0; piece].into_boxed_slice();
        }
        let (mut turns, mut before) = (0, 0);
        loop {
            let turn = slot.turn(&mut scratch);
            let sent = connection.sent.load(Relaxed) as usize;
            let moved = sent - before;
            before = sent;
            assert!(moved < TURN_BYTES + buffer, "{moved} bytes in one turn");
            assert!(moved <= TURN_STEPS * scratch.bytes.len(), "{moved} bytes in one turn");
            turns += 1;
            match turn {
                Turn::More => {}
                Turn::Idle | Turn::Settling => break,
                Turn::Over(end) => panic!("{end:?}"),
            }
        }
        assert_eq!(before, total, "something was in the way");
        assert!(turns >= total / TURN_BYTES, "only {turns} turns");
    }
}

/// Connections that never stop do not starve the others of their thread.
#[test]
fn greedy_connections_leave_turns_to_others() {
    let node = Node::new();
    let stop = Arc::new(AtomicBool::new(false));
    let greedy: Vec<_> = (0..2).map(|_| tunnelled(&node, &node)).collect();
    let mut work = Vec::new();
    for ends in &greedy {
        let (mut client, mut server) = (ends.client.try_clone().expect("one"), ends.server.try_clone().expect("one"));
        let stop = Arc::clone(&stop);
        work.push(thread::spawn(move || {
            while !stop.load(Relaxed) {
                client.write_all(&vec![3; 256 << 10]).expect("sending");
            }
            client.shutdown(Shutdown::Write).expect("ending");
        }));
        work.push(thread::spawn(move || {
            let mut buffer = vec![0; 256 << 10];
            while server.read(&mut buffer).expect("receiving") > 0 {}
        }));
    }
    let moved = || greedy.iter().map(|ends| ends.relayed[0].connection.sent.load(Relaxed)).sum::<u64>();
    eventually("a bulk transfer", || moved() > 8 << 20);
    let small: Vec<_> = (0..100).map(|_| tunnelled(&node, &node)).collect();
    let before = moved();
    let start = Instant::now();
    for round in 0..10u8 {
        for ends in &small {
            (&ends.client).write_all(&[round; 100]).expect("sending");
        }
        for ends in &small {
            let mut got = [0; 100];
            (&ends.server).read_exact(&mut got).expect("receiving");
            assert_eq!(got, [round; 100]);
            (&ends.server).write_all(&got).expect("sending");
        }
        for ends in &small {
            (&ends.client).read_exact(&mut [0; 100]).expect("receiving");
        }
    }
    let (took, meanwhile) = (start.elapsed(), moved() - before);
    eprintln!("1,000 small round trips took {took:?} beside {} MiB of bulk", meanwhile >> 20);
    stop.store(true, Relaxed);
    for thread in work {
        thread.join().expect("a greedy end");
    }
    // Each of the 20 steps may have to wait for one turn of each of the 4 greedy slots. Counted in bulk bytes, so that a slow machine does not
    // matter: were the small ones starved, the greedy ones would have moved without bound.
    let bound = 10 * 2 * 16 * (4 << 20);
    assert!(meanwhile < bound, "greedy connections moved {meanwhile} bytes meanwhile, bound {bound}");
    assert!(meanwhile > 0, "the greedy connections were not busy");
}

/// What an idle connection costs besides its keys and its table entry.
#[test]
fn an_idle_connection_is_a_small_slot() {
    assert!(size_of::<Slot>() <= 320, "{} bytes", size_of::<Slot>());
}
