use std::{collections::HashMap, fs, path::PathBuf, sync::Arc, time::SystemTime};

use rcgen::{CrlDistributionPoint, CrlIssuingDistributionPoint, CrlScope};
use tokio::time::{Duration, timeout};

use super::{Chain, Revocations, parse, sequence};
use crate::{
    identity::Svid,
    mesh::SpiffeId,
    tunnel::testing::{TestCa, identity},
};

struct Scene {
    directory: tempfile::TempDir,
    ca: TestCa,
    mine: Arc<Svid>,
    peer: Arc<Svid>,
    other: Arc<Svid>,
}

impl Scene {
    fn new() -> Self {
        let ca = TestCa::new("root");
        let [mine, peer, other] = ["mine", "peer", "other"].map(|name| ca.svid(&identity(name)));
        Self { directory: tempfile::tempdir().unwrap(), ca, mine, peer, other }
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("crl.pem")
    }

    fn write(&self, text: impl AsRef<[u8]>) {
        // As a whole, as everybody does who replaces a file that somebody watches.
        let new = self.directory.path().join(".new");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.file()).unwrap();
    }

    fn certificates(&self) -> HashMap<SpiffeId, Arc<Svid>> {
        [(self.mine.identity.clone(), Arc::clone(&self.mine))].into()
    }

    fn look(&self, revocations: &Revocations) -> Vec<String> {
        revocations.look(&self.file(), &self.certificates());
        revocations.status().unwrap().problems
    }
}

fn revoked(revocations: &Revocations, svid: &Svid) -> bool {
    revocations.revoke(&Chain::of(&svid.certified.cert).unwrap())
}

#[test]
fn a_list_is_in_force_from_the_start_and_replaced_by_a_newer_one() {
    let scene = Scene::new();
    assert!(!revoked(&Revocations::default(), &scene.peer), "without a file");
    scene.write(scene.ca.revoke(1, &[&scene.peer]));
    let revocations = Revocations::open(&scene.file()).unwrap();
    assert!(revoked(&revocations, &scene.peer) && !revoked(&revocations, &scene.other));
    let changes = revocations.subscribe();
    assert_eq!(scene.look(&revocations), Vec::<String>::new());
    scene.write(scene.ca.revoke(2, &[&scene.peer, &scene.other]));
    assert_eq!(scene.look(&revocations), Vec::<String>::new());
    assert!(revoked(&revocations, &scene.peer) && revoked(&revocations, &scene.other));
    assert!(changes.has_changed().unwrap());
    // An authority may take a revocation back, with a newer list.
    scene.write(scene.ca.revoke(3, &[&scene.other]));
    scene.look(&revocations);
    assert!(!revoked(&revocations, &scene.peer) && revoked(&revocations, &scene.other));
    let status = revocations.status().unwrap();
    assert_eq!((status.lists, status.revoked, status.problems), (1, 1, Vec::new()));
}

/// Whatever is in the file that is no newer list of the authority: the list before stays.
#[test]
fn nothing_but_a_newer_list_takes_its_place() {
    let forged = TestCa::new("root");
    let foreign = TestCa::new("somebody else");
    let scene = Scene::new();
    let good = scene.ca.revoke(5, &[&scene.peer]);
    let half = good[..good.len() / 2].to_owned();
    let cases: Vec<(&str, Option<Vec<u8>>, &str)> = vec![
        ("missing", None, "cannot be read"),
        ("empty", Some(Vec::new()), "no PEM block X509 CRL"),
        ("cut short", Some(half.into_bytes()), "the lists before stay in force"),
        ("garbage", Some(vec![0x30; 999]), "not a certificate revocation list"),
        ("a certificate", Some(scene.ca.0.pem().into_bytes()), "no PEM block X509 CRL"),
        ("signed by somebody of that name", Some(forged.revoke(9, &[]).into_bytes()), "is not signed by it"),
        ("of somebody else", Some(foreign.revoke(9, &[]).into_bytes()), "has no list of CN=root any more"),
        ("older", Some(scene.ca.revoke(4, &[]).into_bytes()), "is older than the one in force"),
        ("very long", Some(vec![b'x'; super::list::MAX_FILE + 1]), "at most"),
    ];
    for (name, content, said) in cases {
        scene.write(&good);
        let revocations = Revocations::open(&scene.file()).unwrap();
        assert_eq!(scene.look(&revocations), Vec::<String>::new(), "{name}: the control");
        match content {
            Some(content) => scene.write(content),
            None => fs::remove_file(scene.file()).unwrap(),
        }
        let problems = scene.look(&revocations);
        assert!(problems.iter().any(|problem| problem.contains(said)), "{name}: {problems:?}");
        assert!(revoked(&revocations, &scene.peer), "{name}");
        scene.write(scene.ca.revoke(6, &[&scene.other]));
        let problems = scene.look(&revocations);
        // Nobody can tell whether the other authority's list is of no use.
        let rest = problems.iter().filter(|problem| !problem.contains("no list of CN=somebody else any more"));
        assert_eq!(rest.count(), 0, "{name}: and back: {problems:?}");
        assert!(revoked(&revocations, &scene.other), "{name}");
    }
}

/// At the start nobody knows who signed; a list that turns out to be somebody else's is dropped, and said.
#[test]
fn who_signed_is_found_out_as_soon_as_there_are_roots() {
    let scene = Scene::new();
    scene.write(TestCa::new("root").revoke(1, &[&scene.peer]));
    let revocations = Revocations::open(&scene.file()).unwrap();
    assert!(revoked(&revocations, &scene.peer), "rather too many than too few");
    let problems = scene.look(&revocations);
    assert!(problems.iter().any(|problem| problem.contains("is not signed by it, and is dropped")), "{problems:?}");
    assert!(!revoked(&revocations, &scene.peer));
}

/// Roots that follow each other have one name, and a list each.
#[test]
fn authorities_of_one_name_have_a_list_each() {
    let (scene, next) = (Scene::new(), TestCa::new("root"));
    let new = next.svid(&identity("new"));
    let mut certificates = scene.certificates();
    certificates.insert(new.identity.clone(), Arc::clone(&new));
    scene.write(scene.ca.revoke(7, &[&scene.peer]) + &next.revoke(1, &[&new]));
    let revocations = Revocations::open(&scene.file()).unwrap();
    revocations.look(&scene.file(), &certificates);
    assert!(revoked(&revocations, &scene.peer) && revoked(&revocations, &new));
    scene.write(next.revoke(2, &[]));
    revocations.look(&scene.file(), &certificates);
    assert!(revoked(&revocations, &scene.peer) && !revoked(&revocations, &new));
}

#[test]
fn our_own_certificate_and_an_old_list_are_told_of() {
    let scene = Scene::new();
    scene.write(scene.ca.revoke(1, &[&scene.mine]));
    let revocations = Revocations::open(&scene.file()).unwrap();
    let problems = scene.look(&revocations);
    assert!(problems[0].contains("sa/mine on this node is revoked"), "{problems:?}");
    scene.write(scene.ca.crl(2, &[&scene.peer], |params| {
        params.this_update = time::OffsetDateTime::now_utc() - time::Duration::days(3);
        params.next_update = time::OffsetDateTime::now_utc() - time::Duration::days(1);
    }));
    let problems = scene.look(&revocations);
    assert!(problems[0].contains("should have been replaced by now"), "{problems:?}");
    assert!(revoked(&revocations, &scene.peer), "and stays in force");
}

#[test]
fn lists_that_say_less_than_they_seem_to_are_refused() {
    let scene = Scene::new();
    let part = scene.ca.crl(1, &[&scene.peer], |params| {
        params.issuing_distribution_point = Some(CrlIssuingDistributionPoint {
            distribution_point: CrlDistributionPoint { uris: vec!["http://crl.test/1".into()] },
            scope: Some(CrlScope::CaCertsOnly),
        });
    });
    let refused = parse(part.as_bytes()).err().expect("a part");
    assert!(refused.contains("list 1") && refused.contains("a part of the certificates"), "{refused}");
    let many = scene.ca.revoke(1, &[]).repeat(65);
    assert!(parse(many.as_bytes()).err().expect("too many").contains("more than 64"));
    let good = scene.ca.revoke(1, &[&scene.peer]);
    let der = pem::parse(&good).unwrap().into_contents();
    assert_eq!(parse(&der).unwrap()[0].serials.len(), 1, "DER");
    for end in 0..der.len() {
        assert!(parse(&der[..end]).is_err(), "{end} bytes of {}", der.len());
    }
    assert!(Revocations::open(&scene.file()).unwrap_err().contains("crlFile"), "no file");
    scene.write("x");
    assert!(Revocations::open(&scene.file()).unwrap_err().contains("take crlFile (CRL_PATH) out"));
}

/// From the file's replacement to the list in force.
#[tokio::test]
async fn a_new_file_is_in_force_within_a_second() {
    let scene = Scene::new();
    scene.write(scene.ca.revoke(1, &[]));
    let revocations = Arc::new(Revocations::open(&scene.file()).unwrap());
    let issuer = Arc::new(crate::identity::FilesIssuer::new(std::collections::BTreeMap::new()).unwrap());
    let store = crate::identity::CertificateStore::new(issuer);
    let follow = tokio::spawn(Arc::clone(&revocations).follow(store));
    let mut changes = revocations.subscribe();
    for number in 2..5 {
        // The watch begins some time after the task.
        let before = SystemTime::now();
        let list = if number % 2 == 0 { vec![&*scene.peer] } else { vec![] };
        scene.write(scene.ca.revoke(number, &list));
        timeout(Duration::from_secs(30), changes.changed()).await.expect("it is seen").unwrap();
        assert_eq!(revoked(&revocations, &scene.peer), number % 2 == 0);
        let took = before.elapsed().unwrap();
        assert!(number == 2 || took < Duration::from_secs(1), "{took:?}");
    }
    follow.abort();
}

#[test]
fn lengths_are_those_of_der() {
    for (length, head) in
        [(0, &[0x30, 0][..]), (127, &[0x30, 127]), (128, &[0x30, 0x81, 128]), (700, &[0x30, 0x82, 2, 188])]
    {
        let all = sequence(&vec![7; length]);
        assert_eq!((&all[..head.len()], all.len()), (head, head.len() + length));
    }
}
