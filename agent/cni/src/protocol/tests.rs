//! Requests and answers over socket pairs.

use std::{
    fs::File,
    io::Write as _,
    net::Shutdown,
    os::{
        fd::{AsFd as _, AsRawFd as _, RawFd},
        unix::fs::MetadataExt as _,
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::socket::{ControlMessage, MsgFlags, sendmsg},
};

use super::*;
use crate::descriptors;

fn attachment() -> Attachment {
    Attachment {
        container: "c0ffee".into(),
        interface: "eth0".into(),
        netns: "/run/netns/cni-1".into(),
        pod: PodName { namespace: "shop".into(), name: "web-0".into(), uid: Some("6f3c".into()) },
        addresses: vec!["10.1.2.3".parse().unwrap(), "fd00::3".parse().unwrap()],
    }
}

/// What is received when a request of these bytes is sent.
fn received(bytes: &[u8]) -> io::Result<(Request, Option<OwnedFd>)> {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            // The other end may have had enough.
            let _ = ours.write_all(bytes);
        });
        receive_request(&theirs)
    })
}

#[test]
fn requests_are_this_json() {
    let json = |command| serde_json::to_string(&Request::new(command)).unwrap();
    assert_eq!(
        json(Command::Add(attachment())),
        r#"{"version":1,"command":"add","container":"c0ffee","interface":"eth0","netns":"/run/netns/cni-1","pod":{"namespace":"shop","name":"web-0","uid":"6f3c"},"addresses":["10.1.2.3","fd00::3"]}"#
    );
    let removal = Removal { container: "c0ffee".into(), pod: None };
    assert_eq!(json(Command::Del(removal)), r#"{"version":1,"command":"del","container":"c0ffee"}"#);
    assert_eq!(json(Command::Gc { valid: vec!["a".into()] }), r#"{"version":1,"command":"gc","valid":["a"]}"#);
    assert_eq!(json(Command::Status), r#"{"version":1,"command":"status"}"#);
}

#[test]
fn every_request_arrives_as_it_was_sent() {
    let pod = Some(attachment().pod);
    for command in [
        Command::Add(attachment()),
        Command::Check(Attachment { addresses: Vec::new(), ..attachment() }),
        Command::Del(Removal { container: "c0ffee".into(), pod }),
        Command::Gc { valid: (0..900).map(|index| format!("{index:064}")).collect() },
        Command::Status,
    ] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let request = Request::new(command);
        let (received, descriptor) = thread::scope(|scope| {
            scope.spawn(|| send_request(&ours, &request, None).unwrap());
            receive_request(&theirs).unwrap()
        });
        assert_eq!(received, request);
        assert!(descriptor.is_none());
    }
}

#[test]
fn answers_arrive_as_they_were_sent() {
    for answer in [
        Answer::Done { held: true },
        Answer::Done { held: false },
        Answer::Refused { message: "no \u{1f980} here\n".into(), retry: true },
    ] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        send_answer(&ours, &answer).unwrap();
        assert_eq!(receive_answer(&theirs).unwrap(), answer);
    }
    let json = serde_json::to_string(&Answer::Refused { message: "m".into(), retry: false }).unwrap();
    assert_eq!(json, r#"{"answer":"refused","message":"m","retry":false}"#);
}

#[test]
fn the_descriptor_is_the_one_that_was_sent() {
    let file = File::open("/proc/self/ns/net").unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    send_request(&ours, &Request::new(Command::Add(attachment())), Some(file.as_fd())).unwrap();
    let (_, descriptor) = receive_request(&theirs).unwrap();
    let descriptor = descriptor.unwrap();
    assert_ne!(descriptor.as_raw_fd(), file.as_raw_fd());
    let flags = FdFlag::from_bits_retain(fcntl(&descriptor, FcntlArg::F_GETFD).unwrap());
    assert!(flags.contains(FdFlag::FD_CLOEXEC));
    assert_eq!(File::from(descriptor).metadata().unwrap().ino(), file.metadata().unwrap().ino());
}

#[test]
fn surplus_descriptors_are_closed() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let bytes = serde_json::to_vec(&Request::new(Command::Add(attachment()))).unwrap();
    // The write end of a pipe counts those who have it: the read end is at its end when nobody has.
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let wanted = File::open("/dev/null").unwrap();
    let mut first: Vec<RawFd> = vec![wanted.as_raw_fd()];
    first.resize(descriptors::MOST, writer.as_raw_fd());
    let second = [writer.as_raw_fd()];
    for (part, descriptors) in [(&bytes[..1], &first[..]), (&bytes[1..9], &second[..]), (&bytes[9..], &[])] {
        let rights = [ControlMessage::ScmRights(descriptors)];
        let control = if descriptors.is_empty() { &[][..] } else { &rights };
        sendmsg::<()>(ours.as_raw_fd(), &[io::IoSlice::new(part)], control, MsgFlags::empty(), None).unwrap();
    }
    drop((ours, writer));
    let (_, descriptor) = receive_request(&theirs).unwrap();
    assert_eq!(File::from(descriptor.unwrap()).metadata().unwrap().rdev(), wanted.metadata().unwrap().rdev());
    let mut nothing = [0];
    assert_eq!(nix::unistd::read(&reader, &mut nothing).unwrap(), 0);
}

#[test]
fn another_version_is_refused_whatever_else_it_says() {
    let error = received(br#"{"version":2,"verb":"attach"}"#).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert!(error.to_string().contains("protocol version 2, and only version 1"), "{error}");
}

#[test]
fn what_is_no_request_is_refused() {
    for text in [
        "[]",
        "x",
        "{}",
        r#"{"version":"1","command":"status"}"#,
        r#"{"version":1}"#,
        r#"{"version":1,"command":"STATUS"}"#,
        r#"{"version":1,"command":"gc"}"#,
        r#"{"version":1,"command":"status"}{}"#,
        r#"{"version":1,"command":"add","container":"a","interface":"b","netns":"/","pod":{"namespace":"a","name":"b"},"addresses":["x"]}"#,
    ] {
        assert_eq!(received(text.as_bytes()).unwrap_err().kind(), io::ErrorKind::InvalidData, "{text}");
    }
    assert_eq!(received(b"\xff\xfe").unwrap_err().kind(), io::ErrorKind::InvalidData);
}

#[test]
fn a_sender_that_ends_early_is_told_from_one_that_sends_nonsense() {
    for text in ["", "{", r#"{"version":1,"comm"#, r#"{"version":1,"command":"gc","valid":["#] {
        let error = received(text.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{text}: {error}");
    }
}

#[test]
fn no_more_than_the_limit_is_taken_or_sent() {
    let command = Command::Gc { valid: vec!["x".repeat(LIMIT)] };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let error = send_request(&ours, &Request::new(command.clone()), None).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    drop((ours, theirs));
    let bytes = serde_json::to_vec(&Request::new(command)).unwrap();
    let error = received(&bytes).unwrap_err();
    assert_eq!((error.kind(), error.to_string()), (io::ErrorKind::InvalidData, "more than 65536 bytes came".into()));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let message = "\u{1}".repeat(LIMIT);
    send_answer(&ours, &Answer::Refused { message: message.clone(), retry: true }).unwrap();
    let Answer::Refused { message: cut, retry: true } = receive_answer(&theirs).unwrap() else {
        panic!("another answer")
    };
    assert!(message.starts_with(&cut) && !cut.is_empty());
}

#[test]
fn a_timeout_is_for_the_whole_request() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let limit = Duration::from_millis(200);
    theirs.set_read_timeout(Some(limit)).unwrap();
    let start = Instant::now();
    let error = thread::scope(|scope| {
        scope.spawn(move || {
            // Longer than the limit, but never that long without a byte, until the other end has gone.
            while ours.write_all(b" ").is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        });
        let error = receive_request(&theirs).unwrap_err();
        theirs.shutdown(Shutdown::Both).unwrap();
        error
    });
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    assert!(start.elapsed() >= limit);
}

#[test]
fn a_receiver_that_does_not_read_does_not_keep_the_sender() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    nix::sys::socket::setsockopt(&ours, nix::sys::socket::sockopt::SndBuf, &1).unwrap();
    ours.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
    let command = Command::Gc { valid: vec!["x".repeat(LIMIT / 2)] };
    let error = send_request(&ours, &Request::new(command), None).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
}

#[test]
fn it_does_not_matter_whether_the_sockets_block() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let request = Request::new(Command::Gc { valid: vec!["x".repeat(LIMIT / 2)] });
    thread::scope(|scope| {
        scope.spawn(|| send_request(&ours, &request, None).unwrap());
        assert_eq!(receive_request(&theirs).unwrap().0, request);
    });
}
