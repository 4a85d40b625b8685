//! The agent's issuer against the server: renewals, new serving certificates, and the server away.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use tokio::{net::TcpListener, time::timeout};

use super::{Files, LIMIT, Replica, cluster::agent, eventually, identity, roots, settings, two_nodes};
use crate::identity::{CertificateStore, Issuer as _, IstioIssuer, Kept, Leaf};

#[tokio::test]
async fn certificates_are_renewed_and_kept_while_the_server_is_away() {
    let cluster = two_nodes();
    let replica = Replica::start(&cluster, settings()).await;
    let files = Files::new(&cluster, &cluster.agent_token("agent-n1")).await;
    let address = replica.address;
    let issuer = IstioIssuer::new(files.ca(address, Duration::from_secs(12))).unwrap();
    let store = CertificateStore::new(Arc::new(issuer));
    assert_eq!(store.source(), "istio");
    store.want([identity("web"), identity("db"), identity("cache")].into());
    let run = tokio::spawn(Arc::clone(&store).run());
    let first = store.wait_for(&identity("web"), LIMIT).await.expect("a certificate");
    assert!(store.wait_for(&identity("db"), LIMIT).await.is_some());
    assert!(store.current(&identity("cache")).is_none(), "of the other node");
    let lifetime = first.not_after.duration_since(SystemTime::now()).unwrap();
    assert!(lifetime <= Duration::from_secs(12), "{lifetime:?}");

    let renewed = async |old: &str| {
        let old = old.to_owned();
        eventually("renewed", async || store.current(&identity("web")).expect("never without").serial != old).await;
        store.current(&identity("web")).unwrap()
    };
    let second = renewed(&first.serial).await;
    assert!(first.valid_at(SystemTime::now()), "before the old one expired");

    replica.stop().await;
    let failing = async {
        // Past the half-life of the current certificate, so that a renewal was tried.
        while second.not_after.duration_since(SystemTime::now()).unwrap_or_default() > Duration::from_secs(4) {
            assert!(store.current(&identity("web")).is_some_and(|c| c.serial == second.serial), "the old one is kept");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    failing.await;
    let listener = TcpListener::bind(address).await.unwrap();
    let _again = Replica::on(listener, &cluster, settings()).await;
    let third = renewed(&second.serial).await;
    assert_eq!(third.roots_id, first.roots_id, "another process, the same root");
    run.abort();
}

/// An agent is killed while the authority is away: the next one has what the first was issued.
#[tokio::test]
async fn an_agent_that_starts_without_the_authority_uses_what_was_kept() {
    let cluster = two_nodes();
    let replica = Replica::start(&cluster, settings()).await;
    let files = Files::new(&cluster, &cluster.agent_token("agent-n1")).await;
    let (address, lifetime) = (replica.address, Duration::from_secs(20));
    let directory = files.directory.path().join("kept");
    let store = || {
        let kept = Kept::on(directory.clone()).unwrap();
        let issuer = IstioIssuer::new(files.ca(address, lifetime)).unwrap().keeping(Some(kept));
        CertificateStore::new(Arc::new(issuer))
    };
    let kept = || std::fs::read_dir(&directory).unwrap().count();

    let first = store();
    first.want([identity("web"), identity("db")].into());
    let run = tokio::spawn(Arc::clone(&first).run());
    let web = first.wait_for(&identity("web"), LIMIT).await.expect("a certificate");
    first.wait_for(&identity("db"), LIMIT).await.expect("a certificate");
    assert_eq!(kept(), 2);
    run.abort();
    replica.stop().await;

    let second = store();
    second.want([identity("web"), identity("db"), identity("cache")].into());
    let run = tokio::spawn(Arc::clone(&second).run());
    let again = second.wait_for(&identity("web"), LIMIT).await.expect("the one that was kept");
    assert_eq!((&again.serial, again.roots_id), (&web.serial, web.roots_id));
    again.verify(SystemTime::now()).unwrap();
    assert!(second.current(&identity("cache")).is_none(), "never issued");

    // It is renewed as any other when the authority is back, and what is not wanted any more is not kept.
    let listener = TcpListener::bind(address).await.unwrap();
    let replica = Replica::on(listener, &cluster, settings()).await;
    let renewed = async || second.current(&identity("web")).is_some_and(|c| c.serial != web.serial);
    eventually("renewed", renewed).await;
    second.want([identity("web")].into());
    eventually("forgotten", async || kept() == 1).await;
    let last = second.current(&identity("web")).unwrap();
    run.abort();
    replica.stop().await;

    // One that has ended is not used: a connection is refused, and nothing is left of the key.
    let left = last.not_after.duration_since(SystemTime::now()).unwrap();
    tokio::time::sleep(left).await;
    let third = store();
    third.want([identity("web")].into());
    let run = tokio::spawn(Arc::clone(&third).run());
    eventually("removed", async || kept() == 0).await;
    assert!(third.current(&identity("web")).is_none() && third.all().is_empty());
    run.abort();
}

/// The kubelet replaces tokens, and nobody tells.
#[tokio::test]
async fn the_token_is_read_each_time() {
    let cluster = two_nodes();
    let replica = Replica::start(&cluster, settings()).await;
    let mut expired = agent("agent-n1");
    expired.expires = SystemTime::now() - Duration::from_secs(1);
    let files = Files::new(&cluster, &cluster.token(expired)).await;
    let issuer = files.issuer(replica.address);
    let error = issuer.issue(&identity("web")).await.err().unwrap().to_string();
    for part in ["https://127.0.0.1:", "sa/web", "the token is not accepted", "issuer.istio.tokenFile", "expired"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    std::fs::write(files.token_file(), cluster.agent_token("agent-n1")).unwrap();
    issuer.issue(&identity("web")).await.unwrap_or_else(|e| panic!("{e}"));
}

#[tokio::test]
async fn what_goes_wrong_is_explained() {
    let cluster = two_nodes();
    let replica = Replica::start(&cluster, settings()).await;
    let token = cluster.agent_token("agent-n1");
    let files = Files::new(&cluster, &token).await;
    let error = async |ca: crate::mesh::IstioCa| {
        let issuer = IstioIssuer::new(ca).unwrap();
        let error = issuer.issue(&identity("web")).await.err().expect("is refused").to_string();
        assert!(!error.contains(&token) && error.len() < 2000, "{error}");
        error
    };
    let ca = || files.ca(replica.address, Duration::from_hours(1));

    let other = rcgen::generate_simple_self_signed(["x".to_owned()]).unwrap();
    let foreign = files.directory.path().join("foreign.crt");
    std::fs::write(&foreign, other.cert.pem()).unwrap();
    let mut wrong = ca();
    wrong.root_file = foreign;
    let said = error(wrong).await;
    assert!(
        said.contains("no connection") && said.contains("UnknownIssuer") && said.contains("issuer.istio.rootFile"),
        "{said}"
    );

    let mut wrong = ca();
    wrong.server_name = Some("istiod.istio-system.svc".into());
    let said = error(wrong).await;
    assert!(said.contains("certificate not valid for name") && said.contains("issuer.istio.serverName"), "{said}");

    let mut wrong = ca();
    wrong.root_file = files.directory.path().join("missing.crt");
    let said = error(wrong).await;
    assert!(
        said.contains("reading issuer.istio.rootFile") && said.contains("missing.crt") && said.contains("mount"),
        "{said}"
    );

    for (content, expected) in
        [("", "no token in it"), (" \n", "no token in it"), ("a\u{7f}b", "characters that no token has")]
    {
        let mut wrong = ca();
        wrong.token_file = files.directory.path().join("odd");
        std::fs::write(&wrong.token_file, content).unwrap();
        let said = error(wrong).await;
        assert!(said.contains("reading issuer.istio.tokenFile") && said.contains(expected), "{said}");
    }

    let unused = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut wrong = ca();
    wrong.address = format!("https://{}", unused.local_addr().unwrap()).parse().unwrap();
    drop(unused);
    let said = error(wrong).await;
    assert!(
        said.contains("no connection") && said.contains("refused") && said.contains("issuer.istio.address"),
        "{said}"
    );

    let issuer = files.issuer(replica.address);
    let said = issuer.issue(&identity("cache")).await.err().unwrap().to_string();
    assert!(said.contains("runs on node n1") && said.contains("pods that run on this agent's node only"), "{said}");
}

/// The CA was replaced by another one, with another root: the agent is given its root, and goes on.
#[tokio::test]
async fn a_changed_root_file_is_used_at_once() {
    let cluster = two_nodes();
    let replica = Replica::start(&cluster, settings()).await;
    let files = Files::new(&cluster, &cluster.agent_token("agent-n1")).await;
    let address = replica.address;
    let issuer = files.issuer(address);
    let first = issuer.issue(&identity("web")).await.unwrap_or_else(|e| panic!("{e}"));
    replica.stop().await;
    cluster.delete("secrets", "mesh", "underpass-ca");
    let old = roots(&cluster).unwrap();
    let listener = TcpListener::bind(address).await.unwrap();
    let _other = Replica::on(listener, &cluster, settings()).await;
    eventually("another root is published", async || roots(&cluster).unwrap() != old).await;

    let error = issuer.issue(&identity("web")).await.err().expect("the new server is not believed").to_string();
    assert!(error.contains("no connection"), "{error}");
    let changed = issuer.changed();
    std::fs::write(files.root_file(), roots(&cluster).unwrap()).unwrap();
    timeout(LIMIT, changed).await.expect("the change is noticed");
    let second = issuer.issue(&identity("web")).await.unwrap_or_else(|e| panic!("{e}"));
    assert_ne!(second.roots_id, first.roots_id);
    let quiet = timeout(Duration::from_millis(500), issuer.changed()).await;
    assert!(quiet.is_err(), "reading is no change");
}

/// The serving certificate is replaced while the server runs.
#[tokio::test]
async fn the_servers_own_certificate_is_renewed() {
    let cluster = two_nodes();
    let mut settings = settings();
    settings.lifetime = Duration::from_secs(6);
    let replica = Replica::start(&cluster, settings).await;
    replica.ready().await;
    let files = Files::new(&cluster, &cluster.agent_token("agent-n1")).await;
    let shown = async || {
        let mut store = rustls::RootCertStore::empty();
        let pem = std::fs::read(files.root_file()).unwrap();
        for root in CertificateDer::pem_slice_iter(&pem) {
            store.add(root.unwrap()).unwrap();
        }
        let config = rustls::ClientConfig::builder_with_provider(rustls::crypto::aws_lc_rs::default_provider().into())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(store)
            .with_no_client_auth();
        let stream = tokio::net::TcpStream::connect(replica.address).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let stream = connector.connect("underpass-ca.mesh.svc".try_into().unwrap(), stream).await?;
        Ok::<_, std::io::Error>(stream.get_ref().1.peer_certificates().unwrap()[0].to_vec())
    };
    eventually("it is shown", async || shown().await.is_ok()).await;
    let first = shown().await.unwrap();
    assert!(Leaf::parse(&first).unwrap_err().contains("no URI SAN"), "nobody's identity");
    eventually("renewed, and valid all the time", async || shown().await.unwrap() != first).await;
    files.issuer(replica.address).issue(&identity("web")).await.unwrap_or_else(|e| panic!("{e}"));
}
