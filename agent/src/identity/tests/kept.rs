use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::PathBuf,
    time::{Duration, SystemTime},
};

use rcgen::CertificateParams;
use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{identity, set};
use crate::{
    identity::{Kept, kept},
    tunnel::testing::TestCa,
};

const AUTHORITY: &[u8] = b"https://ca:15012\nroots";

struct Scene {
    directory: tempfile::TempDir,
    ca: TestCa,
    kept: Kept,
}

impl Scene {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let kept = Kept::on(directory.path().join("certificates")).unwrap();
        Self { directory, ca: TestCa::new("root"), kept }
    }

    fn keep(&self, name: &str, params: &CertificateParams) {
        let (certificate, key) = self.ca.sign(params);
        let root = CertificateDer::from(self.ca.0.der().to_vec());
        self.kept.keep(&identity(name), AUTHORITY, &[certificate.der().clone()], &[root], &key.serialize_der());
    }

    fn recall(&self, name: &str) -> Option<kept::Recalled> {
        self.kept.recall(&identity(name), AUTHORITY, SystemTime::now())
    }

    fn files(&self) -> Vec<PathBuf> {
        let mut files: Vec<_> =
            fs::read_dir(self.directory.path().join("certificates")).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        files
    }
}

fn leaf(name: &str) -> CertificateParams {
    TestCa::leaf(&identity(name).to_string())
}

/// What happens to a file.
type Damage = Box<dyn FnOnce(Vec<u8>) -> Vec<u8>>;

#[test]
fn what_was_kept_is_recalled_until_it_is_forgotten() {
    let scene = Scene::new();
    assert!(scene.recall("web").is_none());
    for name in ["web", "db"] {
        scene.keep(name, &leaf(name));
    }
    let recalled = scene.recall("web").expect("it is there");
    assert_eq!(recalled.svid.identity, identity("web"));
    assert!(recalled.current && recalled.svid.roots.len() == 1);
    recalled.svid.verify(SystemTime::now()).unwrap();
    let elsewhere = scene.kept.recall(&identity("web"), b"https://other:15012\nroots", SystemTime::now());
    assert!(!elsewhere.expect("it is used").current, "another authority is asked at once");

    let mode = |path: &PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&scene.directory.path().join("certificates")), 0o700);
    assert!(scene.files().iter().all(|file| mode(file) == 0o600));

    scene.kept.forget(&identity("web"));
    assert!(scene.recall("web").is_none() && scene.recall("db").is_some());
    scene.keep("web", &leaf("web"));
    fs::write(scene.directory.path().join("certificates/.half-written"), "x").unwrap();
    scene.kept.retain(&set(&["web"]));
    assert!(scene.recall("web").is_some() && scene.recall("db").is_none());
    assert_eq!(scene.files().len(), 1);
    kept::remove_all(scene.directory.path()).unwrap();
    kept::remove_all(scene.directory.path()).unwrap();
    assert!(!scene.directory.path().join("certificates").exists());
}

#[test]
fn what_has_ended_or_not_begun_is_not_used() {
    let now = OffsetDateTime::now_utc();
    let hour = time::Duration::HOUR;
    for (begins, ends) in [(now - hour * 2, now - hour), (now + hour, now + hour * 2)] {
        let scene = Scene::new();
        let mut params = leaf("web");
        (params.not_before, params.not_after) = (begins, ends);
        scene.keep("web", &params);
        assert!(scene.recall("web").is_none());
        assert_eq!(scene.files(), Vec::<PathBuf>::new(), "and it is removed");
    }
    // One that ends while nothing is looked at.
    let scene = Scene::new();
    scene.keep("web", &leaf("web"));
    let later = SystemTime::now() + Duration::from_hours(24 * 365 * 200);
    assert!(scene.kept.recall(&identity("web"), AUTHORITY, later).is_none());
}

#[test]
fn files_are_not_believed() {
    fn change(bytes: &[u8], change: impl FnOnce(&mut Value)) -> Vec<u8> {
        let mut value: Value = serde_json::from_slice(bytes).unwrap();
        change(&mut value);
        value.to_string().into_bytes()
    }
    let other = Scene::new();
    other.keep("web", &leaf("web"));
    let foreign: Value = serde_json::from_slice(&fs::read(&other.files()[0]).unwrap()).unwrap();
    let damages: Vec<(&str, Damage)> = vec![
        ("empty", Box::new(|_| Vec::new())),
        ("half", Box::new(|bytes| bytes[..bytes.len() / 2].to_vec())),
        ("garbage", Box::new(|_| vec![0xff; 5000])),
        ("another format", Box::new(|b| change(&b, |v| v["format"] = json!(2)))),
        ("more fields", Box::new(|b| change(&b, |v| v["x"] = json!(2)))),
        ("another identity", Box::new(|b| change(&b, |v| v["identity"] = json!(identity("db").to_string())))),
        ("no chain", Box::new(|b| change(&b, |v| v["chain"] = json!([])))),
        ("no roots", Box::new(|b| change(&b, |v| v["roots"] = json!([])))),
        ("roots that it does not lead to", {
            let roots = foreign["roots"].clone();
            Box::new(move |b| change(&b, |v| v["roots"] = roots))
        }),
        ("the key of another", {
            let key = foreign["key"].clone();
            Box::new(move |b| change(&b, |v| v["key"] = key))
        }),
        ("no key", Box::new(|b| change(&b, |v| v["key"] = json!("")))),
        ("a key that is none", Box::new(|b| change(&b, |v| v["key"] = json!("AAAA")))),
        ("a certificate that is none", Box::new(|b| change(&b, |v| v["chain"] = json!(["AAAA"])))),
        ("very many certificates", Box::new(|b| change(&b, |v| v["chain"] = json!(vec!["AAAA"; 65])))),
        ("very long", Box::new(|_| vec![b' '; 2 << 20])),
    ];
    for (name, damage) in damages {
        let scene = Scene::new();
        scene.keep("web", &leaf("web"));
        let file = scene.files().remove(0);
        let bytes = fs::read(&file).unwrap();
        assert!(kept::parse(&bytes, &identity("web"), AUTHORITY, SystemTime::now()).is_ok(), "the control");
        fs::write(&file, damage(bytes)).unwrap();
        assert!(scene.recall("web").is_none(), "{name}");
        assert_eq!(scene.files(), Vec::<PathBuf>::new(), "{name}: it is removed");
    }
}

#[test]
fn nothing_is_read_that_others_could_have_written() {
    let scene = Scene::new();
    scene.keep("web", &leaf("web"));
    let file = scene.files().remove(0);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(scene.recall("web").is_none() && !file.exists());

    scene.keep("web", &leaf("web"));
    let target = scene.directory.path().join("elsewhere");
    fs::rename(&file, &target).unwrap();
    symlink(&target, &file).unwrap();
    assert!(scene.recall("web").is_none() && target.exists(), "a link is not followed");

    let linked = scene.directory.path().join("linked");
    symlink(scene.directory.path(), &linked).unwrap();
    assert!(Kept::on(linked).is_err());
}

/// Where nothing but memory is written to, and where it is not.
#[test]
fn keys_are_kept_in_memory_only() {
    let disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    assert!(Kept::open(disk.path()).unwrap().is_none());
    assert_eq!(fs::read_dir(disk.path()).unwrap().count(), 0, "nothing is left there");
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    assert!(Kept::open(memory.path()).unwrap().is_some());
}
