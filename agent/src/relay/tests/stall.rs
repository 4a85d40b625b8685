//! Slow readers and vanished nodes.

use std::{process::Command, sync::atomic::Ordering::Relaxed};

use nix::sched::{CloneFlags, unshare};

use super::*;

/// Short enough for a test, and long enough that a relay thread on a busy machine looks at its sockets in time: it may be late by twice
/// the interval.
const USER_TIMEOUT: Duration = Duration::from_secs(4);
const INTERVAL: Duration = Duration::from_millis(700);

fn nodes() -> (Node, Node) {
    let options = RelayOptions { threads: 1, buffer: 64 << 10 };
    (Node::with_interval(&options, INTERVAL), Node::with_interval(&options, INTERVAL))
}

/// A tunnel with a short user timeout on the client's side.
fn timed(near: &Node, far: &Node) -> Ends {
    let (a, b) = sockets();
    SockRef::from(&a).set_tcp_user_timeout(Some(USER_TIMEOUT)).expect("TCP_USER_TIMEOUT");
    through(near, far, a, b)
}

/// Sends in the background until nothing moves; how much was sent then.
fn fill(ends: &Ends, total: usize, seed: u64) -> JoinHandle<()> {
    let sender = send(&ends.client, seed, total, 64 << 10, true);
    eventually("backpressure", || ends.relayed.iter().all(|w| w.connection.held.load(Relaxed) > 0));
    sender
}

/// A reader that pauses for longer than the tunnel's user timeout gets everything afterwards.
#[test]
fn a_paused_reader_is_waited_for() {
    let seed = seed() >> 1;
    let (near, far) = nodes();
    let ends = timed(&near, &far);
    let total = 64 << 20;
    let sender = fill(&ends, total, seed);
    // The pause is what is tested.
    thread::sleep(USER_TIMEOUT * 2);
    receive(&ends.server, seed, total, 64 << 10, true).join().expect("every byte");
    sender.join().expect("sending");
    ends.server.shutdown(Shutdown::Write).expect("ending");
    assert_eq!(ends.reasons(), [CloseReason::Finished; 2]);
}

/// More than the window that closes, less than what the sending kernel takes.
const TOTAL: usize = 600_000;

/// The same with little in flight: the relay is not blocked, only the kernel is.
#[test]
fn a_paused_reader_is_waited_for_also_by_the_kernel() {
    let (near, far) = nodes();
    let (a, b) = sockets();
    // A window that closes early. With one of a few kilobytes, kernels before 6.6 drop segments over loopback without a word, for want of
    // memory, which nobody can tell from a vanished node.
    SockRef::from(&b).set_recv_buffer_size(64 << 10).expect("SO_RCVBUF");
    SockRef::from(&a).set_tcp_user_timeout(Some(USER_TIMEOUT)).expect("TCP_USER_TIMEOUT");
    let (ours, theirs) = pair();
    let mut theirs = theirs.records();
    let (mut client, one) = near.tunnel(Direction::Outbound, a, ours);
    drop(far);
    client.write_all(&vec![9; TOTAL]).expect("sending");
    client.shutdown(Shutdown::Write).expect("ending");
    eventually("the relay's part", || one.connection.sent.load(Relaxed) == TOTAL as u64);
    thread::sleep(USER_TIMEOUT * 2);
    assert_eq!(one.connection.close_reason(), None, "given up on a reader that only paused");
    let mut wire = Vec::new();
    (&b).read_to_end(&mut wire).expect("everything");
    let mut plaintext = 0;
    while let Some((opened, length)) = theirs.open(&mut wire).expect("records") {
        match opened {
            crate::tunnel::records::Opened::Data(range) => plaintext += range.len(),
            crate::tunnel::records::Opened::CloseNotify => break,
            other => panic!("{other:?}"),
        }
        wire.drain(..length);
    }
    assert_eq!(plaintext, TOTAL);
}

/// A node that vanishes while its window is closed is noticed all the same. In a network namespace of its own, whose
/// loopback interface goes down.
#[test]
fn a_vanished_node_behind_a_closed_window() {
    thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (needs root)");
        let ip = |arguments: &[&str]| {
            let status = Command::new("ip").args(arguments).status().expect("ip (package iproute2)");
            assert!(status.success(), "ip {arguments:?}");
        };
        ip(&["link", "set", "lo", "up"]);
        let (near, far) = nodes();
        let ends = timed(&near, &far);
        let _sender = {
            let mut client = ends.client.try_clone().expect("a descriptor");
            thread::spawn(move || while client.write_all(&vec![1; 64 << 10]).is_ok() {})
        };
        eventually("backpressure", || ends.relayed.iter().all(|w| w.connection.held.load(Relaxed) > 0));
        // Long enough that the timeout has been moved.
        thread::sleep(USER_TIMEOUT * 2);
        assert_eq!(ends.relayed[0].connection.close_reason(), None);
        ip(&["link", "set", "lo", "down"]);
        let start = Instant::now();
        assert_eq!(ends.relayed[0].ended(), CloseReason::UpstreamReset);
        assert!(start.elapsed() < USER_TIMEOUT * 3, "took {:?}", start.elapsed());
    })
    .join()
    .expect("the thread in the namespace");
}

#[test]
fn tcp_state_has_the_kernels_layout() {
    use std::mem::{offset_of, size_of};

    use crate::sys::tcp::TcpState;

    assert_eq!(offset_of!(TcpState, unacked), offset_of!(libc::tcp_info, tcpi_unacked));
    assert_eq!(offset_of!(TcpState, last_ack_recv), offset_of!(libc::tcp_info, tcpi_last_ack_recv));
    assert_eq!(offset_of!(TcpState, bytes_acked), offset_of!(libc::tcp_info, tcpi_bytes_acked));
    assert_eq!(offset_of!(TcpState, notsent_bytes), offset_of!(libc::tcp_info, tcpi_notsent_bytes));
    assert_eq!(offset_of!(TcpState, snd_wnd), offset_of!(libc::tcp_info, tcpi_snd_wnd));
    // Padding would be uninitialised, and more than Linux 5.4 fills.
    assert_eq!(size_of::<TcpState>(), offset_of!(libc::tcp_info, tcpi_snd_wnd) + 4);
}
