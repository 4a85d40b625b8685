//! Certificates that live for seconds and a root that is replaced, under handshakes all the time.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::net::{TcpListener, TcpStream};

use super::{LIMIT, domain, identity, set};
use crate::{
    identity::{CertificateStore, LocalIssuer},
    tunnel::{TlsConfigs, handshake},
};

#[tokio::test]
async fn no_handshake_fails_while_everything_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let ca = directory.path().join("ca");
    let (client, server) = (identity("client"), identity("server"));
    // Two agents that share the directory.
    let mut agents = Vec::new();
    for name in ["client", "server"] {
        let issuer = Arc::new(LocalIssuer::open(&ca, &domain(), Duration::from_secs(3)).unwrap());
        let store = CertificateStore::new(Arc::clone(&issuer) as _);
        store.want(set(&[name]));
        let run = tokio::spawn(Arc::clone(&store).run());
        store.wait_for(&identity(name), LIMIT).await.expect("a certificate");
        agents.push((TlsConfigs::new(Arc::clone(&store), domain()), store, issuer, run));
    }
    let first_roots = agents[0].1.current(&client).unwrap().roots_id;
    agents[1].2.rotate().unwrap();

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let started = Instant::now();
    let (mut handshakes, mut resumed, mut serials, mut roots) = (0, 0, Vec::new(), vec![first_roots]);
    // Until one root is alone again: old, old and new, new.
    while roots.len() < 3 {
        assert!(started.elapsed() < LIMIT, "{} roots so far", roots.len());
        let (dialled, accepted) = tokio::join!(
            async {
                let stream = TcpStream::connect(address).await.unwrap();
                let mut session = handshake::connect(stream, &agents[0].0, &client, &server, Vec::new).await?;
                session.receive(1024).await?;
                Ok::<_, crate::tunnel::TunnelError>(session.info)
            },
            async {
                let (stream, _) = listener.accept().await.unwrap();
                let mut session = handshake::accept(stream, &agents[1].0, &server).await?;
                session.send(b"welcome").await?;
                Ok::<_, crate::tunnel::TunnelError>(session.info)
            }
        );
        let at = started.elapsed();
        let dialled = dialled.unwrap_or_else(|e| panic!("client, handshake {handshakes} after {at:?}: {e}"));
        accepted.unwrap_or_else(|e| panic!("server, handshake {handshakes} after {at:?}: {e}"));
        handshakes += 1;
        resumed += u32::from(dialled.resumed);
        let svid = agents[0].1.current(&client).expect("never without a certificate");
        if serials.last() != Some(&svid.serial) {
            serials.push(svid.serial.clone());
        }
        if roots.last() != Some(&svid.roots_id) {
            roots.push(svid.roots_id);
        }
    }
    assert!(serials.len() >= 5, "{} certificates", serials.len());
    assert!(handshakes > 100 && resumed > 0, "{handshakes} handshakes, {resumed} resumed");
    for (.., run) in agents {
        run.abort();
    }
}
