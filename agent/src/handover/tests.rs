use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::OwnedFd,
};

use super::{Message, Predecessor, Successors, wire};
use crate::capture::inheritance::{Listening, Purpose};

#[tokio::test]
async fn a_connection_that_waits_in_a_listener_is_accepted_by_the_next_agent() {
    let run_dir = tempfile::tempdir().unwrap();
    assert!(Predecessor::find(run_dir.path()).unwrap().is_none(), "nobody is there yet");
    let successors = Successors::listen(run_dir.path()).unwrap();

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let old = async {
        let successor = successors.next().await;
        assert_eq!(successor.pid, std::process::id());
        let listening = Listening { netns: 7, sockets: vec![(Purpose::Tunnel, OwnedFd::from(listener))] };
        successor.hand(vec![listening]).await.unwrap().gone().await;
    };
    let new = async {
        let predecessor = Predecessor::find(run_dir.path()).unwrap().expect("somebody is there");
        let (inheritance, predecessor) = predecessor.take_over().await.unwrap();
        let [(Purpose::Tunnel, socket)] = <[_; 1]>::try_from(inheritance.take(7).unwrap()).unwrap() else { panic!() };
        assert!(inheritance.is_empty());
        let connection = predecessor.serving().await.unwrap();
        let (mut accepted, _) = TcpListener::from(socket).accept().unwrap();
        accepted.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
        drop(connection);
    };
    tokio::join!(old, new);
}

#[tokio::test]
async fn strangers_and_broken_messages_change_nothing() {
    let run_dir = tempfile::tempdir().unwrap();
    let successors = Successors::listen(run_dir.path()).unwrap();
    let knock = |bytes: &[u8]| {
        let mut stream = std::os::unix::net::UnixStream::connect(super::socket(run_dir.path())).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    };
    let kept = [
        knock(&[0, 0, 0, 2, b'{', b'}']),
        knock(&u32::MAX.to_be_bytes()),
        knock(b"\0\0\0\x25{\"say\":\"hello\",\"version\":9,\"pid\":1}  "),
    ];
    drop(knock(b"\0\0"));
    let last = knock(b"");
    wire::send(&last, &Message::Hello { version: super::VERSION, pid: 4 }, &[]).unwrap();
    assert_eq!(successors.next().await.pid, 4);
    drop(kept);
}

#[tokio::test]
async fn a_successor_that_ends_before_it_serves_is_an_error() {
    let run_dir = tempfile::tempdir().unwrap();
    let successors = Successors::listen(run_dir.path()).unwrap();
    let new = async {
        drop(Predecessor::find(run_dir.path()).unwrap().unwrap().take_over().await.unwrap());
    };
    let old = async { successors.next().await.hand(Vec::new()).await.err().expect("it has gone").to_string() };
    let ((), error) = tokio::join!(new, old);
    assert_eq!(error, "the other agent has gone");
}
