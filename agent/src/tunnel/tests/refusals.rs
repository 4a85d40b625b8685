use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType};
use time::OffsetDateTime;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::support::{Party, error, meet, unchecked};
use crate::{
    identity::Svid,
    telemetry::RefusalReason as R,
    tunnel::{
        TunnelError,
        handshake::connect,
        testing::{TestCa, identity},
    },
};

/// A certificate that a peer must refuse, with the reason it is counted under.
struct Bad {
    name: &'static str,
    params: CertificateParams,
    /// Signed by another CA, or by itself.
    signer: Signer,
    as_client: Option<R>,
    as_server: Option<R>,
}

enum Signer {
    Trusted,
    Other,
    OtherOfThatName,
    Itself,
}

fn bad_certificates(owner: &str) -> Vec<Bad> {
    let good = || TestCa::leaf(&identity(owner).to_string());
    let names = |names: Vec<SanType>| {
        let mut params = good();
        params.subject_alt_names = names;
        params
    };
    let uri = |uri: &str| SanType::URI(uri.try_into().unwrap());
    let dns = SanType::DnsName("web.default.svc.cluster.local".try_into().unwrap());
    let purpose = |purpose| {
        let mut params = good();
        params.extended_key_usages = vec![purpose];
        params
    };
    let dates = |from: i64, to: i64| {
        let mut params = good();
        params.not_before = OffsetDateTime::now_utc() + time::Duration::seconds(from);
        params.not_after = OffsetDateTime::now_utc() + time::Duration::seconds(to);
        params
    };
    let mut ca = good();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let mut signs = good();
    signs.key_usages.push(KeyUsagePurpose::KeyCertSign);
    let both = |name, params, reason| Bad {
        name,
        params,
        signer: Signer::Trusted,
        as_client: Some(reason),
        as_server: Some(reason),
    };
    let me = identity(owner).to_string();
    let foreign = "spiffe://other.test/ns/default/sa/client";
    vec![
        both("another trust domain", names(vec![uri(foreign)]), R::WrongTrustDomain),
        Bad {
            as_client: None,
            ..both("another identity", TestCa::leaf(&identity("mallory").to_string()), R::WrongIdentity)
        },
        both("DNS name only", names(vec![dns.clone()]), R::InvalidCertificate),
        both("no SAN", names(vec![]), R::InvalidCertificate),
        both("another SPIFFE form", names(vec![uri("spiffe://td.test/workload/web")]), R::InvalidCertificate),
        both("another URI", names(vec![uri("https://td.test/ns/default/sa/client")]), R::InvalidCertificate),
        both("two URIs", names(vec![uri(&me), uri(foreign)]), R::InvalidCertificate),
        both("the same URI twice", names(vec![uri(&me), uri(&me)]), R::InvalidCertificate),
        Bad {
            as_server: None,
            ..both("server only", purpose(ExtendedKeyUsagePurpose::ServerAuth), R::InvalidCertificate)
        },
        Bad {
            as_client: None,
            ..both("client only", purpose(ExtendedKeyUsagePurpose::ClientAuth), R::InvalidCertificate)
        },
        both("for code signing", purpose(ExtendedKeyUsagePurpose::CodeSigning), R::InvalidCertificate),
        both("a CA", ca, R::InvalidCertificate),
        both("may sign certificates", signs, R::InvalidCertificate),
        both("expired", dates(-100, -10), R::CertificateExpired),
        both("not yet valid", dates(1000, 2000), R::CertificateExpired),
        Bad { signer: Signer::Itself, ..both("self-signed", good(), R::UntrustedIssuer) },
        Bad { signer: Signer::Other, ..both("other CA", good(), R::UntrustedIssuer) },
        Bad { signer: Signer::OtherOfThatName, ..both("other CA of that name", good(), R::UntrustedIssuer) },
    ]
}

fn make(ca: &TestCa, bad: &Bad, owner: &str) -> Svid {
    let (certificate, key) = match bad.signer {
        Signer::Trusted => ca.sign(&bad.params),
        Signer::Other => TestCa::new("other root").sign(&bad.params),
        Signer::OtherOfThatName => TestCa::new("root").sign(&bad.params),
        Signer::Itself => {
            let key = KeyPair::generate().unwrap();
            (bad.params.self_signed(&key).unwrap(), key)
        }
    };
    unchecked(identity(owner), &certificate, &key, ca.0.der())
}

/// What a client is told that believes its handshake has succeeded.
async fn told(stream: TcpStream, client: &Party, server: &Party) -> TunnelError {
    let mut session =
        connect(stream, &client.configs, &client.id, &server.id, Vec::new).await.unwrap_or_else(|e| panic!("{e}"));
    session.receive(1024).await.unwrap_err()
}

#[tokio::test]
async fn bad_clients_are_refused_with_an_alert() {
    let ca = TestCa::new("root");
    let server = Party::new(&ca.svid(&identity("server"))).await;
    let mut tried = 0;
    for bad in bad_certificates("client") {
        let Some(reason) = bad.as_client else { continue };
        tried += 1;
        let client = Party::new(&make(&ca, &bad, "client")).await;
        let (told, outcome) = meet(async |s| told(s, &client, &server).await, &server).await;
        let refused = error(outcome);
        assert_eq!(refused.reason(), reason, "{}: {refused}", bad.name);
        // An alert arrived, not a reset: the reasons that it can have.
        assert!(matches!(told, TunnelError::Refused { .. }), "{}: {told}", bad.name);
        assert!(told.to_string().contains("alert"), "{}: {told}", bad.name);
    }
    assert_eq!(tried, 16);
}

#[tokio::test]
async fn bad_servers_are_refused_with_an_alert() {
    let ca = TestCa::new("root");
    let client = Party::new(&ca.svid(&identity("client"))).await;
    let mut tried = 0;
    for bad in bad_certificates("server") {
        let Some(reason) = bad.as_server else { continue };
        tried += 1;
        let server = Party::new(&make(&ca, &bad, "server")).await;
        let dial = async |s| error(connect(s, &client.configs, &client.id, &server.id, Vec::new).await);
        let (refused, outcome) = meet(dial, &server).await;
        assert_eq!(refused.reason(), reason, "{}: {refused}", bad.name);
        let told = error(outcome);
        assert!(told.to_string().contains("alert"), "{}: {told}", bad.name);
    }
    assert_eq!(tried, 17);
}

#[tokio::test]
async fn without_extended_key_usage_or_with_a_dns_name_beside_it_passes() {
    let ca = TestCa::new("root");
    let mut params = TestCa::leaf(&identity("server").to_string());
    params.extended_key_usages.clear();
    params.subject_alt_names.push(SanType::DnsName("web".try_into().unwrap()));
    let (certificate, key) = ca.sign(&params);
    let server = Party::new(&unchecked(identity("server"), &certificate, &key, ca.0.der())).await;
    let mut params = TestCa::leaf(&identity("client").to_string());
    params.extended_key_usages.clear();
    let (certificate, key) = ca.sign(&params);
    let client = Party::new(&unchecked(identity("client"), &certificate, &key, ca.0.der())).await;
    super::support::established(&client, &server).await;
}

#[tokio::test]
async fn what_is_not_tls_is_refused_at_once() {
    let ca = TestCa::new("root");
    let server = Party::new(&ca.svid(&identity("server"))).await;
    for (bytes, reason) in [
        (&b"GET / HTTP/1.1\r\nHost: web\r\n\r\n"[..], R::NotTls),
        (b"G", R::NotTls),
        (&[0; 64], R::NotTls),
        (&[22, 2], R::NotTls),
        (&[23, 3, 3, 0, 20], R::NotTls),
        (&[22, 3, 1, 0xff, 0xff], R::NotTls),
        (&[22, 3, 1, 0, 5, 1, 0, 0, 1, 0], R::TlsHandshake),
        (&[22, 3, 1, 0, 4, 2, 0, 0, 0], R::TlsHandshake),
        (&[21, 3, 1, 0, 2, 2, 40], R::TlsHandshake),
    ] {
        let dial = async |mut s: TcpStream| {
            s.write_all(bytes).await.unwrap();
            let mut answer = Vec::new();
            // Either the end or a reset; the server has not waited for more.
            let _ = s.read_to_end(&mut answer).await;
            answer
        };
        let (answer, outcome) = meet(dial, &server).await;
        let refused = error(outcome);
        assert_eq!(refused.reason(), reason, "{bytes:?}: {refused}");
        assert!(answer.is_empty() || answer[0] == 21, "{bytes:?}: answered {answer:?}");
    }
}

#[tokio::test]
async fn a_peer_that_leaves_is_noticed() {
    let ca = TestCa::new("root");
    let server = Party::new(&ca.svid(&identity("server"))).await;
    let ((), outcome) = meet(async |s| drop(s), &server).await;
    assert_eq!(error(outcome).reason(), R::TlsHandshake);
    // In the middle of a record.
    let half = async |mut s: TcpStream| s.write_all(&[22, 3, 1, 1, 0, 1]).await.unwrap();
    let ((), outcome) = meet(half, &server).await;
    assert_eq!(error(outcome).reason(), R::TlsHandshake);
}

#[tokio::test]
async fn a_server_that_speaks_something_else() {
    let ca = TestCa::new("root");
    let client = Party::new(&ca.svid(&identity("client"))).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (mut other, _) = listener.accept().await.unwrap();
    other.write_all(b"220 mail ready\r\n").await.unwrap();
    let refused = error(connect(stream, &client.configs, &client.id, &identity("server"), Vec::new).await);
    assert_eq!(refused.reason(), R::NotTls);
    assert!(refused.to_string().contains("220 mail"), "{refused}");
}

/// A changed byte within the server's first flight, which is longer than this with X25519MLKEM768, is noticed.
#[tokio::test]
async fn a_handshake_with_changed_bytes_fails() {
    let ca = TestCa::new("root");
    let client = Party::new(&ca.svid(&identity("client"))).await;
    let server = Party::new(&ca.svid(&identity("server"))).await;
    for at in (0..1600).step_by(97) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        // Between them, changing one byte of what the server sends.
        let between = async |from_client: TcpStream| {
            let mut to_server = TcpStream::connect(address).await.unwrap();
            let (mut from_client, mut to_client) = from_client.into_split();
            let (mut from_server, mut to_server) = to_server.split();
            let changed = async {
                let (mut seen, mut buffer) = (0, vec![0; 4096]);
                while let Ok(n @ 1..) = from_server.read(&mut buffer).await {
                    if (seen..seen + n).contains(&at) {
                        buffer[at - seen] ^= 0x20;
                    }
                    seen += n;
                    if to_client.write_all(&buffer[..n]).await.is_err() {
                        break;
                    }
                }
                let _ = to_client.shutdown().await;
                assert!(seen > at, "byte {at} was never sent");
            };
            let plain = async {
                let _ = tokio::io::copy(&mut from_client, &mut to_server).await;
                let _ = to_server.shutdown().await;
            };
            tokio::join!(changed, plain)
        };
        let dial = async |s: TcpStream| connect(s, &client.configs, &client.id, &server.id, Vec::new).await.map(drop);
        let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let run = async {
            tokio::join!(
                async { dial(TcpStream::connect(proxy.local_addr().unwrap()).await.unwrap()).await },
                async { between(proxy.accept().await.unwrap().0).await },
                async {
                    let (stream, _) = listener.accept().await.unwrap();
                    crate::tunnel::handshake::accept(stream, &server.configs, &server.id).await.map(drop)
                }
            )
        };
        let (dialled, ..) = tokio::time::timeout(Duration::from_secs(20), run).await.expect("no hang");
        assert!(dialled.is_err(), "byte {at} was changed and nobody noticed");
    }
}
