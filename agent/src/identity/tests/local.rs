use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    time::{Duration, SystemTime},
};

use rustls::{RootCertStore, crypto::aws_lc_rs, pki_types::UnixTime, server::WebPkiClientVerifier};
use tokio::time::timeout;
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{LIMIT, domain, identity};
use crate::identity::{Issuer, LocalIssuer, Svid};

const HOUR: Duration = Duration::from_hours(1);

fn open(directory: &Path) -> LocalIssuer {
    LocalIssuer::open(directory, &domain(), HOUR).unwrap_or_else(|e| panic!("{e}"))
}

async fn issue(issuer: &LocalIssuer, name: &str) -> Svid {
    issuer.issue(&identity(name)).await.unwrap_or_else(|e| panic!("{e}"))
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Does `svid`'s chain end at one of `roots`?
fn verifies(svid: &Svid, roots: &RootCertStore) -> bool {
    WebPkiClientVerifier::builder_with_provider(roots.clone().into(), aws_lc_rs::default_provider().into())
        .build()
        .unwrap()
        .verify_client_cert(&svid.certified.cert[0], &[], UnixTime::now())
        .is_ok()
}

#[tokio::test]
async fn creates_a_ca_and_signs() {
    let directory = tempfile::tempdir().unwrap();
    let ca = directory.path().join("deep/ca");
    let issuer = open(&ca);
    assert_eq!((mode(&ca), mode(&ca.join("ca.key")), mode(&ca.join("ca.crt"))), (0o700, 0o600, 0o644));

    let before = SystemTime::now();
    let svid = issue(&issuer, "web").await;
    assert_eq!(svid.identity, identity("web"));
    assert!(verifies(&svid, &svid.roots));
    assert!(svid.valid_at(SystemTime::now()));
    let lifetime = svid.not_after.duration_since(before).unwrap();
    assert!((3598..=3605).contains(&lifetime.as_secs()), "{lifetime:?}");
    let backdated = before.duration_since(svid.not_before).unwrap();
    assert!((58..=61).contains(&backdated.as_secs()), "{backdated:?}");

    let (_, leaf) = X509Certificate::from_der(&svid.certified.cert[0]).unwrap();
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && usage.server_auth);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names.len(), 1);
    assert_eq!(leaf.public_key().parsed().unwrap().key_size(), 256);
    assert!(leaf.serial.bits() > 64 && leaf.serial.bits() < 128);

    let again = issue(&issuer, "web").await;
    assert_ne!(again.serial, svid.serial);
    assert_eq!(again.roots_id, svid.roots_id);
    assert_ne!(again.certified.key.public_key(), svid.certified.key.public_key());
}

#[tokio::test]
async fn openssl_accepts_the_certificates() {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let issuer = open(directory.path());
    let svid = issue(&issuer, "web").await;
    fs::write(directory.path().join("leaf.der"), &svid.certified.cert[0]).unwrap();
    let output = std::process::Command::new("openssl")
        .args(["verify", "-x509_strict", "-CAfile", "ca.crt", "-purpose", "sslserver", "leaf.der"])
        .current_dir(directory.path())
        .output()
        .expect("the openssl program is needed for this test");
    assert!(output.status.success(), "{output:?}");
}

#[tokio::test]
async fn a_second_agent_shares_it() {
    let directory = tempfile::tempdir().unwrap();
    let ca = directory.path().join("ca");
    let opened: Vec<_> = (0..8)
        .map(|_| {
            let ca = ca.clone();
            std::thread::spawn(move || open(&ca))
        })
        .collect();
    let mut roots = BTreeSet::new();
    for thread in opened {
        roots.insert(issue(&thread.join().unwrap(), "web").await.roots_id);
    }
    assert_eq!(roots.len(), 1, "all agree on one root");
    assert!(!fs::read_dir(&ca).unwrap().any(|e| e.unwrap().file_name().to_string_lossy().ends_with(".new")));
}

#[tokio::test]
async fn other_trust_domains_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let issuer = open(&directory.path().join("ca"));
    let foreign = "spiffe://other.test/ns/default/sa/web".parse().unwrap();
    let error = issuer.issue(&foreign).await.err().unwrap().to_string();
    assert!(error.contains("td.test only"), "{error}");
}

#[test]
fn broken_directories_are_explained() {
    fn open_error(directory: &Path) -> String {
        LocalIssuer::open(directory, &domain(), HOUR).err().expect("is refused").to_string()
    }
    type Damage = fn(&Path);
    let cases: &[(&str, Damage, &[&str])] = &[
        ("no key", |d| fs::remove_file(d.join("ca.key")).unwrap(), &["ca.key", "missing", "restore"]),
        ("no roots", |d| fs::remove_file(d.join("ca.crt")).unwrap(), &["ca.crt", "missing", "restore"]),
        ("empty roots", |d| fs::write(d.join("ca.crt"), "").unwrap(), &["ca.crt", "restore"]),
        (
            "roots not PEM",
            |d| fs::write(d.join("ca.crt"), "-----BEGIN CERTIFICATE-----\n!").unwrap(),
            &["ca.crt", "restore"],
        ),
        (
            "roots not certificates",
            |d| fs::write(d.join("ca.crt"), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap(),
            &["ca.crt", "not a certificate", "restore"],
        ),
        ("key cut", |d| fs::write(d.join("ca.key"), "-----BEGIN PRIVATE KEY-----\n").unwrap(), &["ca.key", "restore"]),
        (
            "key of another CA",
            |d| {
                let other = tempfile::tempdir().unwrap();
                open(&other.path().join("ca"));
                fs::copy(other.path().join("ca/ca.key"), d.join("ca.key")).unwrap();
            },
            &["ca.key", "none of the roots", "restore"],
        ),
        (
            "key readable by others",
            |d| fs::set_permissions(d.join("ca.key"), fs::Permissions::from_mode(0o640)).unwrap(),
            &["ca.key", "chmod 600"],
        ),
        (
            "directory writable by others",
            |d| fs::set_permissions(d, fs::Permissions::from_mode(0o777)).unwrap(),
            &["chmod 700"],
        ),
    ];
    for (name, damage, expected) in cases {
        let directory = tempfile::tempdir().unwrap();
        let ca = directory.path().join("ca");
        open(&ca);
        damage(&ca);
        let error = open_error(&ca);
        for part in *expected {
            assert!(error.contains(part), "{name}: {error}");
        }
    }
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "").unwrap();
    assert!(open_error(&directory.path().join("file/ca")).contains("file/ca"));
}

#[tokio::test]
async fn a_new_root_is_distributed_then_signs_then_is_alone() {
    let directory = tempfile::tempdir().unwrap();
    let ca = directory.path().join("ca");
    let lifetime = Duration::from_secs(2);
    let one = LocalIssuer::open(&ca, &domain(), lifetime).unwrap();
    let other = LocalIssuer::open(&ca, &domain(), lifetime).unwrap();
    let first = issue(&one, "web").await;
    assert_eq!(first.roots.len(), 1);

    one.rotate().unwrap();
    let rotated = SystemTime::now();
    timeout(LIMIT, other.changed()).await.expect("the other agent is told");
    timeout(LIMIT, one.changed()).await.expect("and so is this one");
    other.rotate().unwrap();
    let during = issue(&other, "web").await;
    assert_eq!(during.roots.len(), 2, "a second rotation does not start before the first is over");
    assert_ne!(during.roots_id, first.roots_id);
    assert!(verifies(&during, &first.roots), "still signed by the old root");

    // Polls, because time itself is what is waited for.
    let (mut new, mut alone) = (None, None);
    while alone.is_none() {
        assert!(rotated.elapsed().unwrap() < LIMIT);
        let svid = issue(&one, "web").await;
        assert!(verifies(&svid, &svid.roots));
        if new.is_none() && !verifies(&svid, &first.roots) {
            assert!(rotated.elapsed().unwrap() + Duration::from_secs(1) >= lifetime, "not before the overlap is over");
            assert_eq!(svid.roots.len(), 2, "the old root is still trusted");
            assert!(verifies(&svid, &during.roots));
            new = Some(svid.clone());
        }
        if svid.roots.len() == 1 {
            alone = Some(svid);
        } else {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    assert!(verifies(&alone.unwrap(), &new.expect("the new root signed before").roots));
    assert!(!ca.join("next.key").exists());
    assert_eq!(mode(&ca.join("ca.key")), 0o600);
}

#[tokio::test]
async fn an_unfinished_rotation_is_undone() {
    let directory = tempfile::tempdir().unwrap();
    let ca = directory.path().join("ca");
    let issuer = open(&ca);
    let before = issue(&issuer, "web").await;
    // A crash after the first of the two steps.
    let roots = fs::read(ca.join("ca.crt")).unwrap();
    issuer.rotate().unwrap();
    fs::write(ca.join("ca.crt"), roots).unwrap();
    let after = issue(&issuer, "web").await;
    assert_eq!(after.roots_id, before.roots_id);
    assert!(!ca.join("next.key").exists());
    issuer.rotate().unwrap();
    assert_eq!(issue(&issuer, "web").await.roots.len(), 2, "the next one works");
}

/// For people: everything but the key.
#[tokio::test]
async fn a_certificate_describes_itself() {
    let directory = tempfile::tempdir().unwrap();
    let svid = issue(&open(directory.path()), "web").await;
    let described = svid.describe();
    let (_, leaf) = X509Certificate::from_der(&svid.certified.cert[0]).unwrap();
    assert_eq!(described.issuer, leaf.issuer().to_string());
    assert!(!described.issuer.is_empty() && described.key.starts_with("ECDSA "), "{described:?}");
    assert_eq!((&described.serial, described.not_after), (&svid.serial, svid.not_after));
    assert_eq!((described.chain, described.roots.len()), (svid.certified.cert.len(), 1));
    assert_eq!(described.roots[0], described.issuer, "signed by the root itself");
    assert!(described.roots_sha256.len() == 64 && described.roots_sha256.bytes().all(|b| b.is_ascii_hexdigit()));
}
