//! Who gets nothing, and what exactly who gets something gets.

use std::{
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use rcgen::{CertificateParams, DnType, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use tokio::net::TcpStream;
use tonic::Code;
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};

use super::{
    Files, Lines, Raw, Replica,
    cluster::{Token, agent, pod},
    csr, eventually, identity, leaf, request, settings, two_nodes,
};
use crate::identity::istio::wire::{Metadata, Value};

const WEB: &str = "spiffe://td.test/ns/default/sa/web";
const DB: &str = "spiffe://td.test/ns/default/sa/db";
const CACHE: &str = "spiffe://td.test/ns/default/sa/cache";

#[tokio::test]
async fn an_agent_gets_identities_of_pods_on_its_node_and_no_others() {
    let lines = Lines::default();
    let _recording = lines.record();
    let cluster = two_nodes();
    let replica = Replica::start(&cluster, settings()).await;
    let raw = Raw::new(&cluster, &replica).await;
    let (one, two) = (cluster.agent_token("agent-n1"), cluster.agent_token("agent-n2"));

    let signed = raw.ask(&one, DB).await.unwrap();
    assert_eq!(signed.identity, identity("db"));
    assert_eq!(raw.ask(&two, CACHE).await.unwrap().identity, identity("cache"));
    // A pod of the account is on both.
    assert_eq!(raw.ask(&one, WEB).await.unwrap().identity, identity("web"));
    assert_eq!(raw.ask(&two, WEB).await.unwrap().identity, identity("web"));

    for (token, wanted, code, said) in [
        (&one, CACHE, Code::PermissionDenied, "no pod with spiffe://td.test/ns/default/sa/cache runs on node n1"),
        (&two, DB, Code::PermissionDenied, "runs on node n2"),
        (&one, "spiffe://td.test/ns/other/sa/db", Code::PermissionDenied, "runs on node n1"),
        (&one, "spiffe://other.test/ns/default/sa/db", Code::PermissionDenied, "trust domain td.test"),
        (&one, "spiffe://td.test/ns/default/sa/db/x", Code::InvalidArgument, "is not of the form"),
        (&one, "spiffe://td.test/ns/default,spec.nodeName=n2/sa/db", Code::InvalidArgument, "RFC 1123"),
        (&one, "", Code::InvalidArgument, "is not of the form"),
    ] {
        let refused = raw.ask(token, wanted).await.unwrap_err();
        assert_eq!(refused.code(), code, "{wanted}: {refused}");
        assert!(refused.message().contains(said), "{wanted}: {refused}");
    }

    // Without an impersonated identity it is the caller's own.
    let own = raw.send(Some(&one), request(&csr(DB), None)).await.unwrap();
    assert_eq!(leaf(&own).identity.to_string(), "spiffe://td.test/ns/mesh/sa/underpass");

    let audit = lines.with("underpass::audit");
    let signed = audit.iter().find(|l| l.contains("signed") && l.contains(DB)).unwrap_or_else(|| panic!("{audit:#?}"));
    for part in ["INFO", "node=\"n1\"", "pod=\"mesh/agent-n1\"", "serial=", "until=20", "peer=127.0.0.1"] {
        assert!(signed.contains(part), "{part}: {signed}");
    }
    let refused = audit.iter().find(|l| l.contains("refused") && l.contains(CACHE)).expect("a line about the refusal");
    for part in ["WARN", "node=\"n1\"", "pod=\"mesh/agent-n1\"", "reason=\"not-on-node\""] {
        assert!(refused.contains(part), "{part}: {refused}");
    }
    assert!(!lines.with("").iter().any(|l| l.contains(&one) || l.contains("PRIVATE KEY")), "no secret in the log");
    let metrics = replica.get("/metrics").await.1;
    assert!(metrics.contains("underpass_ca_signed_total 5\n"), "{metrics}");
    assert!(metrics.contains("underpass_ca_refused_total{reason=\"not-on-node\"} 3\n"), "{metrics}");
    assert!(metrics.contains("underpass_ca_pods 6\n") && metrics.ends_with("# EOF\n"), "{metrics}");
}

#[tokio::test]
async fn tokens_that_are_not_an_agents() {
    let cluster = two_nodes();
    cluster.add_pod(&pod("mesh", "pending", "underpass", ""));
    let mut failed = pod("mesh", "failed", "underpass", "n1");
    failed.status.as_mut().unwrap().phase = Some("Failed".into());
    cluster.add_pod(&failed);
    cluster.add_pod(&pod("mesh", "other", "other", "n1"));
    let replica = Replica::start(&cluster, settings()).await;
    let raw = Raw::new(&cluster, &replica).await;

    let with = |change: fn(&mut Token)| {
        let mut token = agent("agent-n1");
        change(&mut token);
        cluster.token(token)
    };
    let cases = [
        ("unknown", "e30.e30.sig".to_owned(), "not valid"),
        ("expired", with(|t| t.expires = SystemTime::now() - Duration::from_secs(1)), "not valid: expired"),
        ("another audience", with(|t| t.audience = "istio-ca".into()), "audience underpass-ca"),
        // A server that ignores audiences, or an authenticator that answers for others.
        ("no audience answered", with(|t| t.answered = Some(vec![])), "audience underpass-ca"),
        ("another answered", with(|t| t.answered = Some(vec!["api".into()])), "audience underpass-ca"),
        (
            "another ServiceAccount",
            with(|t| t.username = "system:serviceaccount:default:web".into()),
            "system:serviceaccount:default:web is no ServiceAccount of an agent",
        ),
        (
            "the name in another namespace",
            with(|t| t.username = "system:serviceaccount:default:underpass".into()),
            "is no ServiceAccount",
        ),
        ("a user", with(|t| t.username = "admin".into()), "is no ServiceAccount"),
        ("not bound to a pod", with(|t| t.pod = None), "bound to no pod"),
        ("a pod that is gone", with(|t| t.pod = Some(("gone".into(), "uid-gone".into()))), "pod gone is gone"),
        (
            "a pod of the name, but another one",
            with(|t| t.pod = Some(("agent-n1".into(), "uid-before".into()))),
            "pod agent-n1 is gone",
        ),
        ("a pod on no node", with(|t| t.pod = Some(("pending".into(), "uid-pending".into()))), "runs on no node"),
        ("a pod that ended", with(|t| t.pod = Some(("failed".into(), "uid-failed".into()))), "runs on no node"),
        ("another account's pod", with(|t| t.pod = Some(("other".into(), "uid-other".into()))), "is no ServiceAccount"),
    ];
    for (name, token, said) in cases {
        let refused = raw.ask(&token, WEB).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{name}: {refused}");
        assert!(refused.message().contains(said), "{name}: {refused}");
    }
    let refused = raw.send(None, request(&csr(WEB), Some(WEB))).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(refused.message().contains("no bearer token"), "{refused}");
    raw.ask(&cluster.agent_token("agent-n1"), WEB).await.expect("the control: a good token is served");
}

/// An answer is believed for a short time, for the one token that it was about.
#[tokio::test]
async fn reviews_are_remembered_by_token() {
    let cluster = two_nodes();
    let replica = Replica::start(&cluster, settings()).await;
    let raw = Raw::new(&cluster, &replica).await;
    let token = cluster.agent_token("agent-n1");
    for _ in 0..5 {
        raw.ask(&token, WEB).await.unwrap();
    }
    assert_eq!(cluster.count("create tokenreviews"), 1);
    let mut short = agent("agent-n1");
    short.expires = SystemTime::now() + Duration::from_secs(2);
    let short = cluster.token(short);
    raw.ask(&short, WEB).await.unwrap();
    eventually("never beyond the token's end", async || raw.ask(&short, WEB).await.is_err()).await;
    assert_eq!(raw.ask(&short, WEB).await.unwrap_err().code(), Code::Unauthenticated);
    raw.ask(&token, WEB).await.expect("the other one still is");
}

/// Only the key is taken from a signing request.
#[tokio::test]
async fn names_in_the_request_are_never_signed() {
    let cluster = two_nodes();
    let replica = Replica::start(&cluster, settings()).await;
    let raw = Raw::new(&cluster, &replica).await;
    let token = cluster.agent_token("agent-n1");

    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "cache.default.svc");
    params.subject_alt_names = vec![
        SanType::URI(CACHE.try_into().unwrap()),
        SanType::DnsName("underpass-ca.mesh.svc".try_into().unwrap()),
        SanType::IpAddress("10.0.0.1".parse().unwrap()),
    ];
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let key = KeyPair::generate().unwrap();
    let csr = params.serialize_request(&key).unwrap().pem().unwrap();
    let chain = raw.send(Some(&token), request(&csr, Some(DB))).await.unwrap();

    assert_eq!(leaf(&chain).identity, identity("db"));
    let der = CertificateDer::from_pem_slice(chain[0].as_bytes()).unwrap();
    let (_, certificate) = X509Certificate::from_der(&der).unwrap();
    let names = certificate.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names.len(), 1, "one name, and it is the one that was checked");
    assert_eq!(certificate.subject().iter().count(), 0);
    assert!(!certificate.is_ca() && !certificate.key_usage().unwrap().unwrap().value.key_cert_sign());
    assert_eq!(certificate.public_key().raw, rcgen::PublicKeyData::subject_public_key_info(&key));
    let text = String::from_utf8_lossy(&der).into_owned();
    assert!(!text.contains("cache") && !text.contains("underpass-ca"), "nothing of the request's names is in it");
    // One hour was asked for.
    let left = leaf(&chain).not_after.duration_since(SystemTime::now()).unwrap();
    assert!((3500..=3600).contains(&left.as_secs()), "{left:?}");

    let mut long = request(&csr, Some(DB));
    long.validity_duration = i64::MAX;
    let left = leaf(&raw.send(Some(&token), long).await.unwrap()).not_after.duration_since(SystemTime::now()).unwrap();
    assert!(left <= Duration::from_hours(24) && left > Duration::from_hours(23), "{left:?}");
}

#[tokio::test]
async fn garbage_is_refused() {
    let cluster = two_nodes();
    let replica = Replica::start(&cluster, settings()).await;
    let raw = Raw::new(&cluster, &replica).await;
    let token = cluster.agent_token("agent-n1");
    let good = csr(DB);
    // Signed with another key: the last byte of the signature is another.
    let mut forged = pem::parse(&good).unwrap().contents().to_vec();
    *forged.last_mut().unwrap() ^= 1;
    let encode = |tag: &str, bytes: &[u8]| pem::encode(&pem::Pem::new(tag, bytes));
    let mut trailing = pem::parse(&good).unwrap().contents().to_vec();
    trailing.push(0);
    let ed25519 = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let ed25519 = CertificateParams::default().serialize_request(&ed25519).unwrap().pem().unwrap();
    for (name, csr, said) in [
        ("empty", String::new(), "not PEM"),
        ("text", "hello".into(), "not PEM"),
        ("ends that differ", format!("-----BEGIN {}-----\nAAAA\n-----END B-----\n", "A".repeat(2000)), "not PEM"),
        ("a certificate", encode("CERTIFICATE", b"x"), "not a CERTIFICATE REQUEST"),
        ("junk", encode("CERTIFICATE REQUEST", b"junk"), "not PKCS #10"),
        ("forged", encode("CERTIFICATE REQUEST", &forged), "not signed with its own key"),
        ("trailing", encode("CERTIFICATE REQUEST", &trailing), "bytes behind"),
        ("another kind of key", ed25519, "not ECDSA"),
        ("large", format!("{}{good}", "x".repeat(8 * 1024)), "more than 8192"),
    ] {
        let refused = raw.send(Some(&token), request(&csr, Some(DB))).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{name}: {refused}");
        assert!(refused.message().contains(said), "{name}: {refused}");
    }
    let mut odd = request(&good, None);
    let value = [("ImpersonatedIdentity".to_owned(), Value { string_value: None })];
    odd.metadata = Some(Metadata { fields: value.into() });
    let refused = raw.send(Some(&token), odd).await.unwrap_err();
    assert!(refused.message().contains("must be a string"), "{refused}");
    let refused = raw.send(Some(&token), request(&"x".repeat(100_000), Some(DB))).await.unwrap_err();
    assert!(matches!(refused.code(), Code::OutOfRange | Code::ResourceExhausted), "{refused:?}");
    raw.send(Some(&token), request(&good, Some(DB))).await.expect("the control");
}

#[tokio::test]
async fn a_flood_from_one_node_is_not_another_nodes_trouble() {
    let cluster = two_nodes();
    let mut settings = settings();
    settings.rates.per_node = NonZeroU32::MIN;
    let replica = Replica::start(&cluster, settings).await;
    let raw = Raw::new(&cluster, &replica).await;
    let (one, two) = (cluster.agent_token("agent-n1"), cluster.agent_token("agent-n2"));
    let (mut served, mut refused) = (0, 0);
    for _ in 0..60 {
        match raw.ask(&one, WEB).await {
            Ok(_) => served += 1,
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                assert!(status.message().contains("node n1"), "{status}");
                refused += 1;
            }
        }
    }
    // Twenty at once, and one per second.
    assert!((20..=50).contains(&served) && refused >= 10, "{served} served, {refused} refused");
    raw.ask(&two, WEB).await.expect("the other node is served");
}

#[tokio::test]
async fn a_flood_without_tokens_does_not_reach_the_api_server() {
    let lines = Lines::default();
    let _recording = lines.record();
    let cluster = two_nodes();
    let mut settings = settings();
    settings.rates.per_address = NonZeroU32::new(2).unwrap();
    let replica = Replica::start(&cluster, settings).await;
    let raw = Raw::new(&cluster, &replica).await;
    let mut limited = 0;
    for n in 0..200 {
        let status = raw.ask(&format!("e30.{n}.sig"), WEB).await.unwrap_err();
        limited += usize::from(status.code() == Code::ResourceExhausted && status.message().contains("this address"));
    }
    assert!(limited >= 100, "{limited}");
    let reviews = cluster.count("create tokenreviews");
    assert!((40..=100).contains(&reviews), "{reviews} reviews: a burst of 40, and two per second");
    // Most have no line of their own, so that they do not push others out of the log's queue.
    let (lines, metrics) = (lines.with("refused").len(), replica.get("/metrics").await.1);
    assert!(lines < 150, "{lines} lines");
    assert!(metrics.contains("underpass_ca_refusals_not_logged_total "), "{metrics}");
    assert!(!metrics.contains("underpass_ca_refusals_not_logged_total 0\n"), "{metrics}");
}

/// More connections than there may be, of which some have got as far as HTTP/2, and nobody asks for
/// anything.
#[tokio::test]
async fn connections_without_a_token_do_not_keep_agents_out() {
    let cluster = two_nodes();
    let mut settings = settings();
    settings.rates.connections = 32;
    let replica = Replica::start(&cluster, settings).await;
    let known = Raw::new(&cluster, &replica).await;
    let (one, two) = (cluster.agent_token("agent-n1"), cluster.agent_token("agent-n2"));
    known.ask(&one, WEB).await.expect("the control");

    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(TcpStream::connect(replica.address).await.unwrap());
    }
    let pem = std::fs::read(Files::new(&cluster, "none").await.root_file()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut config = config.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tls = tokio_rustls::TlsConnector::from(Arc::new(config));
    let mut idle = Vec::new();
    for _ in 0..40 {
        let stream = TcpStream::connect(replica.address).await.unwrap();
        idle.push(tls.connect("underpass-ca.mesh.svc".try_into().unwrap(), stream).await.unwrap());
    }

    let began = Instant::now();
    Raw::new(&cluster, &replica).await.ask(&two, CACHE).await.expect("a new agent is served");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    let connections = async || {
        let metrics = replica.get("/metrics").await.1;
        let line = metrics.lines().find_map(|line| line.strip_prefix("underpass_ca_connections_total "));
        line.unwrap().parse::<u64>().unwrap()
    };
    let before = connections().await;
    known.ask(&one, WEB).await.expect("and the one that was there");
    assert_eq!(connections().await, before, "on the connection that it had");
    drop((silent, idle));
}

#[tokio::test]
async fn requests_at_once_are_bounded() {
    let cluster = two_nodes();
    let mut settings = settings();
    settings.rates.in_flight = 1;
    let replica = Replica::start(&cluster, settings).await;
    let raw = Raw::new(&cluster, &replica).await;
    let token = cluster.agent_token("agent-n1");
    let all = futures_util::future::join_all((0..30).map(|_| raw.ask(&token, WEB))).await;
    let busy = all.iter().filter(|r| r.as_ref().is_err_and(|s| s.message().contains("at once"))).count();
    assert!(busy > 0 && busy < 30, "{busy} of 30");
    raw.ask(&token, WEB).await.expect("later there is room again");
}

/// A pod that the watch has not told of yet.
#[tokio::test]
async fn unknown_pods_are_asked_for() {
    let cluster = two_nodes();
    cluster.deny("watch", "pods", true);
    let replica = Replica::start(&cluster, settings()).await;
    let raw = Raw::new(&cluster, &replica).await;
    let token = cluster.agent_token("agent-n1");
    eventually("the first list", async || replica.get("/metrics").await.1.contains("underpass_ca_pods 6\n")).await;
    cluster.add_pod(&pod("default", "late", "late", "n1"));
    let late = "spiffe://td.test/ns/default/sa/late";
    assert_eq!(raw.ask(&token, late).await.unwrap().identity, identity("late"));

    // Who asks for pods that are not there is slowed down, and the API server with it.
    let mut limited = 0;
    for n in 0..40 {
        let status = raw.ask(&token, &format!("spiffe://td.test/ns/default/sa/none-{n}")).await.unwrap_err();
        limited += usize::from(status.code() == Code::ResourceExhausted);
    }
    assert!(limited > 10, "{limited}");

    // A pod that went while the watch is broken is not signed for.
    cluster.delete("pods", "default", "db");
    eventually("gone", async || raw.ask(&token, DB).await.is_err_and(|s| s.code() == Code::PermissionDenied)).await;
}

#[tokio::test]
async fn without_the_api_server_nobody_new_is_served() {
    let cluster = two_nodes();
    let replica = Replica::start(&cluster, settings()).await;
    let raw = Raw::new(&cluster, &replica).await;
    let (one, two) = (cluster.agent_token("agent-n1"), cluster.agent_token("agent-n2"));
    raw.ask(&one, WEB).await.unwrap();
    cluster.set_down(true);
    let refused = raw.ask(&two, WEB).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert_eq!(replica.get("/healthz/ready").await.0, 200, "it can sign");
    cluster.set_down(false);
    raw.ask(&two, WEB).await.expect("served again");
}

/// Every verb that is used is one that the Role has, and a Role without it is told of.
#[tokio::test]
async fn what_is_asked_of_the_api_server_is_little() {
    let cluster = two_nodes();
    cluster.put_secret("underpass-ca", &[]);
    let replica = Replica::start(&cluster, settings()).await;
    let raw = Raw::new(&cluster, &replica).await;
    raw.ask(&cluster.agent_token("agent-n1"), DB).await.unwrap();
    let asked: std::collections::BTreeSet<String> = cluster.lock().asked.iter().cloned().collect();
    let allowed = [
        "create tokenreviews",
        "get pods",
        "list pods",
        "watch pods",
        "get secrets",
        "list secrets",
        "watch secrets",
        "update secrets",
        "get configmaps",
        "create configmaps",
    ];
    for verb in &asked {
        assert!(allowed.contains(&verb.as_str()), "{verb} in {asked:?}");
    }
}
