use std::{sync::Arc, time::Duration};

use rustls::{client::UnbufferedClientConnection, crypto::aws_lc_rs::Ticketer, server::UnbufferedServerConnection};
use time::OffsetDateTime;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::support::{Party, error, established, meet, two_parties, unchecked};
use crate::{
    identity::Revocations,
    telemetry::RefusalReason,
    tunnel::{
        Protection, Session, Suite, TlsOptions, UserRecords,
        alert::DENIED,
        config::{client_config, peer_name, provider, server_config},
        driver::{Driver, Step, Unbuffered},
        handshake::{connect, judge},
        ktls::Support,
        records::{Opened, Records},
        testing::{TestCa, identity},
        verify::{Accepted, Leaves},
    },
};

/// The records of a session that the kernel does not protect.
/// Sends `text` one way and checks that it arrives.
async fn deliver(from: &mut Session, to: &mut Session, text: &[u8]) {
    from.send(text).await.unwrap();
    while to.plaintext.len() < text.len() {
        assert_ne!(to.receive(usize::MAX).await.unwrap(), 0);
    }
    assert_eq!(to.plaintext, text);
    to.plaintext.clear();
}

#[tokio::test]
async fn both_ends_know_each_other() {
    let (_ca, client, server) = two_parties().await;
    let (mut a, mut b) = established(&client, &server).await;
    assert_eq!((&a.info.local, &a.info.peer), (&client.id, &server.id));
    assert_eq!((&b.info.local, &b.info.peer), (&server.id, &client.id));
    for info in [&a.info, &b.info] {
        assert_eq!(info.key_exchange, "X25519MLKEM768");
        assert_eq!(info.cipher, "TLS13_AES_128_GCM_SHA256");
        assert!(!info.resumed);
    }
    let long: Vec<u8> = (0..200_000_u32).map(|i| i as u8).collect();
    for _ in 0..3 {
        deliver(&mut a, &mut b, b"hello").await;
        deliver(&mut b, &mut a, b"hello yourself").await;
    }
    let (sent, ()) = tokio::join!(a.send(&long), async {
        while b.plaintext.len() < long.len() {
            assert_ne!(b.receive(usize::MAX).await.unwrap(), 0);
        }
    });
    sent.unwrap();
    assert!(b.plaintext == long);

    // An end in one direction only.
    let end = a.records.records.seal_close_notify().unwrap();
    a.stream.write_all(&end).await.unwrap();
    assert_eq!(b.receive(usize::MAX).await.unwrap(), 0);
    deliver(&mut b, &mut a, b"late answer").await;
}

#[tokio::test]
async fn the_order_of_suites_is_chosen() {
    let ca = TestCa::new("root");
    for (suite, name) in
        [(Suite::Chacha20Poly1305, "TLS13_CHACHA20_POLY1305_SHA256"), (Suite::Aes256Gcm, "TLS13_AES_256_GCM_SHA384")]
    {
        let options = TlsOptions { suites: vec![suite, Suite::Aes128Gcm], ..TlsOptions::default() };
        let client = Party::with_options(&ca.svid(&identity("client")), &options).await;
        let server = Party::with_options(&ca.svid(&identity("server")), &options).await;
        let (mut a, mut b) = established(&client, &server).await;
        assert_eq!(a.info.cipher, name);
        deliver(&mut a, &mut b, b"works").await;
        deliver(&mut b, &mut a, b"works").await;
    }
}

/// The header leaves together with the end of the handshake, so a server that reads what there is has both at once.
#[tokio::test]
async fn what_is_sent_first_comes_with_the_handshake() {
    let (_ca, client, server) = two_parties().await;
    let dial = async |s| connect(s, &client.configs, &client.id, &server.id, || b"header".to_vec()).await.unwrap();
    let (_client_session, server_session) = meet(dial, &server).await;
    let mut server_session = server_session.unwrap();
    assert!(!server_session.records.unread.is_empty(), "it was read with the handshake's last flight");
    assert_eq!(server_session.receive(1024).await.unwrap(), 6);
    assert_eq!(server_session.plaintext, b"header");
}

#[tokio::test]
async fn greedy_reads_keep_what_came_with_the_handshake() {
    let (_ca, client, server) = two_parties().await;
    let dial = async |s| {
        let mut session = connect(s, &client.configs, &client.id, &server.id, || b"header".to_vec()).await.unwrap();
        session.send(b"data").await.unwrap();
        session
    };
    let (client_session, server_session) = meet(dial, &server).await;
    let mut server_session = server_session.unwrap();
    // However the packets fell: nothing is lost, and `unread` starts with a record.
    while server_session.plaintext.len() < 10 {
        assert!(server_session.records.unread.first().is_none_or(|b| *b == 23));
        assert_ne!(server_session.receive(1024).await.unwrap(), 0);
    }
    assert_eq!(server_session.plaintext, b"headerdata");
    drop(client_session);
}

#[tokio::test]
async fn receive_is_bounded() {
    let (_ca, client, server) = two_parties().await;
    let (mut a, mut b) = established(&client, &server).await;
    a.send(&[1; 100]).await.unwrap();
    assert_eq!(b.receive(10).await.unwrap(), 100, "a record is opened whole");
    assert_eq!(b.receive(100).await.unwrap_err().reason(), RefusalReason::ProxyHeader);
}

#[tokio::test]
async fn taken_apart_and_still_alive() {
    let (_ca, client, server) = two_parties().await;
    let (mut a, b) = established(&client, &server).await;
    assert_eq!(b.info.peer, client.id);
    let (fd, protection, plaintext) = b.offload(&Support::disabled()).await.unwrap().into_parts().unwrap();
    let Protection::User(user) = protection else { panic!("kernel TLS was not asked for") };
    let UserRecords { mut records, unread, .. } = *user;
    assert!(unread.is_empty() && plaintext.is_empty());
    let std = std::net::TcpStream::from(fd);
    let mut stream = TcpStream::from_std(std).unwrap();
    stream.write_all(&records.seal(b"from the relay").unwrap()).await.unwrap();
    assert_eq!(a.receive(1024).await.unwrap(), 14);
    a.send(b"to the relay").await.unwrap();
    let mut wire = vec![0; 5 + 12 + 17];
    stream.read_exact(&mut wire).await.unwrap();
    assert_eq!(records.open(&mut wire), Ok(Some((Opened::Data(5..17), wire.len()))));
}

#[tokio::test]
async fn a_refusal_reaches_a_peer_that_is_still_sending() {
    let (_ca, client, server) = two_parties().await;
    let (mut a, b) = established(&client, &server).await;
    a.send(&vec![7; 300_000]).await.unwrap();
    let ((), error) = tokio::join!(b.refuse(DENIED), async {
        let error = a.receive(1024).await.unwrap_err();
        drop(a);
        error
    });
    assert_eq!(error.reason(), RefusalReason::DeniedByPeer);
}

#[tokio::test]
async fn how_a_tunnel_ends_is_told_apart() {
    let (_ca, client, server) = two_parties().await;
    let (mut a, b) = established(&client, &server).await;
    drop(b);
    assert_eq!(a.receive(1024).await.unwrap_err().reason(), RefusalReason::Truncated);

    let (mut a, b) = established(&client, &server).await;
    let (error, ()) = tokio::join!(
        async {
            let error = a.receive(1024).await.unwrap_err();
            drop(a);
            error
        },
        b.refuse(rustls::AlertDescription::InternalError)
    );
    assert_eq!(error.reason(), RefusalReason::PeerUpstreamUnreachable);

    let (mut a, mut b) = established(&client, &server).await;
    b.stream.write_all(&[23, 3, 3, 0, 17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).await.unwrap();
    assert_eq!(a.receive(1024).await.unwrap_err().reason(), RefusalReason::BadRecord);
}

#[tokio::test]
async fn without_resumption_on_either_side_every_handshake_is_a_full_one() {
    let ca = TestCa::new("root");
    for (at_client, at_server) in [(false, false), (true, false), (false, true)] {
        let options = |resumption| TlsOptions { resumption, ..TlsOptions::default() };
        let client = Party::with_options(&ca.svid(&identity("client")), &options(at_client)).await;
        let server = Party::with_options(&ca.svid(&identity("server")), &options(at_server)).await;
        for _ in 0..3 {
            let (mut a, mut b) = established(&client, &server).await;
            assert!(!a.info.resumed && !b.info.resumed, "client {at_client}, server {at_server}");
            // Tickets would come with the first data.
            deliver(&mut b, &mut a, b"x").await;
            deliver(&mut a, &mut b, b"x").await;
        }
    }
}

#[tokio::test]
async fn sessions_are_resumed_until_the_roots_change() {
    let (ca, client, server) = two_parties().await;
    let resumed = async || {
        let (mut a, mut b) = established(&client, &server).await;
        assert_eq!(a.info.resumed, b.info.resumed);
        // Tickets come with the first data.
        deliver(&mut b, &mut a, b"x").await;
        deliver(&mut a, &mut b, b"x").await;
        assert_eq!((&b.info.peer, &a.info.peer), (&client.id, &server.id));
        a.info.resumed
    };
    assert!(!resumed().await);
    for _ in 0..20 {
        assert!(resumed().await);
    }

    // The server's renewal keeps tickets good; the roots are the same.
    server.renew(&ca.svid(&server.id)).await;
    assert!(resumed().await);
    // A client with a new certificate shows it.
    client.renew(&ca.svid(&client.id)).await;
    assert!(!resumed().await);
    assert!(resumed().await);

    // A new root is trusted beside the old one.
    let new = TestCa::new("new root");
    let both = |svid: &crate::identity::Svid| {
        let mut svid = svid.clone();
        let mut roots = (*svid.roots).clone();
        roots.add(new.0.der().clone()).unwrap();
        svid.roots = Arc::new(roots);
        svid.roots_id = [1; 32];
        svid
    };
    server.renew(&both(&ca.svid(&server.id))).await;
    assert!(!resumed().await, "the server's tickets are gone");
    assert!(resumed().await);
    client.renew(&both(&ca.svid(&client.id))).await;
    assert!(!resumed().await, "the client's are");
    assert!(resumed().await);
}

#[tokio::test]
async fn pairs_do_not_share_sessions() {
    let (ca, client, server) = two_parties().await;
    let (mut a, mut b) = established(&client, &server).await;
    deliver(&mut b, &mut a, b"ticket").await;
    let other = Party::new(&ca.svid(&identity("other"))).await;
    assert!(!established(&client, &other).await.0.info.resumed);
    assert!(!established(&other, &server).await.0.info.resumed);
    assert!(established(&client, &server).await.0.info.resumed);
}

#[tokio::test]
async fn configurations_are_dropped_with_their_identity() {
    let (_ca, client, server) = two_parties().await;
    let (first, _) = client.configs.client(&client.id, &server.id).unwrap();
    let (again, _) = client.configs.client(&client.id, &server.id).unwrap();
    assert!(Arc::ptr_eq(&first, &again), "cached");
    let weak = Arc::downgrade(&first);
    drop((first, again));
    client.store.want(std::collections::BTreeSet::new());
    assert!(client.configs.client(&client.id, &server.id).is_none());
    assert!(weak.upgrade().is_none(), "not kept");

    let stream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stream = TcpStream::connect(stream.local_addr().unwrap()).await.unwrap();
    let refused = error(connect(stream, &client.configs, &client.id, &server.id, Vec::new).await);
    assert_eq!(refused.reason(), RefusalReason::NoCertificate);
}

/// rustls resumes a session without looking at the certificate that came with it; we do.
#[tokio::test]
async fn a_resumed_session_does_not_outlive_the_certificate() {
    let ca = TestCa::new("root");
    let (client, server) = (identity("client"), identity("server"));
    let mut short = TestCa::leaf(&client.to_string());
    short.not_after = OffsetDateTime::now_utc() + Duration::from_secs(2);
    let expires: std::time::SystemTime = short.not_after.replace_nanosecond(0).unwrap().into();
    let (certificate, key) = ca.sign(&short);
    let short = unchecked(client.clone(), &certificate, &key, ca.0.der());

    let provider = provider(&[Suite::Aes128Gcm]);
    let client_config = Arc::new(client_config(&short, &server, &provider).unwrap());
    let server_config =
        Arc::new(server_config(&ca.svid(&server), server.trust_domain(), Ticketer::new().unwrap(), &provider).unwrap());
    let accepted = Accepted::Domain(server.trust_domain().clone());
    let handshake = || {
        let mut c = Driver::new(UnbufferedClientConnection::new(Arc::clone(&client_config), peer_name()).unwrap());
        let mut s = Driver::new(UnbufferedServerConnection::new(Arc::clone(&server_config)).unwrap());
        while [pass(&mut c, &mut s), pass(&mut s, &mut c)] != [Step::Done, Step::Done] {}
        let judged = judge(s.connection.common(), &accepted, &Leaves::default(), &Revocations::default());
        let judged = judged.map(|shown| shown.leaf.identity).map_err(|(alert, e)| (alert, e.reason()));
        let resumed = s.connection.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
        let (secrets, schedule, mut tickets) = c.into_keys().unwrap();
        let mut records = Records::new(&secrets, schedule, None).unwrap();
        while let Some((_, wire)) = records.open(&mut tickets).unwrap() {
            tickets.drain(..wire);
        }
        (judged, resumed)
    };
    assert_eq!(handshake(), (Ok(client.clone()), false));
    assert_eq!(handshake(), (Ok(client), true));
    if let Ok(wait) = expires.duration_since(std::time::SystemTime::now()) {
        tokio::time::sleep(wait).await;
    }
    let expired = (rustls::AlertDescription::CertificateExpired, RefusalReason::CertificateExpired);
    assert_eq!(handshake(), (Err(expired), true));
}

fn pass<A: Unbuffered, B>(from: &mut Driver<A>, to: &mut Driver<B>) -> Step {
    let step = from.advance().unwrap();
    to.incoming.append(&mut from.outgoing);
    step
}
