//! Tunnels whose records the kernel protects. They need a kernel that can: `cargo xtask vm` runs them.

use rustls::AlertDescription;
use tokio::io::AsyncWriteExt as _;

use super::{
    kernel_end::{End, KernelEnd},
    support::{Party, established, meet},
};
use crate::{
    telemetry::KtlsFallback,
    tunnel::{
        Session, Suite, TlsOptions,
        handshake::{connect, read_more},
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

/// Hands both ends over.
async fn offloaded(
    client: Session,
    server: Session,
    parties: (&Party, &Party),
) -> [(KernelEnd, Option<KtlsFallback>); 2] {
    let (a, b) = tokio::join!(client.offload(parties.0.configs.ktls()), server.offload(parties.1.configs.ktls()));
    [a.unwrap(), b.unwrap()].map(|tunnel| {
        let fallback = tunnel.fallback();
        (KernelEnd::new(tunnel), fallback)
    })
}

async fn deliver(from: &mut KernelEnd, to: &mut KernelEnd, text: &[u8]) {
    tokio::join!(from.send(text), async {
        while to.plaintext.len() < text.len() {
            to.receive().await.unwrap();
        }
    });
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
                let (a, b) = established(&client, &server).await;
                assert_eq!((a.info.resumed, b.info.resumed), (resumed, resumed), "{suite:?}");
                let [(mut a, client_fallback), (mut b, server_fallback)] = offloaded(a, b, (&client, &server)).await;
                assert_eq!(client_fallback.is_none(), client_kernel, "{suite:?}");
                assert_eq!(server_fallback.is_none(), server_kernel, "{suite:?}");
                deliver(&mut a, &mut b, b"from the client").await;
                deliver(&mut b, &mut a, b"from the server").await;
                deliver(&mut a, &mut b, &long).await;
                deliver(&mut b, &mut a, &long).await;
            }
        }
    }
}

/// The kernel takes over in the middle: some records have been opened here, the start of one more has been read, and the rest is still in the socket.
#[tokio::test]
#[ignore = "needs kernel TLS: cargo xtask vm"]
async fn the_kernel_takes_over_between_any_two_records() {
    let options = TlsOptions::with_ktls(support());
    let (client, server) = parties(&options, &options).await;
    let text: Vec<u8> = (0..120_000_u32).map(|i| (i % 241) as u8).collect();
    for size in [1, 100, 5000, 16_384] {
        let (mut a, mut b) = established(&client, &server).await;
        let (sent, read) = tokio::join!(
            async {
                for chunk in text.chunks(size).take(20) {
                    a.send(chunk).await.unwrap();
                }
                a
            },
            async {
                b.receive(usize::MAX).await.unwrap();
                b
            }
        );
        let expected: Vec<u8> = text.chunks(size).take(20).flatten().copied().collect();
        let [(mut a, _), (mut b, fallback)] = offloaded(sent, read, (&client, &server)).await;
        assert_eq!(fallback, None);
        while b.plaintext.len() < expected.len() {
            b.receive().await.unwrap();
        }
        assert!(b.plaintext == expected, "records of {size} bytes");
        b.plaintext.clear();
        deliver(&mut a, &mut b, &text).await;
        deliver(&mut b, &mut a, &text).await;
    }
}

#[tokio::test]
#[ignore = "needs kernel TLS: cargo xtask vm"]
async fn a_cipher_that_the_kernel_lacks_stays_in_the_agent() {
    let lacking = Support { suites: vec![Suite::Aes256Gcm], ..support() };
    let only_128 = TlsOptions { suites: vec![Suite::Aes128Gcm], ..TlsOptions::with_ktls(support()) };
    let (client, server) = parties(&only_128, &TlsOptions::with_ktls(lacking.clone())).await;
    let (a, b) = established(&client, &server).await;
    let [(mut a, client_fallback), (mut b, server_fallback)] = offloaded(a, b, (&client, &server)).await;
    assert_eq!((client_fallback, server_fallback), (None, Some(KtlsFallback::Cipher)));
    deliver(&mut a, &mut b, b"one side in the kernel").await;

    // When there is a choice, it is for a cipher that the kernel has.
    let (client, server) = parties(&TlsOptions::with_ktls(support()), &TlsOptions::with_ktls(lacking)).await;
    let (a, b) = established(&client, &server).await;
    let cipher = a.info.cipher;
    let [(_, client_fallback), (_, server_fallback)] = offloaded(a, b, (&client, &server)).await;
    assert_eq!((client_fallback, server_fallback), (None, None), "{cipher}");
}

/// The client has sent its header and more, and goes on sending; the server refuses without having read it.
#[tokio::test]
#[ignore = "needs kernel TLS: cargo xtask vm"]
async fn an_alert_arrives_while_data_is_in_flight() {
    let options = TlsOptions::with_ktls(support());
    let (client, server) = parties(&options, &options).await;
    let dial = async |s| {
        let session = connect(s, &client.configs, &client.id, &server.id, || b"header".to_vec()).await.unwrap();
        let mut end = KernelEnd::new(session.offload(client.configs.ktls()).await.unwrap());
        end.send(&vec![7; 500_000]).await;
        end
    };
    let (mut end, accepted) = meet(dial, &server).await;
    let refusing = tokio::spawn(accepted.unwrap().refuse(AlertDescription::AccessDenied));
    let received = end.receive().await;
    assert!(matches!(received, Err(End::Alert(AlertDescription::AccessDenied))), "{received:?}");
    refusing.await.unwrap();
}

#[tokio::test]
#[ignore = "needs kernel TLS: cargo xtask vm"]
async fn ends_without_close_notify_are_truncations() {
    let options = TlsOptions::with_ktls(support());
    let (client, server) = parties(&options, &options).await;
    let (a, b) = established(&client, &server).await;
    let [(mut a, _), (mut b, _)] = offloaded(a, b, (&client, &server)).await;
    deliver(&mut a, &mut b, b"some").await;
    drop(a);
    let received = b.receive().await;
    // What the dropped end had not read makes its kernel send a reset.
    assert!(matches!(received, Err(End::Truncated | End::Broken(_))), "{received:?}");
}

/// The rest of a record that never comes. A socket that is no longer established cannot have kernel TLS, so the end is for the relay to meet.
#[tokio::test]
#[ignore = "needs kernel TLS: cargo xtask vm"]
async fn a_record_cut_short_stays_in_the_agent() {
    let options = TlsOptions::with_ktls(support());
    let (client, server) = parties(&options, &options).await;
    let (mut a, mut b) = established(&client, &server).await;
    a.send(b"whole").await.unwrap();
    let record = a.records.records.seal(&[1; 1000]).unwrap();
    a.stream.write_all(&record[..500]).await.unwrap();
    assert_eq!(b.receive(usize::MAX).await.unwrap(), 5);
    while b.records.unread.len() < 500 {
        read_more(&mut b.stream, &mut b.records.unread, 500).await.unwrap();
    }
    drop(a);
    let tunnel = b.offload(&support()).await.unwrap();
    assert_eq!(tunnel.fallback(), Some(KtlsFallback::Socket));
}
