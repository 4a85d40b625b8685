//! A key that somebody else keeps, as cert-manager does.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};

use super::{Files, Lines, Replica, eventually, identity, roots, settings, two_nodes};
use crate::{
    ca::{RootSource, Settings},
    identity::{Issuer as _, Svid},
};

type Authority = CertifiedIssuer<'static, KeyPair>;

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    params
}

fn root(name: &str) -> Authority {
    CertifiedIssuer::self_signed(params(name), KeyPair::generate().unwrap()).unwrap()
}

fn intermediate(name: &str, root: &Authority) -> Authority {
    CertifiedIssuer::signed_by(params(name), KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap(), root)
        .unwrap()
}

/// `tls.crt`, `tls.key` and `ca.crt`.
fn parts(signer: &Authority, root: &Authority) -> [(&'static str, String); 3] {
    [("tls.crt", signer.pem()), ("tls.key", signer.key().serialize_pem()), ("ca.crt", root.pem())]
}

fn put(cluster: &super::Cluster, parts: &[(&'static str, String); 3]) {
    let parts: Vec<_> = parts.iter().map(|(name, value)| (*name, value.as_str())).collect();
    cluster.put_secret("issuer", &parts);
}

fn with(root: RootSource) -> Settings {
    Settings { root, ..settings() }
}

fn secret() -> RootSource {
    RootSource::Foreign { secret: "issuer".into() }
}

async fn ask(files: &Files, replica: &Replica) -> Svid {
    files.issuer(replica.address).issue(&identity("web")).await.unwrap_or_else(|e| panic!("{e}"))
}

#[tokio::test]
async fn an_intermediate_signs_and_may_be_replaced_at_any_time() {
    let cluster = two_nodes();
    let corporate = root("corporate");
    put(&cluster, &parts(&intermediate("one", &corporate), &corporate));
    let replica = Replica::start(&cluster, with(secret())).await;
    replica.ready().await;
    let files = Files::new(&cluster, &cluster.agent_token("agent-n1")).await;
    assert_eq!(
        roots(&cluster).unwrap().replace('\r', ""),
        corporate.pem().replace('\r', ""),
        "only the root is trusted"
    );
    let first = ask(&files, &replica).await;
    assert_eq!((first.certified.cert.len(), first.roots.len()), (2, 1), "the intermediate is sent along");
    assert!(first.describe().issuer.contains("one"));

    put(&cluster, &parts(&intermediate("two", &corporate), &corporate));
    eventually("the next one signs", async || ask(&files, &replica).await.describe().issuer.contains("two")).await;
    assert_eq!(ask(&files, &replica).await.roots_id, first.roots_id);
    let asked = cluster.lock().asked.clone();
    assert!(
        !asked.iter().any(|a| a == "update secrets" || a == "create secrets"),
        "somebody else's Secret is only read"
    );
}

#[tokio::test]
async fn another_root_is_distributed_before_it_signs() {
    let cluster = two_nodes();
    let (old, new) = (root("old"), root("new"));
    put(&cluster, &parts(&old, &old));
    let mut settings = with(secret());
    settings.lifetime = Duration::from_secs(6);
    let replica = Replica::start(&cluster, settings).await;
    replica.ready().await;
    let files = Files::new(&cluster, &cluster.agent_token("agent-n1")).await;
    let first = ask(&files, &replica).await;
    assert_eq!((first.certified.cert.len(), first.roots.len()), (1, 1));

    put(&cluster, &parts(&new, &new));
    let replaced = SystemTime::now();
    eventually("both are published", async || roots(&cluster).unwrap().matches("BEGIN").count() == 2).await;
    std::fs::write(files.root_file(), roots(&cluster).unwrap()).unwrap();
    let during = ask(&files, &replica).await;
    assert_eq!(during.roots.len(), 2);
    let accepted =
        |svid: &Svid| Svid { roots: Arc::clone(&first.roots), ..svid.clone() }.verify(SystemTime::now()).is_ok();
    assert!(accepted(&during), "peers that know only the old one accept it");
    eventually("the new one signs", async || !accepted(&ask(&files, &replica).await)).await;
    assert!(replaced.elapsed().unwrap() >= Duration::from_secs(5));
    eventually("the old one is gone", async || roots(&cluster).unwrap().matches("BEGIN").count() == 1).await;
    assert!(replaced.elapsed().unwrap() >= Duration::from_secs(17));
}

#[tokio::test]
async fn files_do_as_well() {
    let cluster = two_nodes();
    let corporate = root("corporate");
    let directory = tempfile::tempdir().unwrap();
    let write = |signer: &Authority| {
        for (name, value) in parts(signer, &corporate) {
            std::fs::write(directory.path().join(name), value).unwrap();
        }
    };
    let replica = Replica::start(&cluster, with(RootSource::Directory { path: directory.path().to_owned() })).await;
    assert_eq!(replica.get("/healthz/ready").await.0, 503, "the files come later");
    write(&intermediate("one", &corporate));
    replica.ready().await;
    let files = Files::new(&cluster, &cluster.agent_token("agent-n1")).await;
    assert!(ask(&files, &replica).await.describe().issuer.contains("one"));
    write(&intermediate("two", &corporate));
    eventually("the next one signs", async || ask(&files, &replica).await.describe().issuer.contains("two")).await;
}

#[tokio::test]
async fn keys_in_every_usual_form() {
    for (algorithm, name) in [(&rcgen::PKCS_RSA_SHA256, "RSA"), (&rcgen::PKCS_ECDSA_P256_SHA256, "P-256")] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let authority = CertifiedIssuer::self_signed(params(name), key).unwrap();
        let cluster = two_nodes();
        put(&cluster, &parts(&authority, &authority));
        let replica = Replica::start(&cluster, with(secret())).await;
        replica.ready().await;
        let files = Files::new(&cluster, &cluster.agent_token("agent-n1")).await;
        assert!(ask(&files, &replica).await.describe().issuer.contains(name));
    }
}

#[tokio::test]
async fn what_cannot_sign_is_explained() {
    let lines = Lines::default();
    let _recording = lines.record();
    let cluster = two_nodes();
    let replica = Replica::start(&cluster, with(secret())).await;
    let warned = async |what: &str| eventually(what, async || !lines.with(what).is_empty()).await;
    warned("Secret mesh/issuer: it is missing").await;
    let (good, other) = (root("good"), root("other"));
    let mut leaf = params("leaf");
    leaf.is_ca = IsCa::NoCa;
    let leaf = CertifiedIssuer::signed_by(leaf, KeyPair::generate().unwrap(), &good).unwrap();
    let mut short = params("no more below");
    short.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let short = CertifiedIssuer::signed_by(short, KeyPair::generate().unwrap(), &good).unwrap();
    let mut too_long = parts(&intermediate("below", &short), &good);
    too_long[0].1.push_str(&short.pem());
    let [crt, key, ca] = parts(&good, &good);
    for (parts, expected) in [
        ([crt.clone(), key.clone(), ("ca.crt", String::new())], "ca.crt is missing"),
        ([crt.clone(), ("tls.key", other.key().serialize_pem()), ca.clone()], "tls.key: it is not the key of tls.crt"),
        ([crt.clone(), ("tls.key", "x".into()), ca.clone()], "tls.key: "),
        ([("tls.crt", "x".into()), key.clone(), ca.clone()], "tls.crt: 0 certificates"),
        ([crt, key, ("ca.crt", other.pem())], "not accepted with the roots in ca.crt"),
        (parts(&leaf, &good), "tls.crt: it is no CA certificate; with cert-manager, set isCA: true"),
        (too_long, "not accepted with the roots"),
    ] {
        let before = lines.with(expected).len();
        put(&cluster, &parts);
        eventually(expected, async || lines.with(expected).len() > before).await;
        assert_eq!(replica.get("/healthz/ready").await.0, 503);
    }
    put(&cluster, &parts(&good, &good));
    replica.ready().await;
    assert!(lines.with("PRIVATE").is_empty(), "no key in the log");
}
