//! Against another implementation of TLS: the `openssl` program.

use std::{process::Stdio, time::Duration};

use rustls::pki_types::CertificateDer;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    time::timeout,
};

use super::support::{Party, error};
use crate::{
    telemetry::RefusalReason,
    tunnel::{
        Session, TunnelError, handshake,
        testing::{TestCa, identity},
    },
};

const LIMIT: Duration = Duration::from_secs(20);

/// `cert.pem`, `key.pem` and `ca.pem` for `name`.
fn files(ca: &TestCa, name: &str) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key) = ca.sign(&TestCa::leaf(&identity(name).to_string()));
    std::fs::write(directory.path().join("cert.pem"), certificate.pem()).unwrap();
    std::fs::write(directory.path().join("key.pem"), key.serialize_pem()).unwrap();
    std::fs::write(directory.path().join("ca.pem"), ca.0.pem()).unwrap();
    directory
}

fn openssl(directory: &TempDir, arguments: &str) -> Child {
    Command::new("openssl")
        .args(arguments.split_whitespace())
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("the openssl program is needed for this test")
}

async fn output(mut child: Child) -> String {
    drop(child.stdin.take());
    let output = timeout(LIMIT, child.wait_with_output()).await.expect("openssl ends").unwrap();
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Our server meets `openssl s_client` with these arguments.
async fn meet_client(ca: &TestCa, arguments: &str) -> (Child, TempDir, Result<Session, TunnelError>) {
    let server = Party::new(&ca.svid(&identity("server"))).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let directory = files(ca, "client");
    let address = listener.local_addr().unwrap();
    let child = openssl(&directory, &format!("s_client -connect {address} -CAfile ca.pem -noservername {arguments}"));
    let (stream, _) = timeout(LIMIT, listener.accept()).await.expect("openssl connects").unwrap();
    let session = timeout(LIMIT, handshake::accept(stream, &server.configs, &server.id)).await.expect("no hang");
    (child, directory, session)
}

#[tokio::test]
async fn openssl_client_exchanges_data_and_updates_keys() {
    let ca = TestCa::new("root");
    let (mut child, _directory, session) =
        meet_client(&ca, "-alpn underpass/1 -cert cert.pem -key key.pem -verify_return_error").await;
    let mut session = session.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(session.info.peer, identity("client"));

    // `K` at the start of a line: new keys, and ours too please. `k`: only its own.
    let mut stdin = child.stdin.take().unwrap();
    for (i, line) in [&b"K\n"[..], b"one\n", b"k\n", b"two\n"].into_iter().enumerate() {
        stdin.write_all(line).await.unwrap();
        if i % 2 == 1 {
            let expected = line.len();
            while session.plaintext.len() < expected {
                assert_ne!(timeout(LIMIT, session.receive(1024)).await.expect("no hang").unwrap(), 0);
            }
            assert_eq!(session.plaintext, line);
            session.plaintext.clear();
            // Under our new keys, the first time.
            session.send(&[b"answer to ", line].concat()).await.unwrap();
        } else {
            // openssl reads commands by the buffer: the next line has to come in another one.
            let log = &mut BufReader::new(child.stderr.as_mut().unwrap());
            timeout(LIMIT, read_until(log, "KEYUPDATE")).await.expect("a key update");
        }
    }
    let user = &mut session.records;
    let end = user.records.seal_close_notify().unwrap();
    session.stream.write_all(&end).await.unwrap();
    drop(stdin);
    let text = output(child).await;
    assert!(text.contains("answer to one") && text.contains("answer to two"), "{text}");
    assert!(text.contains("ALPN protocol: underpass/1") && text.contains("Verify return code: 0"), "{text}");
    assert!(text.contains("TLSv1.3"), "{text}");
}

async fn read_until(log: &mut (impl AsyncBufReadExt + Unpin), wanted: &str) {
    let mut line = String::new();
    while !line.contains(wanted) {
        line.clear();
        assert_ne!(log.read_line(&mut line).await.unwrap(), 0, "openssl ended");
    }
}

#[tokio::test]
async fn openssl_clients_that_are_refused() {
    let ca = TestCa::new("root");
    let good = "-cert cert.pem -key key.pem";
    for (arguments, reason, alert) in [
        ("-alpn underpass/1".to_owned(), RefusalReason::InvalidCertificate, "certificate required"),
        (good.to_owned(), RefusalReason::NoAlpn, "no application protocol"),
        (format!("{good} -alpn h2"), RefusalReason::NoAlpn, "no application protocol"),
        (format!("{good} -alpn underpass/1 -tls1_2"), RefusalReason::TlsHandshake, "protocol version"),
        (format!("{good} -alpn underpass/1 -groups P-256"), RefusalReason::TlsHandshake, "handshake failure"),
    ] {
        let (child, _directory, session) = meet_client(&ca, &arguments).await;
        let refused = error(session);
        assert_eq!(refused.reason(), reason, "{arguments}: {refused}");
        let text = output(child).await;
        assert!(text.contains(alert), "{arguments}: {text}");
    }
}

#[tokio::test]
async fn openssl_server() {
    let ca = TestCa::new("root");
    let client = Party::new(&ca.svid(&identity("client"))).await;
    let directory = files(&ca, "server");
    // openssl says which port it got.
    let mut child = openssl(
        &directory,
        "s_server -accept 127.0.0.1:0 -naccept 1 -alpn underpass/1 -cert cert.pem -key key.pem -CAfile ca.pem -Verify 1 \
         -verify_return_error -tls1_3",
    );
    let mut log = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("ACCEPT ") {
        line.clear();
        assert_ne!(timeout(LIMIT, log.read_line(&mut line)).await.expect("no hang").unwrap(), 0);
    }
    let stream = TcpStream::connect(line["ACCEPT ".len()..].trim()).await.unwrap();
    let server = identity("server");
    let session = handshake::connect(stream, &client.configs, &client.id, &server, Vec::new);
    let mut session = timeout(LIMIT, session).await.expect("no hang").unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(session.info.peer, server);
    session.send(b"to openssl\n").await.unwrap();
    timeout(LIMIT, read_until(&mut log, "to openssl")).await.expect("our data");
    child.stdin.as_mut().unwrap().write_all(b"from openssl\n").await.unwrap();
    while session.plaintext.len() < 13 {
        assert_ne!(timeout(LIMIT, session.receive(1024)).await.expect("no hang").unwrap(), 0);
    }
    assert_eq!(session.plaintext, b"from openssl\n");
    drop(session);
    let mut rest = String::new();
    timeout(LIMIT, log.read_to_string(&mut rest)).await.expect("openssl ends").unwrap();
}

/// The roots that the other tests hand to openssl are what our own parser takes.
#[test]
fn test_certificates_are_pem() {
    use rustls::pki_types::pem::PemObject;
    let ca = TestCa::new("root");
    assert_eq!(CertificateDer::from_pem_slice(ca.0.pem().as_bytes()).unwrap(), *ca.0.der());
}
