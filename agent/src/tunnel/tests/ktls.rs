//! Sessions whose records the kernel protects. They need a kernel that can: `cargo xtask vm` runs them.

use rustls::AlertDescription;

use super::support::{Party, error, established, meet};
use crate::{
    telemetry::{KtlsFallback, RefusalReason},
    tunnel::{
        Session, Suite, TlsOptions,
        handshake::connect,
        ktls::{Availability, Support},
        testing::{TestCa, identity},
    },
};

fn support() -> Support {
    let support = Support::probe();
    assert_eq!(support.availability, Availability::Ready, "this kernel has no kernel TLS; run `cargo xtask vm`");
    support
}

async fn parties(client: &TlsOptions, server: &TlsOptions) -> (Party, Party) {
    let ca = TestCa::new("root");
    let client = Party::with_options(&ca.svid(&identity("client")), client).await;
    let server = Party::with_options(&ca.svid(&identity("server")), server).await;
    (client, server)
}

async fn deliver(from: &mut Session, to: &mut Session, text: &[u8]) {
    let (sent, ()) = tokio::join!(from.send(text), async {
        while to.plaintext.len() < text.len() {
            assert_ne!(to.receive(usize::MAX).await.unwrap(), 0);
        }
    });
    sent.unwrap();
    assert!(to.plaintext == text, "other bytes arrived");
    to.plaintext.clear();
}

#[tokio::test]
#[ignore = "needs kernel TLS: cargo xtask vm"]
async fn every_cipher_in_every_combination() {
    let long: Vec<u8> = (0..300_000_u32).map(|i| (i % 251) as u8).collect();
    for suite in Suite::ALL {
        for (client_kernel, server_kernel) in [(true, true), (true, false), (false, true)] {
            let options = |kernel: bool| {
                let support = if kernel { support() } else { Support::disabled() };
                TlsOptions { suites: vec![suite], ..TlsOptions::with_ktls(support) }
            };
            let (client, server) = parties(&options(client_kernel), &options(server_kernel)).await;
            // The second one is resumed, and both have had tickets in between.
            for resumed in [false, true] {
                let (mut a, mut b) = established(&client, &server).await;
                assert_eq!(a.fallback().is_none(), client_kernel, "{suite:?}");
                assert_eq!(b.fallback().is_none(), server_kernel, "{suite:?}");
                assert_eq!((a.info.resumed, b.info.resumed), (resumed, resumed), "{suite:?}");
                deliver(&mut a, &mut b, b"from the client").await;
                deliver(&mut b, &mut a, b"from the server").await;
                deliver(&mut a, &mut b, &long).await;
                deliver(&mut b, &mut a, &long).await;
            }
        }
    }
}

#[tokio::test]
#[ignore = "needs kernel TLS: cargo xtask vm"]
async fn a_cipher_that_the_kernel_lacks_stays_in_the_agent() {
    let lacking = Support { suites: vec![Suite::Aes256Gcm], ..support() };
    let only_128 = TlsOptions { suites: vec![Suite::Aes128Gcm], ..TlsOptions::with_ktls(support()) };
    let (client, server) = parties(&only_128, &TlsOptions::with_ktls(lacking.clone())).await;
    let (mut a, mut b) = established(&client, &server).await;
    assert_eq!((a.fallback(), b.fallback()), (None, Some(KtlsFallback::Cipher)));
    deliver(&mut a, &mut b, b"one side in the kernel").await;

    // When there is a choice, it is for a cipher that the kernel has.
    let (client, server) = parties(&TlsOptions::with_ktls(support()), &TlsOptions::with_ktls(lacking)).await;
    let (a, b) = established(&client, &server).await;
    assert_eq!((a.fallback(), b.fallback()), (None, None), "{}", a.info.cipher);
}

/// The client has sent its header and more, and goes on sending; the server refuses without having read it.
#[tokio::test]
#[ignore = "needs kernel TLS: cargo xtask vm"]
async fn an_alert_arrives_while_data_is_in_flight() {
    let options = TlsOptions::with_ktls(support());
    let (client, server) = parties(&options, &options).await;
    let dial = async |s| {
        let mut session = connect(s, &client.configs, &client.id, &server.id).await.unwrap();
        session.send(&vec![7; 500_000]).await.unwrap();
        session
    };
    let (session, refusing) = meet_and_refuse(dial, &server).await;
    let mut session = session;
    assert_eq!(error(session.receive(usize::MAX).await).reason(), RefusalReason::DeniedByPeer);
    refusing.await.unwrap();
}

async fn meet_and_refuse(
    dial: impl AsyncFnOnce(tokio::net::TcpStream) -> Session,
    server: &Party,
) -> (Session, tokio::task::JoinHandle<()>) {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let (session, accepted) = meet(
        async |s| {
            let session = dial(s).await;
            let _ = sender.send(());
            session
        },
        server,
    )
    .await;
    receiver.await.unwrap();
    let accepted = accepted.unwrap();
    (session, tokio::spawn(accepted.refuse(AlertDescription::AccessDenied)))
}

#[tokio::test]
#[ignore = "needs kernel TLS: cargo xtask vm"]
async fn ends_without_close_notify_are_truncations() {
    let options = TlsOptions::with_ktls(support());
    let (client, server) = parties(&options, &options).await;
    let (mut a, mut b) = established(&client, &server).await;
    deliver(&mut a, &mut b, b"some").await;
    drop(a);
    assert_eq!(error(b.receive(usize::MAX).await).reason(), RefusalReason::Truncated);
}
