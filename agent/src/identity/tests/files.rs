use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use rcgen::{CertificateParams, KeyPair};
use time::OffsetDateTime;
use tokio::time::timeout;

use super::{LIMIT, identity};
use crate::{
    identity::{FilesIssuer, IssueError, Issuer, Svid},
    mesh::{CertificateFiles, SpiffeId},
    tunnel::testing::TestCa,
};

type Damage = fn(&CertificateFiles);

fn leaf(name: &str) -> CertificateParams {
    TestCa::leaf(&identity(name).to_string())
}

fn write(directory: &Path, ca: &TestCa, params: &CertificateParams) -> CertificateFiles {
    let (certificate, key) = ca.sign(params);
    let files = CertificateFiles {
        certificate: directory.join("tls.crt"),
        key: directory.join("tls.key"),
        roots: directory.join("ca.crt"),
    };
    fs::write(&files.certificate, certificate.pem()).unwrap();
    fs::write(&files.key, key.serialize_pem()).unwrap();
    fs::write(&files.roots, ca.0.pem()).unwrap();
    files
}

fn issuer(name: &str, files: CertificateFiles) -> FilesIssuer {
    FilesIssuer::new(BTreeMap::from([(identity(name), files)])).unwrap()
}

async fn issue(issuer: &FilesIssuer, name: &str) -> Result<Svid, IssueError> {
    issuer.issue(&identity(name)).await
}

#[tokio::test]
async fn reads_and_reads_again_after_a_change() {
    let directory = tempfile::tempdir().unwrap();
    let ca = TestCa::new("root");
    let issuer = issuer("web", write(directory.path(), &ca, &leaf("web")));
    let first = issue(&issuer, "web").await.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(first.identity, identity("web"));
    assert_eq!(first.roots.len(), 1);

    let mut changed = issuer.changed();
    let quiet = timeout(Duration::from_millis(500), &mut changed).await;
    assert!(quiet.is_err(), "reading is no change");
    write(directory.path(), &ca, &leaf("web"));
    timeout(LIMIT, changed).await.expect("the change is noticed");
    assert_ne!(issue(&issuer, "web").await.unwrap().serial, first.serial);
}

#[tokio::test]
async fn kubernetes_swaps_a_symbolic_link() {
    let directory = tempfile::tempdir().unwrap();
    let volume = directory.path();
    let ca = TestCa::new("root");
    let version = |n: &str| {
        let data = volume.join(n);
        fs::create_dir(&data).unwrap();
        write(&data, &ca, &leaf("web"));
    };
    version("..1");
    symlink("..1", volume.join("..data")).unwrap();
    for file in ["tls.crt", "tls.key", "ca.crt"] {
        symlink(PathBuf::from("..data").join(file), volume.join(file)).unwrap();
    }
    let in_volume = CertificateFiles {
        certificate: volume.join("tls.crt"),
        key: volume.join("tls.key"),
        roots: volume.join("ca.crt"),
    };
    let issuer = issuer("web", in_volume);
    let first = issue(&issuer, "web").await.unwrap_or_else(|e| panic!("{e}"));

    let changed = issuer.changed();
    version("..2");
    symlink("..2", volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    timeout(LIMIT, changed).await.expect("the swap is noticed");
    assert_ne!(issue(&issuer, "web").await.unwrap().serial, first.serial);
}

#[tokio::test]
async fn other_files_are_told() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ca = TestCa::new("root");
    let issuer = issuer("web", write(a.path(), &ca, &leaf("web")));
    let error = issue(&issuer, "db").await.err().unwrap().to_string();
    assert!(error.contains("`files`"), "{error}");

    let files: BTreeMap<SpiffeId, _> = BTreeMap::from([(identity("db"), write(b.path(), &ca, &leaf("db")))]);
    issuer.set(files.clone());
    timeout(LIMIT, issuer.changed()).await.expect("a new set is a change");
    assert_eq!(issue(&issuer, "db").await.unwrap_or_else(|e| panic!("{e}")).identity, identity("db"));
    assert!(issue(&issuer, "web").await.is_err());
    issuer.set(files);
    assert!(timeout(Duration::from_millis(300), issuer.changed()).await.is_err(), "the same set is none");
    write(b.path(), &ca, &leaf("db"));
    timeout(LIMIT, issuer.changed()).await.expect("the new directory is watched");
}

#[tokio::test]
async fn a_directory_may_come_later() {
    let directory = tempfile::tempdir().unwrap();
    let late = directory.path().join("late");
    let files =
        CertificateFiles { certificate: late.join("tls.crt"), key: late.join("tls.key"), roots: late.join("ca.crt") };
    let issuer = issuer("web", files);
    let error = issue(&issuer, "web").await.err().unwrap().to_string();
    assert!(error.contains("late/tls.crt") && error.contains("create"), "{error}");
    fs::create_dir(&late).unwrap();
    write(&late, &TestCa::new("root"), &leaf("web"));
    timeout(LIMIT, issuer.changed()).await.expect("it is found");
    assert!(issue(&issuer, "web").await.is_ok());
}

#[tokio::test]
async fn unusable_files_are_explained() {
    let ca = TestCa::new("root");
    let mut expired = leaf("web");
    expired.not_before = OffsetDateTime::now_utc() - Duration::from_secs(100);
    expired.not_after = OffsetDateTime::now_utc() - Duration::from_secs(10);
    let mut early = leaf("web");
    early.not_before = OffsetDateTime::now_utc() + Duration::from_secs(100);

    let untouched: Damage = |_| {};
    let cases: &[(&str, CertificateParams, Damage, &[&str])] = &[
        ("somebody else's", leaf("db"), untouched, &["sa/web", "sa/db", "tls.crt"]),
        ("expired", expired, untouched, &["expired at 20", "replace", "tls.crt"]),
        ("not yet valid", early, untouched, &["not valid before 20", "clock", "tls.crt"]),
        (
            "another key",
            leaf("web"),
            |f| fs::write(&f.key, KeyPair::generate().unwrap().serialize_pem()).unwrap(),
            &["key does not fit", "tls.key"],
        ),
        ("no key", leaf("web"), |f| fs::remove_file(&f.key).unwrap(), &["reading key", "tls.key", "create"]),
        ("key not PEM", leaf("web"), |f| fs::write(&f.key, "x").unwrap(), &["reading key", "tls.key", "PEM"]),
        ("empty certificate", leaf("web"), |f| fs::write(&f.certificate, "").unwrap(), &["tls.crt", "PEM"]),
        (
            "key in place of the certificate",
            leaf("web"),
            |f| assert_ne!(fs::copy(&f.key, &f.certificate).unwrap(), 0),
            &["reading certificate", "tls.crt", "CERTIFICATE"],
        ),
        (
            "a leaf in place of the roots is taken for one, junk is not",
            leaf("web"),
            |f| fs::write(&f.roots, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap(),
            &["root 1", "ca.crt"],
        ),
        ("too large", leaf("web"), |f| fs::write(&f.roots, vec![b'\n'; 2 << 20]).unwrap(), &["ca.crt", "at most"]),
    ];
    for (name, params, damage, expected) in cases {
        let directory = tempfile::tempdir().unwrap();
        let files = write(directory.path(), &ca, params);
        damage(&files);
        let error = issue(&issuer("web", files), "web").await.err().expect(name).to_string();
        for part in *expected {
            assert!(error.contains(part), "{name}: {error}");
        }
    }
}
