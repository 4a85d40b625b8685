//! First load, last good copy, and changes while the agent runs.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;
use tokio::{sync::watch, task::JoinHandle, time::timeout};

use super::{
    super::{FileSource, ReloadStats, load},
    BASE,
};
use crate::mesh::MeshStore;

/// Longer than any debounce, shorter than the poll interval: what arrives in time came from an event.
const SOON: Duration = Duration::from_secs(10);

struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn config(&self) -> PathBuf {
        self.dir.path().join("etc/node.yaml")
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn copy(&self) -> PathBuf {
        self.state().join("last-good.yaml")
    }

    fn write(&self, text: &str) {
        fs::create_dir_all(self.config().parent().unwrap()).unwrap();
        let new = self.config().with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(&new, self.config()).unwrap();
    }
}

#[test]
fn a_valid_file_becomes_the_last_good_copy() {
    let place = Place::new();
    place.write(BASE);
    load(&place.config(), &place.state()).unwrap();
    assert_eq!(fs::read_to_string(place.copy()).unwrap(), BASE);
    assert_eq!(fs::metadata(place.copy()).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(fs::metadata(place.state()).unwrap().permissions().mode() & 0o7777, 0o700);
    assert_eq!(fs::read_dir(place.state()).unwrap().count(), 1, "no temporary file is left");

    // An unchanged copy is not written again; a changed one is replaced, not rewritten in place.
    let inode = fs::metadata(place.copy()).unwrap().ino();
    load(&place.config(), &place.state()).unwrap();
    assert_eq!(fs::metadata(place.copy()).unwrap().ino(), inode);
    place.write(&format!("{BASE}# changed\n"));
    let held = fs::File::open(place.copy()).unwrap();
    load(&place.config(), &place.state()).unwrap();
    assert!(fs::read_to_string(place.copy()).unwrap().ends_with("# changed\n"));
    assert_ne!(fs::metadata(place.copy()).unwrap().ino(), held.metadata().unwrap().ino());
}

#[test]
fn without_a_valid_file_the_copy_is_used() {
    let place = Place::new();
    place.write(BASE);
    load(&place.config(), &place.state()).unwrap();

    place.write("kind: nonsense\n");
    let (source, config) = FileSource::open(&place.config(), &place.state(), None).unwrap();
    assert_eq!(&*config.snapshot.node, "node-a");
    let status = source.stats().status();
    assert!(status.from_last_good, "{status:?}");
    assert_eq!((status.accepted, status.rejected), (1, 1));
    assert!(status.error.as_ref().unwrap().contains("node.yaml:1:1: "), "{status:?}");
    assert_eq!(fs::read_to_string(place.copy()).unwrap(), BASE, "an invalid file does not replace the copy");

    fs::remove_file(place.config()).unwrap();
    let (source, config) = FileSource::open(&place.config(), &place.state(), None).unwrap();
    assert_eq!(config.snapshot.workloads().count(), 2);
    assert!(source.stats().status().error.unwrap().contains("check --config"));
}

#[test]
fn without_file_and_copy_both_reasons_are_told() {
    let place = Place::new();
    place.write("kind: 1");
    let message = load(&place.config(), &place.state()).unwrap_err().0;
    assert!(message.contains("node.yaml:1:1: field \"apiVersion\" is missing"), "{message}");
    assert!(message.contains("no last good copy to start from: ") && message.contains("No such file"), "{message}");
}

#[test]
fn a_copy_that_others_can_write_is_not_trusted() {
    let place = Place::new();
    place.write(BASE);
    load(&place.config(), &place.state()).unwrap();
    fs::remove_file(place.config()).unwrap();

    fs::set_permissions(place.copy(), fs::Permissions::from_mode(0o620)).unwrap();
    let message = load(&place.config(), &place.state()).unwrap_err().0;
    assert!(message.contains("only its owner (uid 0) can write; remove it"), "{message}");

    fs::remove_file(place.copy()).unwrap();
    let elsewhere = place.dir.path().join("elsewhere.yaml");
    fs::write(&elsewhere, BASE).unwrap();
    symlink(&elsewhere, place.copy()).unwrap();
    assert!(load(&place.config(), &place.state()).is_err(), "a symbolic link is not followed");
}

#[test]
fn what_is_not_a_readable_text_file_is_refused_at_once() {
    let place = Place::new();
    fs::create_dir_all(place.config().parent().unwrap()).unwrap();
    nix::unistd::mkfifo(&place.config(), nix::sys::stat::Mode::S_IRUSR).unwrap();
    let message = load(&place.config(), &place.state()).unwrap_err().0;
    assert!(message.contains("not a regular file"), "{message}");

    fs::remove_file(place.config()).unwrap();
    fs::write(place.config(), b"node: \xff\n").unwrap();
    let message = load(&place.config(), &place.state()).unwrap_err().0;
    assert!(message.contains("byte 6 is not UTF-8"), "{message}");
}

/// A file system that is full, or read-only.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(at: &Path, flags: MsFlags, options: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some(options)).expect("mounting tmpfs needs root");
        Self(at.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).expect("unmounting tmpfs");
    }
}

#[test]
fn a_full_disk_does_no_harm() {
    let place = Place::new();
    let disk = Tmpfs::new(&place.state(), MsFlags::empty(), "size=16k,mode=0700");
    place.write(BASE);
    load(&place.config(), &place.state()).unwrap();

    // Larger than the disk: the new document is in force, the old copy stays whole.
    let large = format!("{BASE}{}", "# padding\n".repeat(4000));
    place.write(&large);
    let (source, config) = FileSource::open(&place.config(), &place.state(), None).unwrap();
    assert_eq!(config.snapshot.workloads().count(), 2);
    assert!(source.stats().status().error.is_none());
    assert_eq!(fs::read_to_string(place.copy()).unwrap(), BASE);
    assert_eq!(fs::read_dir(place.state()).unwrap().count(), 1, "no partial file is left");

    // With room again the copy follows.
    place.write(&format!("{BASE}# small\n"));
    load(&place.config(), &place.state()).unwrap();
    assert!(fs::read_to_string(place.copy()).unwrap().ends_with("# small\n"));
    drop(disk);
}

#[test]
fn a_read_only_state_directory_does_no_harm() {
    let place = Place::new();
    let disk = Tmpfs::new(&place.state(), MsFlags::MS_RDONLY, "size=64k,mode=0700");
    place.write(BASE);
    let (source, config) = FileSource::open(&place.config(), &place.state(), None).unwrap();
    assert_eq!(config.snapshot.workloads().count(), 2);
    assert_eq!(source.stats().status().accepted, 1);
    assert!(!place.copy().exists());
    drop(disk);
}

struct Running {
    store: Arc<MeshStore>,
    stats: Arc<ReloadStats>,
    generation: watch::Receiver<u64>,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
        // A reading that has begun ends in its own time, and would make the directory again that is removed next.
        let end = Instant::now() + SOON;
        while Arc::strong_count(&self.store) > 1 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Running {
    fn start(place: &Place) -> Self {
        let (source, config) = FileSource::open(&place.config(), &place.state(), None).unwrap();
        let store = Arc::new(MeshStore::new(config.snapshot));
        let generation = store.subscribe();
        let stats = source.stats();
        let watched = Arc::clone(&store);
        let task = tokio::spawn(async move {
            source.watch(watched).await.unwrap();
        });
        Self { store, stats, generation, task }
    }

    async fn next(&mut self) {
        timeout(SOON, self.generation.changed()).await.expect("a new generation").unwrap();
    }

    /// Rejections do not wake anybody in the product, so they are waited for by looking.
    async fn rejected(&self, times: u64) -> String {
        timeout(SOON, async {
            loop {
                let status = self.stats.status();
                if status.rejected >= times {
                    assert_eq!(status.rejected, times);
                    return status.error.expect("a rejection has an error");
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
        .expect("a rejection")
    }

    fn addresses(&self) -> usize {
        self.store.load().captured_addresses().count()
    }
}

fn with_service() -> String {
    format!("{BASE}  - {{ name: more, namespace: default, vips: [10.96.0.11], ports: [{{ port: 80 }}] }}\n")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_in_place_and_by_rename_are_applied() {
    let place = Place::new();
    place.write(BASE);
    let mut agent = Running::start(&place);
    assert_eq!(agent.addresses(), 4);

    fs::write(place.config(), with_service()).unwrap();
    agent.next().await;
    assert_eq!(agent.addresses(), 5);

    place.write(BASE);
    agent.next().await;
    assert_eq!(agent.addresses(), 4);
    assert_eq!(agent.stats.status().accepted, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invalid_change_keeps_the_old_configuration() {
    let place = Place::new();
    place.write(BASE);
    let mut agent = Running::start(&place);

    place.write("kind: nonsense\n");
    let error = agent.rejected(1).await;
    assert!(error.contains("node.yaml:1:1: field \"apiVersion\" is missing"), "{error}");
    assert_eq!((agent.addresses(), *agent.generation.borrow()), (4, 0));
    assert_eq!(fs::read_to_string(place.copy()).unwrap(), BASE);

    fs::remove_file(place.config()).unwrap();
    let error = agent.rejected(2).await;
    assert!(error.contains("No such file"), "{error}");

    place.write(&with_service());
    agent.next().await;
    assert_eq!(agent.addresses(), 5);
    assert!(agent.stats.status().error.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_trust_domain_and_issuer_need_a_restart() {
    let place = Place::new();
    place.write(BASE);
    let agent = Running::start(&place);
    for (times, (from, to, expected)) in (1..).zip([
        ("node: node-a", "node: node-c", "node changed from node-a to node-c: restart needed"),
        ("trustDomain: cluster.local", "trustDomain: b", "trustDomain changed from cluster.local to b: restart needed"),
        (
            "caDir: /run/underpass/ca",
            "caDir: /run/underpass/cb",
            "issuer changed from local (caDir /run/underpass/ca, lifetime 1day) to local (caDir /run/underpass/cb, lifetime 1day): restart needed",
        ),
        (
            "local: { caDir: /run/underpass/ca }",
            "istio: { address: \"https://ca:15012\", rootFile: /r, tokenFile: /t, serverName: istiod }",
            "to istio (address https://ca:15012, rootFile /r, tokenFile /t, clusterId Kubernetes, lifetime 1day, serverName istiod): restart needed",
        ),
    ]) {
        place.write(&BASE.replace("    enroll:\n      netns: /run/netns/web\n", "").replace(from, to));
        let error = agent.rejected(times).await;
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!((agent.addresses(), *agent.generation.borrow()), (4, 0));
    assert_eq!(fs::read_to_string(place.copy()).unwrap(), BASE, "what is not in force is not kept as good");
}

/// A mounted `ConfigMap`: `node.yaml -> ..data/node.yaml`, `..data -> ..1`, updated by renaming a new link over `..data`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_config_map_swap_is_applied() {
    let place = Place::new();
    let dir = place.config().parent().unwrap().to_owned();
    let publish = |version: &str, text: &str| {
        fs::create_dir_all(dir.join(version)).unwrap();
        fs::write(dir.join(version).join("node.yaml"), text).unwrap();
        symlink(version, dir.join("..data_tmp")).unwrap();
        fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
    };
    publish("..1", BASE);
    symlink("..data/node.yaml", place.config()).unwrap();
    let mut agent = Running::start(&place);

    publish("..2", &with_service());
    fs::remove_dir_all(dir.join("..1")).unwrap();
    agent.next().await;
    assert_eq!(agent.addresses(), 5);

    publish("..3", BASE);
    agent.next().await;
    assert_eq!(agent.addresses(), 4);
}

/// The file is a link to one elsewhere, which is edited there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_behind_a_link_is_applied() {
    let place = Place::new();
    fs::create_dir_all(place.config().parent().unwrap()).unwrap();
    let real = place.dir.path().join("real.yaml");
    fs::write(&real, BASE).unwrap();
    symlink(&real, place.config()).unwrap();
    let mut agent = Running::start(&place);
    // The first look at the file happens after the directories are watched.
    fs::write(&real, with_service()).unwrap();
    agent.next().await;
    assert_eq!(agent.addresses(), 5);
}

/// Between `open` and `watch` there is no event to see.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_before_the_watch_is_not_missed() {
    let place = Place::new();
    place.write(BASE);
    let (source, config) = FileSource::open(&place.config(), &place.state(), None).unwrap();
    place.write(&with_service());
    let store = Arc::new(MeshStore::new(config.snapshot));
    let mut generation = store.subscribe();
    let task = tokio::spawn(source.watch(Arc::clone(&store)));
    timeout(SOON, generation.changed()).await.expect("a new generation").unwrap();
    task.abort();
}
